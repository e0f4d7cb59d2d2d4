"""Advantages, ratios and losses of policy gradients: against hand loops, and what the papers promise of them."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from generation.objectives import (
    gaussian_divergence,
    group_advantages,
    guarded_ratio,
    guarded_ratio_from_noise,
    kl_masked_loss,
    median_advantages,
    plain_ratio,
    policy_loss,
    scaled_clip_range,
    step_weights,
)
from generation.objectives.group_advantages import MAX_ADVANTAGE
from generation.stochastic_steps import StochasticStep, gaussian_log_prob, stochastic_steps, take_step
from mmalign.errors import InputError

GROUPS = [7, -2, 7, 7, -2, 40, -2, 40, 7, -2]  # mixed up, of unequal sizes
REWARDS = [0.3, 2.0, 0.9, 0.1, 2.5, -1.0, 0.5, 3.0, 0.6, 1.75]


def by_group(values: list[float]) -> dict[int, list[float]]:
    return {group: [v for v, own in zip(values, GROUPS, strict=True) if own == group] for group in GROUPS}


# -- advantages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", ["group", "global", "none"])
def test_group_advantages_by_hand(scale: Any, ddof: int) -> None:
    found = group_advantages(torch.tensor(REWARDS), torch.tensor(GROUPS), scale=scale, ddof=ddof, eps=0.01)
    deviation = statistics.stdev if ddof else statistics.pstdev
    members = by_group(REWARDS)
    for value, reward, group in zip(found.tolist(), REWARDS, GROUPS, strict=True):
        divisor = {"group": deviation(members[group]) + 0.01, "global": deviation(REWARDS) + 0.01, "none": 1.0}[scale]
        assert value == pytest.approx((reward - statistics.mean(members[group])) / divisor, rel=1e-5)
    assert found.dtype == torch.float32


def test_equal_rewards_have_no_advantage_at_all() -> None:
    """Not the rounding of their mean over DanceGRPO's 1e-8: samples of advantage 0 are left out of training."""
    for dtype in (torch.float32, torch.float64):
        rewards = torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7], dtype=dtype)
        groups = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2])
        for scale in ("group", "global", "none"):
            found = group_advantages(rewards, groups, scale=scale, ddof=1, eps=1e-8)  # type: ignore[arg-type]
            assert (found == 0).tolist() == (groups != 1).tolist()
            assert found.dtype == dtype
        medians, excluded = median_advantages(rewards, groups, rescale=True)
        assert (medians[groups != 1] == 0).all()
        assert excluded.sum() == 3


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("floor", [0.0, 2.0])
@pytest.mark.parametrize("scale", ["mad", "std", "none"])
def test_median_advantages_by_hand(scale: Any, floor: float, rescale: bool) -> None:
    found, excluded = median_advantages(
        torch.tensor(REWARDS), torch.tensor(GROUPS), scale=scale, eps=0.01, floor=floor, rescale=rescale
    )
    members = by_group(REWARDS)
    for value, reward, group in zip(found.tolist(), REWARDS, GROUPS, strict=True):
        own = members[group]
        median, std = statistics.median_low(own), statistics.pstdev(own)
        spread = {"mad": statistics.median_low([abs(r - median) for r in own]), "std": std}.get(scale, 0.0)
        divisor = 1.0 if scale == "none" else max(spread, floor * std) + 0.01
        factor = len(own) / sum(r != median for r in own) if rescale else 1.0
        assert value == pytest.approx(factor * (reward - median) / divisor, rel=1e-5)
    for group, own in members.items():
        out = [r for r, left, g in zip(REWARDS, excluded.tolist(), GROUPS, strict=True) if left and g == group]
        assert out == [statistics.median_low(own)]


def test_rewards_of_two_values_stay_within_the_clamp_and_a_floor_keeps_their_scale() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    groups = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1])
    found, excluded = median_advantages(rewards, groups)
    assert found.abs().max() == pytest.approx(1000)
    clamped = found.clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE)
    assert clamped.tolist() == [5, 0, 0, 0, 0, 0, 0, -5, 0]  # the minority alone
    assert excluded.sum() == 2 and not excluded[clamped != 0].any()  # noqa: PT018
    floored, _ = median_advantages(rewards, groups, floor=0.5)
    assert floored[0] == pytest.approx(1 / (0.5 * 0.4 + 1e-3))


