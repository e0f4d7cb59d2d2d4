"""STRUCTURE against a hand loop, plain autograd and the properties that the card states."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign import structure
from mmalign.contrastive import clip_loss
from mmalign.errors import InputError
from mmalign.structure import (
    mean_self_probability,
    structure_loss,
    structure_objective,
    structure_weight,
    walk_probabilities,
)


def clustered(
    n: int, d: int = 12, e: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Features around four centres and a linear image of them with noise."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, d, generator=random, dtype=dtype)
    original = centres[torch.arange(n) % 4] + 0.5 * torch.randn(n, d, generator=random, dtype=dtype)
    aligned = original @ torch.randn(d, e, generator=random, dtype=dtype)
    return original, aligned + torch.randn(n, e, generator=random, dtype=dtype)


def walk_by_hand(rows: list[list[float]], temperature: float) -> list[list[float]]:
    norms = [math.sqrt(sum(v * v for v in row)) for row in rows]
    unit = [[v / norm for v in row] for row, norm in zip(rows, norms, strict=True)]
    mean = [sum(column) / len(unit) for column in zip(*unit, strict=True)]
    z = [[v - m for v, m in zip(row, mean, strict=True)] for row in unit]
    out = []
    for a in z:
        weights = [math.exp(sum(x * y for x, y in zip(a, b, strict=True)) / temperature) for b in z]
        out.append([w / sum(weights) for w in weights])
    return out


def loss_by_hand(original: list, aligned: list, temperature: float, levels: int, divergence: str) -> float:
    eps, n = 1e-12, len(original)
    steps = [walk_by_hand(rows, temperature) for rows in (original, aligned)]
    walks, total = steps, 0.0
    for level in range(1, levels + 1):
        if level > 1:
            walks = [
                [[sum(w[i][k] * s[k][j] for k in range(n)) for j in range(n)] for i in range(n)]
                for w, s in zip(walks, steps, strict=True)
            ]
        distance = 0.0
        for i in range(n):
            for j in range(n):
                p, q = walks[0][i][j], walks[1][i][j]
                m = (p + q) / 2
                if divergence == "reverse":
                    distance += (m + eps) * (math.log(m + eps) - math.log(q + eps)) / 2
                    distance += (m + eps) * (math.log(m + eps) - math.log(p + eps)) / 2
                else:
                    distance += q * (math.log(q + eps) - math.log(m + eps)) / 2
                    distance += p * (math.log(p + eps) - math.log(m + eps)) / 2
        total += distance / n / level
    return total / levels


@pytest.mark.parametrize("divergence", ["reverse", "js"])
@pytest.mark.parametrize("levels", [1, 3])
def test_hand_loop_on_five_rows(divergence: str, levels: int) -> None:
    original, aligned = clustered(5, d=3, e=2)
    options: dict[str, Any] = {"temperature": 0.3, "levels": levels, "divergence": divergence}
    expected = loss_by_hand(original.tolist(), aligned.tolist(), **options)
    assert structure_loss(original, aligned, **options).item() == pytest.approx(expected, rel=1e-12)
    by_hand = torch.tensor(walk_by_hand(original.tolist(), 0.3), dtype=torch.float64)
    torch.testing.assert_close(walk_probabilities(original, temperature=0.3), by_hand)


@pytest.mark.parametrize("divergence", ["reverse", "js"])
def test_rows_taken_in_blocks_give_plain_autograd(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient as autograd finds them from the definition, however the rows are divided."""
    original, aligned = clustered(50)
    aligned.requires_grad_()

    def probabilities(rows: Tensor) -> Tensor:
        unit = rows / rows.norm(dim=1, keepdim=True)
        unit = unit - unit.mean(0)
        return torch.softmax(unit @ unit.T / 0.1, dim=1)

    p, q = probabilities(original) + 1e-12, probabilities(aligned) + 1e-12
    m = (p + q) / 2
    if divergence == "reverse":
        expected = (m * (2 * m.log() - p.log() - q.log())).sum() / 100
    else:
        expected = ((p - 1e-12) * (p / m).log() + (q - 1e-12) * (q / m).log()).sum() / 100
    (wanted,) = torch.autograd.grad(expected, aligned)
    for entries in (1, 50 * 8, 2**20):
        monkeypatch.setattr(structure, "CACHED_ENTRIES", entries)
        loss = structure_loss(original, aligned, temperature=0.1, divergence=divergence)
        (gradient,) = torch.autograd.grad(loss, aligned)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"divergence": "js"},
        {"levels": 3, "weighting": "none"},
        {"similarity": "rbf", "gamma": 3.0},
        {"centering": "standard", "temperature": 1.0},
        {"centering": "none", "margin": 0.01},
        {"center_first": True},
    ],
    ids=str,
)
def test_gradcheck(options: dict[str, Any]) -> None:
    original, aligned = clustered(7, d=5, e=3)
    options = {"temperature": 0.2} | options
    assert torch.autograd.gradcheck(lambda z: structure_loss(original, z, **options), aligned.requires_grad_())


