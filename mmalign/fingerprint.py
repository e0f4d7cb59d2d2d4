"""What goes into a fingerprint: weights by their values, tokenizers by how they cut a few fixed sentences.

Neither parameter names nor serialised tokenizers serve: libraries change both between versions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["token_probe", "weights_digest"]

_SENTENCES = ["A photo of 3 dogs, running.", "Żółta łódź na jeziorze; 猫 & naïve café"]


def weights_digest(model: nn.Module) -> str:
    """A text that is equal exactly for models whose tensors have equal shapes and, as float32, equal content.

    Single numbers (logit scales, batch counters) and integer buffers (positions) are left out: they do not reach
    normalised features, or are derived.
    """
    tensors = (
        t.detach().cpu().float().contiguous()
        for t in model.state_dict().values()
        if t.numel() > 1 and t.is_floating_point()
    )
    return "".join(
        sorted(
            hashlib.sha256(
                f"{tuple(t.shape)}".encode() + memoryview(t.reshape(-1).view(torch.uint8).numpy())
            ).hexdigest()
            for t in tensors
        )
    )


def token_probe(tokenize: Callable[[list[str]], list[list[int]]]) -> list[list[int]]:
    """Token ids of two fixed sentences (case, digits, punctuation, accents, other scripts)."""
    return [[int(token) for token in row] for row in tokenize(_SENTENCES)]