@pytest.mark.parametrize("estimate", [group_advantages, median_advantages])
def test_a_group_of_one_and_unknown_scales_are_refused(estimate: Any) -> None:
    with pytest.raises(InputError, match=r"group 3 has one sample.*two or more"):
        estimate(torch.zeros(3), torch.tensor([1, 3, 1]))
    with pytest.raises(InputError, match="advantage scale is 'batch'; give one of"):
        estimate(torch.zeros(2), torch.tensor([1, 1]), scale="batch")


# -- ratios --------------------------------------------------------------------------------------------------------


def sd3_steps() -> list[StochasticStep]:
    """Of the card's grid, without the last step, which is never trained."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    return stochastic_steps(scheduler, "flow-sde", level=0.7)[:9]


def rollout(step: StochasticStep, *, n: int = 64, drift: float = 0.05, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)
    x, v, change, noise = (torch.randn(n, 4, 8, 8, generator=generator, dtype=dtype) for _ in range(4))
    old = take_step(step, x, v, noise)
    mean = step.mean(x, v + drift * change)
    return {
        "noise": noise, "mean": mean, "old_mean": old.mean, "sample": old.sample,
        "log_prob": gaussian_log_prob(old.sample, mean, step.std),
        "old_log_prob": gaussian_log_prob(old.sample, old.mean, step.std),
    }  # fmt: skip


def test_the_guarded_ratio_is_that_of_the_noise() -> None:
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        for step in sd3_steps():
            made = rollout(step, dtype=dtype)
            densities = {name: made[name] for name in ("log_prob", "old_log_prob")}
            ratio = guarded_ratio(made["mean"], made["old_mean"], step.std, **densities)
            by_noise = guarded_ratio_from_noise(made["mean"], made["old_mean"], made["noise"])
            by_hand = [
                math.exp(((mean - old) * z).mean().item())
                for mean, old, z in zip(made["mean"], made["old_mean"], made["noise"], strict=True)
            ]
            torch.testing.assert_close(by_noise, torch.tensor(by_hand, dtype=torch.float64), rtol=rtol, atol=0)
            torch.testing.assert_close(ratio, by_noise, rtol=rtol, atol=0)
            one_each = torch.full((len(ratio),), step.std, dtype=torch.float64)
            torch.testing.assert_close(guarded_ratio(made["mean"], made["old_mean"], one_each, **densities), ratio)


def test_the_plain_ratio_is_biased_below_one_and_the_guarded_one_is_not() -> None:
    for step in sd3_steps()[1:]:
        made = rollout(step, n=256, drift=0.5)
        plain = plain_ratio(made["log_prob"], made["old_log_prob"]).log()
        guarded = guarded_ratio_from_noise(made["mean"], made["old_mean"], made["noise"]).log()
        divergence = gaussian_divergence(made["mean"], made["old_mean"], step.std)
        standard_error = float(plain.std()) / math.sqrt(len(plain))
        assert float(plain.mean()) == pytest.approx(-float(divergence.mean()), abs=5 * standard_error)
        assert abs(float(guarded.mean())) < 5 * float(guarded.std()) / math.sqrt(len(guarded))


def test_an_unchanged_network_has_the_ratio_one_and_a_gradient() -> None:
    for step in sd3_steps():
        made = rollout(step, drift=0.0)
        mean = made["mean"].clone().requires_grad_()
        log_prob = gaussian_log_prob(made["sample"], mean, step.std)
        # What is old may be what is new itself: it takes no gradient.
        for ratio in (
            plain_ratio(log_prob, log_prob),
            guarded_ratio(mean, mean, step.std, log_prob=log_prob, old_log_prob=log_prob),
            guarded_ratio_from_noise(mean, mean, made["noise"]),
        ):
            assert (ratio == 1).all()
            (gradient,) = torch.autograd.grad(ratio.sum(), mean, retain_graph=True)
            assert torch.nn.functional.cosine_similarity(gradient.ravel(), made["noise"].ravel(), dim=0) > 0.999


def gradient_norms(ratio_kind: str, weights: list[float]) -> list[float]:
    """Of the loss with respect to the output of a linear network v = W x, on its own rollout, at each step."""
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(8, 4, 4, 4, generator=generator) for _ in range(2))
    mix = torch.randn(4, 4, generator=generator) / 2
    norms = []
    for step, weight in zip(sd3_steps(), weights, strict=True):
        v = torch.einsum("ij,njhw->nihw", mix, x).requires_grad_()
        old = take_step(step, x, v.detach(), noise)
        mean = step.mean(x, v)
        if ratio_kind == "plain":
            densities = [gaussian_log_prob(old.sample, other, step.std) for other in (mean, old.mean)]
            ratio = plain_ratio(*densities)
        else:
            ratio = guarded_ratio_from_noise(mean, old.mean, noise)
        losses = policy_loss(ratio, torch.ones(len(x)), clip=0.1, weight=weight).losses
        (gradient,) = torch.autograd.grad(losses.sum(), v)
        norms.append(float(gradient.norm() / noise.norm() * noise[0].numel()))
    return norms


def test_guard_gives_every_step_the_same_gradient_and_flow_grpo_does_not() -> None:
    steps = sd3_steps()
    ones = [1.0] * len(steps)
    plain = gradient_norms("plain", ones)
    assert plain == pytest.approx([0.057, 0.078, 0.129, 0.188, 0.264, 0.371, 0.536, 0.825, 1.49], rel=0.01)
    assert max(plain) / min(plain) > 20
    guard = gradient_norms("guarded", step_weights(steps, "guard", normalize=False))
    # 1 + a^2 / 2, but 1 at sigma = 1, where the square root takes the second sigma.
    assert guard == pytest.approx([1.0] + [1 + 0.7**2 / 2] * 8, rel=1e-4)
    assert max(guard[1:]) / min(guard[1:]) < 1.05
    unweighted = gradient_norms("guarded", ones)
    tempflow = gradient_norms("plain", step_weights(steps, "std", normalize=False))
    for norms in (unweighted, tempflow):
        assert max(norms) / min(norms) == pytest.approx(8.4, rel=0.01)
    assert tempflow == pytest.approx(unweighted, rel=1e-4)


# -- losses --------------------------------------------------------------------------------------------------------


def test_the_clipped_loss_by_hand() -> None:
    ratios = [0.7, 0.9, 0.999, 1.0, 1.05, 1.1001, 1.4] * 3
    advantages = [2.0] * 7 + [-3.0] * 7 + [0.0] * 7
    low, high = 0.2, 0.1
    ratio = torch.tensor(ratios, dtype=torch.float64, requires_grad=True)
    terms = policy_loss(ratio, torch.tensor(advantages), clip=(low, high), weight=3.0)
    terms.losses.sum().backward()
    assert ratio.grad is not None
    rows = zip(ratios, advantages, *(values.tolist() for values in (*terms, ratio.grad)), strict=True)
    for r, a, loss, above, below, gradient in rows:
        assert loss == pytest.approx(3 * max(-a * r, -a * min(max(r, 1 - low), 1 + high)))
        assert above == (a > 0 and r > 1 + high)
        assert below == (a < 0 and r < 1 - low)
        assert gradient == pytest.approx(0.0 if above or below else -3 * a)
    alike = policy_loss(ratio, torch.tensor(advantages), clip=0.1)
    torch.testing.assert_close(alike.losses, policy_loss(ratio, torch.tensor(advantages), clip=(0.1, 0.1)).losses)
    weights = torch.arange(21.0, dtype=torch.float64)
    each = policy_loss(ratio, torch.tensor(advantages), clip=0.1, weight=weights)
    torch.testing.assert_close(each.losses, weights * alike.losses)


def test_clip_ranges_of_a_millionth_are_told_apart() -> None:
    """In float32 1 + 2e-6 has an error of 6 % of the range."""
    step = sd3_steps()[3]
    made = rollout(step, drift=1e-3)
    ratio = guarded_ratio_from_noise(made["mean"], made["old_mean"], made["noise"])
    exact = ((made["mean"].double() - made["old_mean"].double()) * made["noise"].double()).flatten(1).mean(1).exp()
    assert ratio.dtype == torch.float64
    assert float((ratio - exact).abs().max()) < 1e-9
    terms = policy_loss(ratio, torch.ones(len(ratio)), clip=2e-6)
    assert 0 < terms.clipped_high.sum() < len(ratio)


def test_the_mask_by_hand() -> None:
    ratios, advantages = [0.9, 1.1] * 4, [1.0, 1.0, -1.0, -1.0] * 2
    divergence = [1e-5] * 4 + [0.9e-5] * 4
    ratio = torch.tensor(ratios, dtype=torch.float64, requires_grad=True)
    losses = kl_masked_loss(
        ratio, torch.tensor(advantages), torch.tensor(divergence, dtype=torch.float64), threshold=1e-5, weight=2.0
    )
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([-1.8, 0.0, 0.0, 2.2, -1.8, -2.2, 1.8, 2.2])
    assert ratio.grad is not None
    assert ratio.grad.tolist() == pytest.approx([-2.0, 0.0, 0.0, 2.0, -2.0, -2.0, 2.0, 2.0])


def test_the_divergence_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(2)
    mean, reference = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(2))
    for std in (0.3, torch.tensor([0.1, 1.0, 3.0])):
        spread = torch.as_tensor(std).reshape(-1, 1, 1, 1).expand_as(mean)
        first, second = (torch.distributions.Normal(center, spread) for center in (mean, reference))
        wanted = torch.distributions.kl_divergence(first, second).flatten(1).mean(1)
        found = gaussian_divergence(mean, reference, std)
        torch.testing.assert_close(found.float(), wanted, rtol=1e-5, atol=1e-7)
    both = mean.clone().requires_grad_(), reference.clone().requires_grad_()
    gaussian_divergence(*both, 0.3).sum().backward()
    assert both[0].grad is not None
    assert both[1].grad is None


def test_clip_ranges_follow_the_size_of_the_latents() -> None:
    assert scaled_clip_range(2e-6, 4 * 64 * 64) == pytest.approx(4e-6)  # SDXL at 512 px
    assert scaled_clip_range(2e-6, 16 * 128 * 128) == pytest.approx(1e-6)  # SD3 at 1024 px
    assert scaled_clip_range(1e-4, 100, at=25) == pytest.approx(5e-5)
    # The spread of a log-ratio, for means that moved alike.
    spreads: list[Tensor] = []
    for size in (8, 32):
        generator = torch.Generator().manual_seed(3)
        moved, noise = (torch.randn(400, 4, size, size, generator=generator) for _ in range(2))
        spreads.append(guarded_ratio_from_noise(1e-2 * moved, torch.zeros_like(moved), noise).log().std())
    assert float(spreads[0] / spreads[1]) == pytest.approx(
        scaled_clip_range(1, 4 * 8**2) / scaled_clip_range(1, 4 * 32**2), rel=0.15
    )


def test_step_weights() -> None:
    steps = sd3_steps()
    assert step_weights(steps, "none", normalize=False) == step_weights(steps, "none", normalize=True) == [1.0] * 9
    guard = step_weights(steps, "guard", normalize=False)
    assert (min(guard), max(guard)) == pytest.approx((3.7, 25), rel=0.02)
    std = step_weights(steps, "std", normalize=False)
    assert std == [step.std for step in steps]
    for kind, raw in (("guard", guard), ("std", std)):
        even = step_weights(steps, kind, normalize=True)  # type: ignore[arg-type]
        assert statistics.mean(even) == pytest.approx(1)
        assert [a / b for a, b in zip(even, raw, strict=True)] == pytest.approx([9 / sum(raw)] * 9)
    still = [StochasticStep(1.0, -0.1, 0.0, 10.0, 0.0)]
    with pytest.raises(InputError, match="step weights 'std' are all 0; give stochastic steps"):
        step_weights(still, "std", normalize=True)
    with pytest.raises(InputError, match="step weight is 'snr'"):
        step_weights(steps, "snr", normalize=False)  # type: ignore[arg-type]
