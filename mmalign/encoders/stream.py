"""Decode ahead, encode in batches, keep the order: what feeds every image encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import at_least
from ..errors import UnreadableImageError
from ..prefetch import prefetch

if TYPE_CHECKING:
    from .encoder import Encoder

__all__ = ["EncodedBatch", "Outcome", "encode_stream"]

Source = TypeVar("Source")
Payload = TypeVar("Payload")


@dataclass(frozen=True)
class Outcome(Generic[Source, Payload]):
    """What became of one source: a payload with the number of its vector in the batch, a payload alone, or an error."""

    source: Source
    payload: Payload | None = None
    vector: int | None = None
    error: UnreadableImageError | None = None


@dataclass(frozen=True)
class EncodedBatch(Generic[Source, Payload]):
    """What one forward pass covered, in the order of the sources."""

    vectors: Float[np.ndarray, "encoded dim"]
    outcomes: list[Outcome[Source, Payload]]


def encode_stream(
    encoder: Encoder,
    sources: Iterable[Source],
    load: Callable[[Source], tuple[Payload, Tensor | None]],
    *,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Iterator[EncodedBatch[Source, Payload]]:
    """Encode a stream of sources without ever holding more than a few batches.

    Args:
        encoder: takes images.
        sources: anything `load` understands.
        load: runs in a thread; returns what the caller wants to keep and the preprocessed pixels, or `None` instead of
            pixels for a source that needs no vector. It may raise `UnreadableImageError`, which is reported in the
            batch and stops nothing.
        batch_size: images a forward pass.
        workers: decoding threads.

    Yields:
        Batches that cover the sources in order; the last one may be short.

    Raises:
        InputError: `batch_size` or `workers` is below 1.
    """
    at_least("batch_size", batch_size)
    at_least("workers", workers)
    size = batch_size or encoder.default_batch_size
    pixels: list[Tensor] = []
    outcomes: list[Outcome[Source, Payload]] = []
    for source, loaded in prefetch(sources, load, ahead=3 * size, workers=workers):
        if isinstance(loaded, UnreadableImageError):
            outcomes.append(Outcome(source, error=loaded))
        elif loaded[1] is None:
            outcomes.append(Outcome(source, loaded[0]))
        else:
            outcomes.append(Outcome(source, loaded[0], vector=len(pixels)))
            pixels.append(loaded[1])
        # Sources without pixels count towards an upper bound, so that a run of them is not held back.
        if len(pixels) == size or len(outcomes) >= 16 * size:
            yield EncodedBatch(_encode(encoder, pixels), outcomes)
            pixels, outcomes = [], []
    if outcomes:
        yield EncodedBatch(_encode(encoder, pixels), outcomes)


def _encode(encoder: Encoder, pixels: list[Tensor]) -> Float[np.ndarray, "encoded dim"]:
    return encoder.encode_pixels(torch.stack(pixels)) if pixels else np.zeros((0, encoder.dim), np.float32)
