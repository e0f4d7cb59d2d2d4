"""Rows that belong together stay together, whatever joins them."""

from __future__ import annotations

import numpy as np
import pytest

from mmalign.alignment.split import grouped, held_out, shared_content
from mmalign.errors import InputError


def partition(groups: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(groups == group).tolist()) for group in set(groups.tolist())}


def test_groups_join_from_row_to_row() -> None:
    content = ["a", "b", "a", "c", "d", "e"]
    people = ["x", None, "y", "y", None, "z"]
    # 0 and 2 by content, 2 and 3 by person; the rows without a person are not one.
    assert partition(grouped(content, people)) == {frozenset({0, 2, 3}), frozenset({1}), frozenset({4}), frozenset({5})}
    assert frozenset({0, 2}) in partition(grouped(content))
    assert len(partition(grouped(content))) == 5


def test_groups_agree_with_a_search_through_the_graph() -> None:
    rng = np.random.default_rng(0)
    columns = [[None if value == 0 else value for value in rng.integers(40, size=80).tolist()] for _ in range(2)]
    label = np.arange(80)
    for _ in range(80):
        for row in range(80):
            for other in range(80):
                if any(column[row] is not None and column[row] == column[other] for column in columns):
                    label[row] = label[other] = min(label[row], label[other])
    assert partition(grouped(*columns)) == partition(label)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_whole_groups_are_held_out_and_the_share_is_about_right(share: float) -> None:
    groups = np.random.default_rng(1).integers(0, 120, size=500) * 3
    masks = [held_out(groups, share, seed) for seed in range(5)]
    for mask in masks:
        assert not set(groups[mask]) & set(groups[~mask])
        assert abs(mask.mean() - share) < 0.02
    assert len({mask.tobytes() for mask in masks}) == 5
    np.testing.assert_array_equal(held_out(groups, share, 0), masks[0])
    held = np.mean([held_out(groups, share, seed) for seed in range(200)], axis=0)
    assert held.min() > 0, "every row can be held out"


def test_a_large_group_does_not_swallow_the_training_rows() -> None:
    groups = np.array([9] * 90 + list(range(100, 110)))
    for seed in range(20):
        mask = held_out(groups, 0.1, seed)
        assert not mask[:90].any()
        assert mask.sum() == 10
    halves = np.repeat([4, 7], [60, 40])
    for seed in range(5):
        np.testing.assert_array_equal(held_out(halves, 0.1, seed), halves == 7)
        assert held_out(np.array([3, 5]), 0.9, seed).sum() == 1


def test_one_group_cannot_be_split() -> None:
    with pytest.raises(InputError, match=r"8 rows are one group .*add pairs"):
        held_out(np.full(8, 5), 0.5, 0)
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="give a number between 0 and 1"):
            held_out(np.arange(8), share, 0)


def test_shared_content_names_both_rows() -> None:
    one = np.array([True, True, False, False, False])
    assert shared_content(["a", "b", "b", "c", "b"], one, ~one) == [(1, 2), (1, 4)]
    assert shared_content(["a", "b", "c", "d", "e"], one, ~one) == []
