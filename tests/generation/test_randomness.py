"""Every draw of a run is a function of its name: nothing global, nothing that depends on how a batch is cut."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from generation.training.randomness import BucketedBatches, chance, normal, stream, timesteps


def test_the_same_name_draws_the_same_and_another_name_another() -> None:
    names = [(0, "noise", 1), (0, "noise", 2), (1, "noise", 1), (0, "flip", 1), (0, "noise", 1, 0), (0, "noise", -1)]
    draws = [torch.randn(8, generator=stream(*name)) for name in names]
    again = [torch.randn(8, generator=stream(*name)) for name in reversed(names)]
    for one, other in zip(draws, reversed(again), strict=True):
        assert torch.equal(one, other)
    assert len({tuple(draw.tolist()) for draw in draws}) == len(names)


def test_global_random_states_are_neither_used_nor_touched() -> None:
    def draw() -> list[object]:
        order = BucketedBatches(["a"] * 7, 2, 3)
        return [normal(3, "noise", [1, 2], (4,)).tolist(), timesteps(3, [1, 2], 1000).tolist(),
                chance(3, "flip", 9, 0.5), [order[m] for m in range(9)]]  # fmt: skip

    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
        found.append(draw())
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (repr(np.random.get_state()), random.getstate())
    assert found[0] == found[1]


def test_another_process_draws_the_same() -> None:
    program = (
        "import json; from generation.training.randomness import BucketedBatches, normal, timesteps;"
        "order = BucketedBatches([(64, 64), (128, 32)] * 4, 3, 5);"
        "print(json.dumps([normal(5, 'noise', [3], [4]).tolist(), timesteps(5, [3], 1000).tolist(),"
        "[order[m] for m in range(8)]]))"
    )
    made = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": "123"}, capture_output=True, check=True
    )
    order = BucketedBatches([(64, 64), (128, 32)] * 4, 3, 5)
    expected = [normal(5, "noise", [3], [4]).tolist(), timesteps(5, [3], 1000).tolist(), [order[m] for m in range(8)]]
    assert json.loads(made.stdout) == expected


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6), st.integers(0, 6))
@settings(max_examples=25, deadline=None)
def test_draws_do_not_depend_on_how_samples_are_batched(samples: list[int], cut: int) -> None:
    parts = [part for part in (samples[:cut], samples[cut:]) if part]
    whole = normal(7, "noise", samples, (2, 3))
    assert whole.shape == (len(samples), 2, 3)
    assert torch.equal(whole, torch.cat([normal(7, "noise", part, (2, 3)) for part in parts]))
    assert torch.equal(timesteps(7, samples, 50), torch.cat([timesteps(7, part, 50) for part in parts]))


def test_noise_is_standard_normal_and_independent() -> None:
    draws = normal(0, "noise", range(200), (4, 8, 8)).flatten(1).double()
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-4
    correlations = np.corrcoef(draws.numpy())[~np.eye(200, dtype=bool)]
    assert abs(correlations).max() < 6 / np.sqrt(256)


def test_timesteps_are_uniform() -> None:
    draws = timesteps(0, range(20_000), 1000)
    assert draws.dtype == torch.int64
    assert draws.min() == 0
    assert draws.max() == 999
    assert stats.chisquare(np.bincount(draws.numpy() // 50)).pvalue > 1e-4
    neighbours = np.corrcoef(draws[:-1].numpy(), draws[1:].numpy())[0, 1]
    assert abs(neighbours) < 0.04


def test_chances_come_as_often_as_they_should() -> None:
    assert not any(chance(0, "flip", n, 0.0) for n in range(100))
    assert all(chance(0, "flip", n, 1.0) for n in range(100))
    assert stats.binomtest(sum(chance(0, "flip", n, 0.2) for n in range(5000)), 5000, 0.2).pvalue > 1e-4


@given(
    st.lists(st.sampled_from(["wide", "tall", "square"]), min_size=1, max_size=30),
    st.integers(1, 7),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_every_item_in_every_epoch_and_one_bucket_a_batch(buckets: list[str], size: int, seed: int) -> None:
    order = BucketedBatches(buckets, size, seed)
    for epoch in range(3):
        batches = [order[epoch * order.batches_per_epoch + m] for m in range(order.batches_per_epoch)]
        assert all(len(batch) == size for batch in batches)
        assert all(len({buckets[item] for item in batch}) == 1 for batch in batches)
        times = Counter(item for batch in batches for item in batch)
        assert set(times) == set(range(len(buckets)))
        # No more batches than the buckets need, and none is seen much more often than its neighbours.
        assert len(batches) == sum(-(-count // size) for count in Counter(buckets).values())
        for bucket, count in Counter(buckets).items():
            seen = [times[item] for item in range(len(buckets)) if buckets[item] == bucket]
            assert max(seen) <= -(-size // count) + 1


@given(st.lists(st.integers(0, 200), min_size=1, max_size=20), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_batch_does_not_depend_on_what_was_asked_before(asked: list[int], seed: int) -> None:
    buckets = [0, 1, 0, 0, 2, 1, 0]
    order = BucketedBatches(buckets, 2, seed)
    for number in asked:
        assert order[number] == BucketedBatches(buckets, 2, seed)[number]


def test_a_single_bucket_walks_a_permutation_and_fills_its_last_batch() -> None:
    order = BucketedBatches(["square"] * 10, 4, 0)
    first, second = ([item for m in range(3) for item in order[3 * epoch + m]] for epoch in range(2))
    assert sorted(first[:10]) == sorted(second[:10]) == list(range(10))
    assert first[:10] != second[:10] != list(range(10))
    assert first[10:] == first[:2]
    assert first != [item for m in range(3) for item in BucketedBatches(["square"] * 10, 4, 1)[m]]


def test_fewer_items_than_a_batch_are_repeated() -> None:
    batch = BucketedBatches(["square"] * 2, 5, 0)[0]
    assert len(batch) == 5
    assert sorted(set(batch)) == [0, 1]
    assert batch[:2] == batch[2:4]


@pytest.mark.parametrize("seed", [0, 2**40, 10**18])
def test_any_seed_will_do(seed: int) -> None:
    assert torch.isfinite(normal(seed, "noise", [2**50], (3,))).all()
