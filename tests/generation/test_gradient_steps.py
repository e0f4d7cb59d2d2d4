"""Which steps carry a reward's gradient: the published choices, their probabilities, and what makes no sense."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from generation.objectives.gradient_steps import check_gradient_steps, draw_gradient_steps
from generation.objectives.reward_losses import reward_loss
from mmalign.errors import InputError


def drawn(form: str, total: int, times: int = 1) -> list[list[bool]]:
    generator = torch.Generator().manual_seed(0)
    return [draw_gradient_steps(form, total, generator) for _ in range(times)]


def lengths(masks: list[list[bool]]) -> Counter[int]:
    """How many steps each mask has; all of them have to be the last ones."""
    for mask in masks:
        assert mask == sorted(mask)
    return Counter(sum(mask) for mask in masks)


def test_forms_without_chance() -> None:
    assert drawn("all", 3) == [[True] * 3]
    assert drawn("last:2", 4) == [[False, False, True, True]]
    assert drawn("0,1,0,1", 4) == [[False, True, False, True]]


@pytest.mark.parametrize(("form", "low", "high"), [("uniform", 1, 6), ("uniform:2:4", 2, 4), ("uniform:0:3", 1, 3)])
def test_uniform_truncation_takes_every_length_equally_often(form: str, low: int, high: int) -> None:
    found = lengths(drawn(form, 6, 3000))
    assert set(found) == set(range(low, high + 1))
    expected = 3000 / (high - low + 1)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in found.values())


def test_normal_truncation_stays_within_the_run() -> None:
    found = lengths(drawn("normal:8:5", 10, 2000))
    assert set(found) == set(range(1, 11))
    assert found[8] > found[2]
    assert set(lengths(drawn("normal:3:0", 10, 20))) == {3}
    # One of 25 draws is in the run; K is then as good as uniform.
    assert set(lengths(drawn("normal:2:40", 4, 60))) == {1, 2, 3, 4}


def test_one_step_anywhere_or_within_bounds() -> None:
    assert {tuple(mask).index(True) for mask in drawn("one", 4, 200)} == {0, 1, 2, 3}
    assert {tuple(mask).index(True) for mask in drawn("one:2:3", 5, 100)} == {2, 3}
    assert all(sum(mask) == 1 for mask in drawn("one", 4, 50))


def test_independent_steps_have_the_marginals_of_the_released_code() -> None:
    masks = torch.tensor(drawn("independent", 5, 6000), dtype=torch.float64)
    kept = [(i + 1) / 6 for i in range(5)]
    none = torch.tensor([1 - p for p in kept]).prod()  # such draws are repeated
    torch.testing.assert_close(
        masks.mean(dim=0), torch.tensor(kept, dtype=torch.float64) / (1 - none), atol=0.03, rtol=0
    )
    assert bool((masks.sum(dim=1) > 0).all())
    assert any(mask != sorted(mask) for mask in masks.bool().tolist())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("last:0", "nothing would be trained"),
        ("0,0,0,0", "nothing would be trained"),
        ("uniform:0:0", "nothing would be trained"),
        ("last:5", "needs 5 steps and a run has 4"),
        ("uniform:1:9", "needs 9 steps"),
        ("one:0:4", "needs 5 steps"),
        ("0,1", "has 2 entries for 4 steps"),
        ("one:3:1", "give the lower first"),
        ("normal:40:1", "draws hardly a number from 1 to 4"),
        ("normal:1e9:1e9", "draws hardly a number from 1 to 4"),
        ("normal:2:1e9", "draws hardly a number from 1 to 4"),
        ("normal:0:0", "draws hardly a number from 1 to 4"),
        *(
            (form, "give one of")
            for form in ("last:inf", "last:nan", "uniform:1:inf", "one:0:inf", "normal:2:inf", "normal:2:nan")
        ),
        ("normal:2:-1", "below 0"),
        *(
            (form, "give one of")
            for form in ("", "last", "last:x", "last:1.5", "first:2", "0,2", "uniform:1", "all:3:4")
        ),
    ],
)
def test_what_makes_no_sense_is_refused(form: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_gradient_steps(form, 4)


def test_outer_losses() -> None:
    rewards = torch.tensor([0.2, 0.9], requires_grad=True)
    wanted = {"negative": [-2, -2], "target": [-2, 2], "hinge": [-2, 0]}
    for kind, slope in wanted.items():
        threshold = None if kind == "negative" else 0.7
        (gradient,) = torch.autograd.grad(reward_loss(rewards, kind, threshold=threshold, scale=2.0).sum(), rewards)  # type: ignore[arg-type]
        assert gradient.tolist() == slope
    assert reward_loss(rewards, "target", threshold=0.7).tolist() == pytest.approx([0.5, 0.2])
    for kind, message in (("hinge", "needs a threshold"), ("softmax", "give negative, target or hinge")):
        with pytest.raises(InputError, match=message):
            reward_loss(rewards, kind)  # type: ignore[arg-type]
