"""The losses against their formulas in exact arithmetic, and what the papers say of them."""

from __future__ import annotations

import decimal
import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from generation.objectives import (
    denoising_errors,
    denoising_loss,
    diffusion_dpo_loss,
    mapo_loss,
    mapo_score,
    min_snr_weights,
    reward_weighted_loss,
)

# exp(x) - 1 - x exp(x) at x = 1e-300 needs 600 digits before its first one.
EXACT = decimal.Context(prec=660, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN)
HARD = [0.0, 1e-300, 1e-30, 1e-12, 1e-6, 1e-3, 0.01, 0.05, 0.1, 0.19999, 0.2, 0.20001, 0.5, 1, 3, 10, 100, 1e4, 1e6]


def score(x: Decimal) -> Decimal:
    return Decimal(1) if x == 0 else x / (x.exp(EXACT) - 1)


def slope(x: Decimal) -> Decimal:
    if x == 0:
        return Decimal("-0.5")
    grown = x.exp(EXACT)
    return (grown - 1 - x * grown) / (grown - 1) ** 2


def exact_mapo(roots: list[tuple[float, float]], beta: float, s: float, steps: int) -> tuple[float, list[float]]:
    """Loss, and its gradient by each of `roots`: winners' then losers', whose squares are the errors."""
    with decimal.localcontext(EXACT):
        total, by_winner, by_loser = Decimal(0), [], []
        for root_w, root_l in roots:
            m_w, m_l = Decimal(root_w) ** 2, Decimal(root_l) ** 2
            z = steps * (score(Decimal(s) * m_w) - score(Decimal(s) * m_l))
            total += m_w + Decimal(beta) * (1 + (-z).exp()).ln()
            push = Decimal(beta) * steps * Decimal(s) / (1 + z.exp())
            by_winner.append((1 + push * abs(slope(Decimal(s) * m_w))) * 2 * Decimal(root_w) / len(roots))
            by_loser.append(-push * abs(slope(Decimal(s) * m_l)) * 2 * Decimal(root_l) / len(roots))
        return float(total / len(roots)), [float(value) for value in by_winner + by_loser]


def stacked(roots: list[tuple[float, float]]) -> Tensor:
    """Predictions of a zero target with the errors root^2: winners, then losers."""
    values = [w for w, _ in roots] + [loser for _, loser in roots]
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1).requires_grad_()


def check_against_exact(pairs: list[tuple[float, float]], beta: float, s: float, steps: int) -> None:
    roots = [(math.sqrt(w), math.sqrt(loser)) for w, loser in pairs]
    pred = stacked(roots)
    terms = mapo_loss(pred, torch.zeros_like(pred), beta=beta, snr_value=s, num_train_timesteps=steps)
    terms.loss.backward()
    loss, gradient = exact_mapo(roots, beta, s, steps)
    assert terms.loss.item() == pytest.approx(loss, rel=1e-11, abs=1e-10)
    assert pred.grad is not None
    assert pred.grad.flatten().tolist() == pytest.approx(gradient, rel=1e-9, abs=1e-10)


def test_mapo_equals_its_formula_at_every_pair_of_hard_errors() -> None:
    check_against_exact([(w, loser) for w in HARD for loser in HARD[::3]], 0.1, 0.5, 1000)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(-300, 6).map(lambda power: 10.0**power)] * 2), min_size=1, max_size=3),
    st.floats(0, 10),
    st.floats(0.01, 5),
    st.sampled_from([1, 50, 1000]),
)
def test_mapo_equals_its_formula(pairs: list[tuple[float, float]], beta: float, s: float, steps: int) -> None:
    check_against_exact(pairs, beta, s, steps)


