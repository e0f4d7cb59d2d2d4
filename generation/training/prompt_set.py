"""Prompts as training data: what to draw, from which noise, with embeddings made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmalign.progress import progress_bar

from .cache import TensorStore, content_key
from .encoding import PromptEncoder
from .randomness import BucketedBatches

__all__ = ["PromptBatch", "PromptSet"]


@dataclass(frozen=True)
class PromptBatch:
    """What a step draws.

    Attributes:
        prompts: one an image.
        ordinals: the number of each image in the run, which names its noise.
        embeddings: of each prompt, as `PromptEncoder.encode` returns them, on the CPU until the pipeline is called.
    """

    prompts: list[str]
    ordinals: list[int]
    embeddings: list[dict[str, Tensor]]

    def to(self, device: torch.device) -> PromptBatch:
        """Itself: embeddings are moved when they are used, in the network's precision."""
        return self

    def labels(self) -> dict[str, list[str]]:
        """What an error calls each image."""
        return {"": [f"{prompt!r} (image {n})" for prompt, n in zip(self.prompts, self.ordinals, strict=True)]}


class PromptSet:
    """An endless sequence of batches of prompts, in an order that the seed gives; embeddings are cached on disk.

    Attributes:
        prompts: all of them.
        fingerprint: of the prompts and of the text encoders.
        threaded: batches may be made in threads; without a store the text encoders run between steps.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        encoder: PromptEncoder,
        *,
        batch_size: int,
        seed: int,
        store: Path | None,
        dtype: torch.dtype,
    ) -> None:
        self.prompts = list(prompts)
        self._encoder, self._dtype, self._size = encoder, dtype, batch_size
        self._order = BucketedBatches([""] * len(self.prompts), batch_size, seed)
        self._store = TensorStore(store / "prompts") if store else None
        self.threaded = store is not None
        told = json.dumps([self.prompts, encoder.fingerprint])
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()

    def encode_all(self, others: Sequence[str] = (), *, progress: bool, part: tuple[int, int] = (0, 1)) -> None:
        """Fill the store with what is missing: all prompts, `others`, and the unconditional embedding.

        Args:
            others: further prompts, e.g. those held out.
            progress: show a bar.
            part: (i, n): only the i-th of n parts, for n processes that share a store.
        """
        if self._store is None:
            return
        wanted = {self._key(prompt): prompt for prompt in (*self.prompts, *others, None)}
        mine = [key for number, key in enumerate(wanted) if number % part[1] == part[0] and key not in self._store]
        with progress_bar("encoding prompts", len(mine), unit="prompts", enabled=progress and bool(mine)) as advance:
            for key in mine:
                self._store.write(key, self._encoder.encode(wanted[key]), self._dtype, f"prompt {wanted[key]!r}")
                advance()

    def batch(self, number: int) -> PromptBatch:
        """The batch of this number in the run."""
        return self.images(range(number * self._size, (number + 1) * self._size))

    def images(self, ordinals: Sequence[int], repeats: int = 1) -> PromptBatch:
        """Images of the run by number; with `repeats` so many, one after the other, are of one prompt."""
        places = [divmod(ordinal // repeats, self._size) for ordinal in ordinals]
        prompts = [self.prompts[self._order[batch][place]] for batch, place in places]
        return PromptBatch(prompts, list(ordinals), [dict(self.embedding(prompt)) for prompt in prompts])

    def embedding(self, prompt: str | None) -> Mapping[str, Tensor]:
        """Of a prompt, or the unconditional one."""
        if self._store is not None:
            return self._store.read(self._key(prompt))
        return TensorStore.rounded(self._encoder.encode(prompt), self._dtype, f"prompt {prompt!r}")

    def _key(self, prompt: str | None) -> str:
        return content_key(prompt=prompt, encoders=self._encoder.fingerprint, dtype=str(self._dtype))