def test_gradient_goes_to_the_aligned_side_only() -> None:
    original, aligned = (rows.requires_grad_() for rows in clustered(9))
    kept = walk_probabilities(original)
    structure_loss(original, aligned).backward()
    expected = aligned.grad.clone()
    aligned.grad = None
    structure_loss(None, aligned, original_probabilities=kept).backward()
    assert original.grad is None
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(aligned.grad, expected, rtol=0, atol=0)


def test_rotation_and_scale_change_nothing_and_translation_does() -> None:
    original, aligned = clustered(30)
    random = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=random, dtype=aligned.dtype))[0]
    factors = torch.rand(30, 1, generator=random, dtype=aligned.dtype) + 0.1
    expected = structure_loss(original, aligned)
    assert expected > 1e-3
    torch.testing.assert_close(structure_loss(original, aligned @ rotation), expected)
    torch.testing.assert_close(structure_loss(original, aligned * factors), expected)
    torch.testing.assert_close(structure_loss(original * 7, aligned), expected)
    assert (structure_loss(original, aligned + 3) - expected).abs() > 1e-3

    first = structure_loss(original, aligned, center_first=True)
    torch.testing.assert_close(structure_loss(original, aligned + 3, center_first=True), first)
    assert (structure_loss(original, aligned * factors, center_first=True) - first).abs() > 1e-6