def test_score_and_slope_are_smooth_over_the_seam() -> None:
    points = torch.tensor([1e-3, 0.05, 0.0999999, 0.1, 0.1000001, 0.15, 1.0, 30.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(mapo_score, points.requires_grad_(), atol=1e-8)
    around = torch.nextafter(torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64))
    around.requires_grad_()
    values = mapo_score(around)
    values.sum().backward()
    assert abs(values[0] - values[1]) < 4e-16
    assert around.grad is not None
    assert abs(around.grad[0] - around.grad[1]) < 1e-14


def test_score_falls_from_one_to_zero() -> None:
    x = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-8, 3, 500, dtype=torch.float64)])
    values = mapo_score(x)
    assert values[0] == 1
    assert values[-1] == pytest.approx(0, abs=1e-300)
    assert (values.diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mapo_is_finite_without_error_and_with_infinite_looking_error(dtype: torch.dtype) -> None:
    pred = torch.tensor([0.0, 0.0, 1e9, 1e-20, 1e9, 0.0, 0.0, 1e-20], dtype=dtype).view(8, 1, 1, 1).requires_grad_()
    terms = mapo_loss(pred, torch.zeros_like(pred))
    terms.loss.backward()
    assert all(torch.isfinite(value).all() for value in (*terms, pred.grad))


def test_swapping_a_mapo_pair_denoises_the_other_and_negates_z() -> None:
    generator = torch.Generator().manual_seed(1)
    pred, target = (torch.randn(6, 4, 3, 3, dtype=torch.float64, generator=generator) * 0.1 for _ in range(2))
    terms, swapped = mapo_loss(pred, target), mapo_loss(pred.roll(3, 0), target.roll(3, 0))
    torch.testing.assert_close(swapped.z, -terms.z)
    torch.testing.assert_close((swapped.mse_w, swapped.mse_l), (terms.mse_l, terms.mse_w))
    expected = [float(m) + 0.1 * math.log1p(math.exp(float(z))) for m, z in zip(terms.mse_l, terms.z, strict=True)]
    assert swapped.loss.item() == pytest.approx(sum(expected) / 3)


def test_small_errors_make_mapo_a_margin_of_250() -> None:
    roots = [(0.01, 0.012), (0.003, 0.001), (0.02, 0.02)]
    z = mapo_loss(stacked(roots), torch.zeros(6, 1, 1, 1, dtype=torch.float64)).z
    assert z.tolist() == pytest.approx([250 * (loser**2 - w**2) for w, loser in roots], rel=1e-3, abs=1e-12)


def test_mapo_without_margin_is_denoising_of_winners() -> None:
    generator = torch.Generator().manual_seed(2)
    pred, target = (torch.randn(6, 4, 3, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    pred.requires_grad_()
    (of_mapo,) = torch.autograd.grad(mapo_loss(pred, target, beta=0.0).loss, pred)
    (of_denoising,) = torch.autograd.grad(torch.nn.functional.mse_loss(pred[:3], target[:3]), pred)
    torch.testing.assert_close(of_mapo, of_denoising)
    assert mapo_loss(pred, target, beta=0.0).loss.item() == pytest.approx(denoising_loss(pred[:3], target[:3]).item())


def test_denoising_weights_leave_the_margin_alone() -> None:
    roots = [(0.5, 0.6), (0.4, 0.1)]
    pred, zero = stacked(roots), torch.zeros(4, 1, 1, 1, dtype=torch.float64)
    plain = mapo_loss(pred, zero)
    weighted = mapo_loss(pred, zero, denoising_weights=torch.tensor([3.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(weighted.ratio_losses, plain.ratio_losses)
    assert (weighted.loss - plain.loss).item() == pytest.approx((2 * 0.25 - 0.5 * 0.16) / 2)


def test_dpo_of_the_reference_itself_is_log_2() -> None:
    pred, target = torch.randn(2, 6, 4, 3, 3, generator=torch.Generator().manual_seed(3))
    terms = diffusion_dpo_loss(pred, pred.clone(), target)
    assert terms.loss.item() == pytest.approx(math.log(2))
    assert terms.z.tolist() == [0, 0, 0]
    assert (terms.ranked_right().mean().item(), terms.ranked_right(ties=0.0).mean().item()) == (0.5, 0)


def test_dpo_measures_both_gaps_by_half_of_beta() -> None:
    target = torch.zeros(4, 1, 1, 1, dtype=torch.float64)
    pred, ref = stacked([(0.5, 0.7), (0.2, 0.1)]), stacked([(0.6, 0.5), (0.3, 0.3)])
    terms = diffusion_dpo_loss(pred, ref, target, beta=20.0)
    expected = [-10 * ((0.25 - 0.49) - (0.36 - 0.25)), -10 * ((0.04 - 0.01) - 0)]
    assert terms.z.tolist() == pytest.approx(expected)
    assert terms.loss.item() == pytest.approx(sum(math.log1p(math.exp(-z)) for z in expected) / 2)
    assert terms.ranked_right().mean().item() == 0.5


def test_swapping_a_dpo_pair_negates_z() -> None:
    generator = torch.Generator().manual_seed(4)
    pred, ref, target = torch.randn(3, 6, 4, 3, 3, dtype=torch.float64, generator=generator)
    terms = diffusion_dpo_loss(pred, ref, target, beta=3.0)
    swapped = diffusion_dpo_loss(*(tensor.roll(3, 0) for tensor in (pred, ref, target)), beta=3.0)
    torch.testing.assert_close(swapped.z, -terms.z)
    assert swapped.loss.item() == pytest.approx(sum(math.log1p(math.exp(float(z))) for z in terms.z) / 3)


def test_dpo_pulls_winners_down_and_never_moves_the_reference() -> None:
    generator = torch.Generator().manual_seed(5)
    pred, ref = (torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    target = torch.zeros_like(pred)
    diffusion_dpo_loss(pred, ref, target, beta=2.0).loss.backward()
    assert ref.grad is None
    assert pred.grad is not None
    along = (pred.grad * pred).flatten(1).sum(1)  # towards a larger error
    assert (along[:2] > 0).all()
    assert (along[2:] < 0).all()


def test_errors_are_means_of_each_image() -> None:
    pred, target = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(6))
    expected = [torch.nn.functional.mse_loss(a, b).item() for a, b in zip(pred, target, strict=True)]
    assert denoising_errors(pred, target).tolist() == pytest.approx(expected)
    weighted = denoising_loss(pred, target, torch.tensor([1.0, 0.0, 2.0])).item()
    assert weighted == pytest.approx((expected[0] + 2 * expected[2]) / 3)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_never_computed_in_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    pred, ref, target = (torch.randn(3, 4, 4, 16, 16, generator=torch.Generator().manual_seed(7)) * 0.2).to(dtype)
    exact = (pred.double() - target.double()).square().flatten(1).mean(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        every = {
            "mapo": mapo_loss(pred, target),
            "dpo": diffusion_dpo_loss(pred, ref, target),
            "rwl": reward_weighted_loss(pred, target, torch.ones(4), ref, target),
        }
        errors, plain = denoising_errors(pred, target), denoising_loss(pred, target)
    for terms in every.values():
        assert all(value.dtype in (torch.float32, torch.float64) for value in terms)
    assert plain.dtype == torch.float32
    assert plain.item() == pytest.approx(exact.mean().item(), rel=1e-6)
    torch.testing.assert_close(errors.double(), exact, rtol=1e-6, atol=0)
    expected_z = 1000 * (mapo_score(exact[:2] / 2) - mapo_score(exact[2:] / 2))
    torch.testing.assert_close(every["mapo"].z, expected_z, rtol=1e-4, atol=1e-4)


def test_min_snr_is_one_loss_however_the_model_predicts() -> None:
    """arXiv 2303.09556, 3.4: weight min(SNR, gamma) on the clean image's error, and what that is for the others."""
    generator = torch.Generator().manual_seed(8)
    clean, noise, noise_pred = torch.randn(3, 20, 4, 3, 3, dtype=torch.float64, generator=generator)
    kept = torch.linspace(0.005, 0.995, 20, dtype=torch.float64)
    a, b = kept.sqrt().view(-1, 1, 1, 1), (1 - kept).sqrt().view(-1, 1, 1, 1)
    clean_pred = (a * clean + b * noise - b * noise_pred) / a
    snr = kept / (1 - kept)
    gamma = 5.0
    expected = torch.minimum(snr, torch.tensor(gamma)) * (clean - clean_pred).square().flatten(1).mean(1)
    of_noise = min_snr_weights(snr, gamma) * denoising_errors(noise_pred, noise)
    velocity, velocity_pred = a * noise - b * clean, a * noise_pred - b * clean_pred
    of_velocity = min_snr_weights(snr, gamma, v_prediction=True) * denoising_errors(velocity_pred, velocity)
    torch.testing.assert_close(of_noise, expected)
    torch.testing.assert_close(of_velocity, expected)
    assert snr.min() < gamma < snr.max()


def test_rewards_weigh_images_and_beta_the_others() -> None:
    pred, target, other, other_target = torch.randn(4, 3, 4, 3, 3, generator=torch.Generator().manual_seed(9))
    pred.requires_grad_()
    reward = torch.tensor([0.0, 1.0, 0.25])
    terms = reward_weighted_loss(pred, target, reward, other, other_target, beta=2.0)
    terms.loss.backward()
    m = [torch.nn.functional.mse_loss(a, b).item() for a, b in zip(pred, target, strict=True)]
    expected = (m[1] + 0.25 * m[2]) / 3 + 2 * torch.nn.functional.mse_loss(other, other_target).item()
    assert terms.loss.item() == pytest.approx(expected)
    assert pred.grad is not None
    assert not pred.grad[0].any()
    assert pred.grad[1].any()
    alone = reward_weighted_loss(pred, target, torch.ones(3))
    assert alone.mse_pretrain is None
    assert alone.loss.item() == pytest.approx(sum(m) / 3)
