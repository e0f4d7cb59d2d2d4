"""All randomness of a training step, from its coordinates: a resumed run draws what the uninterrupted one drew.

Nothing here touches a global random state. A draw is named by (seed, purpose, *coordinates); the coordinates of a
sample are its number in the run, which follows from step, rank and position, so that the same samples are drawn however
a batch is split between processes and accumulation steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["BucketedBatches", "chance", "normal", "stream", "timesteps"]


def stream(seed: int, purpose: str, *coordinates: int) -> torch.Generator:
    """A CPU generator that is a function of its arguments alone."""
    digest = hashlib.blake2b(repr((seed, purpose, coordinates)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(seed: int, purpose: str, samples: Sequence[int], shape: Sequence[int]) -> Float[Tensor, n * shape]:
    """Standard normal noise, one independent draw of `shape` for each sample."""
    return torch.stack([torch.randn(tuple(shape), generator=stream(seed, purpose, sample)) for sample in samples])


def timesteps(seed: int, samples: Sequence[int], num_train_timesteps: int) -> Int[Tensor, " n"]:
    """Uniform integers in [0, T), one for each sample."""
    draws = [torch.randint(num_train_timesteps, (1,), generator=stream(seed, "timestep", n)) for n in samples]
    return torch.cat(draws)


def chance(seed: int, purpose: str, sample: int, probability: float) -> bool:
    """True with the given probability."""
    return probability > 0 and bool(torch.rand((), generator=stream(seed, purpose, sample)) < probability)


class BucketedBatches:
    """The endless sequence of batches of a run: batch `m` is a function of (seed, m), and holds one bucket only.

    Each epoch is a fresh permutation, walked through once; a bucket gives a batch whenever it has gathered enough.
    What is left of a bucket at the end of an epoch is filled up with that bucket's first items, so that every item is
    seen in every epoch.
    """

    def __init__(self, buckets: Sequence[object], batch_size: int, seed: int) -> None:
        """`buckets[i]` names the bucket of item i."""
        self._buckets, self._size, self._seed = list(buckets), batch_size, seed
        counts: dict[object, int] = {}
        for bucket in self._buckets:
            counts[bucket] = counts.get(bucket, 0) + 1
        self.batches_per_epoch = sum(-(-count // batch_size) for count in counts.values())
        self._walked: tuple[int | None, list[list[int]]] = (None, [])

    def __getitem__(self, batch: int) -> list[int]:
        epoch, place = divmod(batch, self.batches_per_epoch)
        walked = self._walked  # read once: threads share this
        if walked[0] != epoch:
            self._walked = walked = (epoch, list(self._walk(epoch)))
        return walked[1][place]

    def _walk(self, epoch: int) -> Iterator[list[int]]:
        order = torch.randperm(len(self._buckets), generator=stream(self._seed, "order", epoch)).tolist()
        waiting: dict[object, list[int]] = {}
        seen: dict[object, list[int]] = {}
        for item in order:
            bucket = self._buckets[item]
            gathered = waiting.setdefault(bucket, [])
            gathered.append(item)
            seen.setdefault(bucket, []).append(item)
            if len(gathered) == self._size:
                yield waiting.pop(bucket)
        for bucket, rest in waiting.items():
            yield [*rest, *np.resize(seen[bucket], self._size - len(rest)).tolist()]