@pytest.mark.parametrize("divergence", ["reverse", "js"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_lost_is_zero(divergence: str, dtype: torch.dtype) -> None:
    original, _ = clustered(20, dtype=dtype)
    aligned = original.clone().requires_grad_()
    loss = structure_loss(original, aligned, levels=2, divergence=divergence)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert aligned.grad.abs().max() < 1e-7


def test_js_is_bounded_and_reverse_is_not() -> None:
    """Opposite neighbourhoods at a temperature where P is nearly a permutation."""
    original = torch.tensor([[1.0, 0.0], [1.0, 0.01], [-1.0, 0.0], [-1.0, 0.01]])
    aligned = original[[0, 2, 1, 3]]
    js = structure_loss(original, aligned, temperature=0.005, divergence="js")
    assert 0 < js <= math.log(2)
    assert structure_loss(original, aligned, temperature=0.005) > math.log(2)


def test_the_two_divergences_agree_near_the_optimum_and_float32_keeps_its_digits() -> None:
    original, _ = clustered(40)
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    near = original + 1e-3 * noise
    reverse, js = (structure_loss(original, near, divergence=name).item() for name in ("reverse", "js"))
    assert reverse == pytest.approx(js, rel=0.02)
    assert structure_loss(original.float(), near.float()).item() == pytest.approx(reverse, rel=0.02)


def test_margin_and_weighting() -> None:
    original, aligned = clustered(16)
    level = [structure_loss(original, aligned, levels=n, weighting="none").item() * n for n in (1, 2)]
    first, second = level[0], level[1] - level[0]
    inverse = structure_loss(original, aligned, levels=2).item()
    assert inverse == pytest.approx((first + second / 2) / 2)
    assert structure_loss(original, aligned, margin=first / 2).item() == pytest.approx(first / 2)
    assert structure_loss(original, aligned, margin=first * 2).item() == 0


def test_half_precision_and_autocast_are_computed_in_float32() -> None:
    original, aligned = clustered(16, dtype=torch.float32)
    half = aligned.bfloat16().requires_grad_()
    expected = structure_loss(original, half.float())
    with torch.autocast("cpu", torch.bfloat16):
        loss = structure_loss(original, half)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    loss.backward()
    assert half.grad.dtype == torch.bfloat16
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("divergence", ["reverse", "js"])
def test_finite_where_probabilities_vanish(divergence: str) -> None:
    original, aligned = clustered(20, dtype=torch.float32)
    aligned[3] = 0
    aligned.requires_grad_()
    loss = structure_loss(original, aligned, temperature=1e-3, divergence=divergence)
    loss.backward()
    assert loss.isfinite()
    assert aligned.grad.isfinite().all()


def test_mean_self_probability() -> None:
    rows, _ = clustered(64, d=512)
    assert mean_self_probability(torch.eye(3)) == 1
    assert mean_self_probability(walk_probabilities(rows, temperature=1e6)).item() == pytest.approx(1 / 64, rel=1e-3)
    assert mean_self_probability(walk_probabilities(rows, temperature=0.001)) > 0.99


def test_weight_schedule() -> None:
    assert [structure_weight(step, 8.0, 4) for step in (0, 1, 3, 4, 100)] == [0, 2, 6, 8, 8]
    assert structure_weight(0, 8.0, 0) == 8


def sides(n: int = 12) -> dict[str, Tensor]:
    (x, image), (y, text) = clustered(n, seed=1), clustered(n, d=9, seed=2)
    return {"image_original": x, "image_aligned": image, "text_original": y, "text_aligned": text}


def test_objective_is_its_parts() -> None:
    rows, more = sides(), sides(5)
    pairs = [(rows[f"{side}_original"], rows[f"{side}_aligned"]) for side in ("image", "text")]
    extra = [(more[f"{side}_original"], more[f"{side}_aligned"]) for side in ("image", "text")]
    clip = clip_loss(rows["image_aligned"], rows["text_aligned"], 1 / 0.2)
    both = [(torch.cat([x, u]), torch.cat([z, v])) for (x, z), (u, v) in zip(pairs, extra, strict=True)]
    for options, used in (
        ({}, pairs),
        ({"unpaired_text": extra[1]}, [pairs[0], both[1]]),
        ({"unpaired_text": extra[1], "unpaired_image": extra[0]}, both),
        ({"unpaired_text": extra[1], "unpaired_only": True}, [pairs[0], extra[1]]),
    ):
        terms = structure_objective(**rows, step=50, warmup_steps=100, temperature=0.2, levels=2, **options)
        mean = sum(structure_loss(x, z, temperature=0.2, levels=2) for x, z in used) / 2
        assert terms.weight == 5
        torch.testing.assert_close(terms.structure, mean)
        torch.testing.assert_close(terms.clip, clip)
        torch.testing.assert_close(terms.loss, clip + 5 * mean)
    skipped = structure_objective(**rows, step=0, temperature=0.2)
    assert skipped.loss == skipped.clip == clip
    assert skipped.structure.isnan()
    assert skipped.weight == 0


def test_heads_learn_with_the_structure_term() -> None:
    """A few steps of gradient descent lower R_S of a head that scrambles its features."""
    original, _ = clustered(40)
    head = torch.randn(12, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    before = structure_loss(original, original @ head).item()
    for _ in range(30):
        (gradient,) = torch.autograd.grad(structure_loss(original, original @ head), head)
        head = (head - 20 * gradient).detach().requires_grad_()
    assert structure_loss(original, original @ head).item() < before / 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"similarity": "spearman"}, "no gradient"),
        ({"similarity": "dot"}, "cosine, rbf"),
        ({"centering": "median"}, "centering is 'median'"),
        ({"weighting": "linear"}, "inverse, none"),
        ({"divergence": "kl"}, "reverse, js"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"gamma": -1.0}, "gamma is -1"),
        ({"levels": 0}, "levels is 0"),
        ({"margin": -1.0}, "margin is -1"),
        ({"eps": 0.0}, "eps is 0"),
        ({"original_probabilities": torch.eye(3)}, "3 rows, aligned 8"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, Any], says: str) -> None:
    original, aligned = clustered(8)
    with pytest.raises(InputError, match=says):
        structure_loss(original, aligned, **options)


def test_refusals_of_rows_and_steps() -> None:
    original, aligned = clustered(8)
    with pytest.raises(InputError, match="original has 7 rows, aligned 8"):
        structure_loss(original[:7], aligned)
    with pytest.raises(InputError, match="original is None"):
        structure_loss(None, aligned)
    with pytest.raises(InputError, match="two for centering"):
        walk_probabilities(aligned[:1], centering="standard")
    with pytest.raises(InputError, match="step is -1"):
        structure_weight(-1)
    with pytest.raises(InputError, match="unpaired_only is True"):
        structure_objective(**sides(), step=1, unpaired_only=True)
    with pytest.raises(InputError, match="temperature is 0"):
        structure_objective(**sides(), step=1, temperature=0)
