"""What the trainer asks of data and batches, and how it loads them ahead: any data that fit here can be trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

from mmalign.errors import UnreadableImageError
from mmalign.prefetch import prefetch

__all__ = ["TrainingBatch", "TrainingData", "load_batches"]

Self = TypeVar("Self")


class TrainingBatch(Protocol):
    """Inputs of one forward pass."""

    def to(self: Self, device: torch.device) -> Self:
        """All of it on a device."""

    def labels(self) -> Mapping[str, Sequence[str]]:
        """What an error calls each row: by the ending of the value names that have one entry a row, "" for the rest."""


class TrainingData(Protocol):
    """An endless sequence of batches.

    Attributes:
        fingerprint: of all that the batches are made of; a run is resumed on equal data only.
        threaded: `batch` may be called from several threads, while the device works on earlier batches.
    """

    fingerprint: str
    threaded: bool

    def batch(self, number: int) -> Any:
        """The batch of this number in the run, over all steps and processes: a function of (seed, number) alone."""


def load_batches(data: TrainingData, numbers: Iterable[int], *, ahead: int, workers: int | None) -> Iterator[Any]:
    """The batches of these numbers in order, on the CPU; `ahead` of them are loaded in threads where that is allowed.

    A failure is raised, as leaving a batch out would shift all that follow.
    """
    if not data.threaded:
        yield from map(data.batch, numbers)
        return
    for _, loaded in prefetch(numbers, data.batch, ahead=ahead, workers=workers):
        if isinstance(loaded, UnreadableImageError):
            raise loaded
        yield loaded
