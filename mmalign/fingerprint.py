"""What goes into a fingerprint: weights by their values, tokenizers by how they cut a few fixed sentences.

Neither parameter names nor serialised tokenizers serve: libraries change both between versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["digest_of", "tensor_digest", "token_probe", "weights_digest"]

_SENTENCES = ["A photo of 3 dogs, running.", "Żółta łódź na jeziorze; 猫 & naïve café"]


def digest_of(about: Mapping[str, Any], model: nn.Module) -> str:
    """Hex digest of a JSON-safe description and of weights."""
    return hashlib.sha256((json.dumps(about, sort_keys=True) + weights_digest(model)).encode()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """A text that is equal for models whose tensors have equal shapes and, as float32, equal content, in any order.

    Single numbers (logit scales, batch counters) and integer buffers (positions) are left out: they do not reach
    normalised features, or are derived.
    """
    tensors = (t for t in model.state_dict().values() if t.numel() > 1 and t.is_floating_point())
    return "".join(sorted(tensor_digest(tensor) for tensor in tensors))


def tensor_digest(tensor: Tensor) -> str:
    """Hex digest of a tensor's shape and values as float32."""
    values = tensor.detach().cpu().float().contiguous()
    digest = hashlib.sha256(f"{tuple(values.shape)}".encode())
    digest.update(memoryview(values.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def token_probe(tokenize: Callable[[list[str]], list[list[int]]]) -> list[list[int]]:
    """Token ids of two fixed sentences (case, digits, punctuation, accents, other scripts)."""
    return [[int(token) for token in row] for row in tokenize(_SENTENCES)]
