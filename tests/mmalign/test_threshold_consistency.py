"""Threshold-consistent margins against a loop over pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmalign.errors import InputError
from mmalign.threshold_consistency import tcm_loss, tcm_pairs

OPTIONS = {"positive_margin": 0.6, "negative_margin": 0.1, "positive_weight": 0.5, "negative_weight": 2.0}


def problem() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 4, generator=random, dtype=torch.float64)
    return rows.requires_grad_(), torch.tensor([0, 1, 0, 2, 2, 1, 0, 5, 2])


def by_hand(similarity: list[list[float]], kind: list[list[str]]) -> tuple[float, float, int, int]:
    flat = [(s, k) for scores, kinds in zip(similarity, kind, strict=True) for s, k in zip(scores, kinds, strict=True)]
    low = [0.6 - s for s, k in flat if k == "positive" and s <= 0.6]
    high = [s - 0.1 for s, k in flat if k == "negative" and s >= 0.1]
    return 0.5 * sum(low) / max(1, len(low)), 2.0 * sum(high) / max(1, len(high)), len(low), len(high)


def test_batch_by_hand() -> None:
    rows, labels = problem()
    unit = normalize(rows, dim=1)
    kind = [
        ["self" if i == j else "positive" if labels[i] == labels[j] else "negative" for j in range(9)] for i in range(9)
    ]
    positive, negative, n_positive, n_negative = by_hand((unit @ unit.T).tolist(), kind)
    terms = tcm_loss(rows, labels, **OPTIONS)
    assert n_positive > 2
    assert n_negative > 2
    assert (terms.n_positive, terms.n_negative) == (n_positive, n_negative)
    assert terms.positive.item() == pytest.approx(positive)
    assert terms.negative.item() == pytest.approx(negative)
    assert terms.loss.item() == pytest.approx(positive + negative)
    assert torch.autograd.gradcheck(lambda x: tcm_loss(x, labels, **OPTIONS).loss, rows)


def test_two_sides_by_hand() -> None:
    similarity = 2 * torch.rand(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1
    positives = torch.arange(4)[:, None] == torch.arange(7) % 4
    exclude = torch.zeros(4, 7, dtype=torch.bool)
    exclude[0, 0] = exclude[1, 0] = True
    kind = [
        ["out" if exclude[i, j] else "positive" if positives[i, j] else "negative" for j in range(7)] for i in range(4)
    ]
    terms = tcm_pairs(similarity, positives, exclude=exclude, **OPTIONS)
    positive, negative, *counts = by_hand(similarity.tolist(), kind)
    assert [int(terms.n_positive), int(terms.n_negative)] == counts
    assert [terms.positive.item(), terms.negative.item()] == pytest.approx([positive, negative])


def test_gradient_does_not_fade_as_violations_become_rare() -> None:
    """One hard pair among many easy ones pulls as hard as one hard pair alone."""
    for easy in (0, 50):
        scores = torch.full((1, 1 + easy), 0.95).index_fill(1, torch.tensor([0]), 0.3).requires_grad_()
        tcm_pairs(scores, torch.ones(scores.shape, dtype=torch.bool)).loss.backward()
        assert scores.grad[0, 0] == -1
        assert not scores.grad[0, 1:].any()


def test_nothing_hard_is_zero_with_zero_gradient() -> None:
    scores = torch.tensor([[0.95, 0.1], [0.2, 0.91]], requires_grad=True)
    terms = tcm_pairs(scores, torch.eye(2, dtype=torch.bool))
    terms.loss.backward()
    assert terms.loss == terms.n_positive == terms.n_negative == 0
    assert not scores.grad.any()


def test_an_item_is_no_pair_of_itself() -> None:
    rows, _ = problem()
    assert tcm_loss(rows[:1], torch.zeros(1, dtype=torch.long), positive_margin=1.0).n_positive == 0


def test_half_precision_is_computed_in_float32() -> None:
    rows, labels = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss = tcm_loss(rows.detach().bfloat16(), labels).loss
    torch.testing.assert_close(loss, tcm_loss(rows.detach().bfloat16().double(), labels).loss.float())


def test_refusals() -> None:
    rows, labels = problem()
    with pytest.raises(InputError, match="give one label a row"):
        tcm_loss(rows, labels[:3])
    with pytest.raises(InputError, match=r"positive_margin is 1\.5"):
        tcm_loss(rows, labels, positive_margin=1.5)
    with pytest.raises(InputError, match="negative_weight is -1"):
        tcm_loss(rows, labels, negative_weight=-1.0)
    with pytest.raises(InputError, match=r"positives is torch\.float32"):
        tcm_pairs(torch.eye(3), torch.eye(3))
    with pytest.raises(InputError, match=r"exclude is torch\.bool"):
        tcm_pairs(torch.eye(3), torch.eye(3) > 0, exclude=torch.zeros(2, dtype=torch.bool))
