"""Sampling steps with a density: against diffusers' own steps, exact denoisers and the moments of what they draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor
from torch.distributions import Normal

from generation.stochastic_steps import (
    StochasticStep,
    constant_free_log_prob,
    flow_sde_step,
    gaussian_log_prob,
    stochastic_steps,
    take_step,
)
from mmalign.errors import InputError

FLOWS = ("flow-sde", "dance-sde", "cps")
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def flow(steps: int, **config: Any) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})
    scheduler.set_timesteps(steps)
    return scheduler


def ddim(steps: int, **config: Any) -> DDIMScheduler:
    known = {**STABLE_DIFFUSION, "set_alpha_to_one": False, "steps_offset": 1, **config}
    scheduler = DDIMScheduler(**known)
    scheduler.set_timesteps(steps)
    return scheduler


def latents(*, seed: int, n: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, 4, 6, 6, generator=generator) for _ in range(3))  # type: ignore[return-value]


# -- against diffusers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"set_alpha_to_one": True},
        {"steps_offset": 0},
        {"steps_offset": 0, "set_alpha_to_one": True},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace"},
        {"beta_schedule": "linear", "num_train_timesteps": 500},
    ],
)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_diffusers_own_step_with_the_same_noise(prediction_type: str, config: dict, eta: float) -> None:
    scheduler = ddim(7, prediction_type=prediction_type, **config)
    steps = stochastic_steps(scheduler, "ddim", level=eta)
    assert len(steps) == 7
    for number, (step, time) in enumerate(zip(steps, scheduler.timesteps, strict=True)):
        x, output, noise = latents(seed=number)
        wanted = scheduler.step(output, time, x, eta=eta, variance_noise=noise).prev_sample
        taken = take_step(step, x, output, noise)
        torch.testing.assert_close(taken.sample, wanted, rtol=1e-4, atol=1e-4)  # diffusers computes in float32
        assert taken.std == step.std
        torch.testing.assert_close(taken.sample, taken.mean + step.std * noise)
    assert all(step.std > 0 for step in steps[:-1]) or eta == 0


def test_a_schedule_that_ends_in_noise_alone_works_with_v_prediction_only() -> None:
    scheduler = ddim(5, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    x, output, noise = latents(seed=0)
    step = stochastic_steps(scheduler, "ddim", level=1.0)[0]
    wanted = scheduler.step(output, scheduler.timesteps[0], x, eta=1.0, variance_noise=noise).prev_sample
    torch.testing.assert_close(take_step(step, x, output, noise).sample, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="rescale_betas_zero_snr"):
        stochastic_steps(ddim(5, rescale_betas_zero_snr=True, timestep_spacing="trailing"), "ddim", level=1.0)


@pytest.mark.parametrize("kind", FLOWS)
def test_flows_without_noise_are_eulers_step(kind: Any) -> None:
    steps, scheduler = stochastic_steps(flow(10), kind, level=0.0), flow(10)
    x, output, noise = latents(seed=1)
    ours = theirs = x
    for step, time in zip(steps, scheduler.timesteps, strict=True):
        ours = take_step(step, ours, output, noise).sample
        theirs = scheduler.step(output, time, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert [step.std for step in steps] == [0.0] * 10


def test_cps_at_level_one_is_diffusers_stochastic_sampling() -> None:
    scheduler = flow(6, stochastic_sampling=True)
    steps = stochastic_steps(flow(6), "cps", level=1.0)
    for number, (step, time) in enumerate(zip(steps, scheduler.timesteps, strict=True)):
        x, output, _ = latents(seed=number)
        theirs = scheduler.step(output, time, x, generator=torch.Generator().manual_seed(number)).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(number))
        torch.testing.assert_close(take_step(step, x, output, noise).sample, theirs, rtol=1e-5, atol=1e-5)


def test_the_published_deviations_on_the_grid_of_sd3() -> None:
    steps = stochastic_steps(flow(10), "flow-sde", level=0.7)
    published = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063]
    assert [step.std for step in steps] == pytest.approx(published, rel=5e-3)
    sigmas = flow(10).sigmas.tolist()
    for step, (sigma, following) in zip(steps[1:], pairwise(sigmas[1:]), strict=True):
        length = sigma - following
        assert step.output == pytest.approx(-(1 + 0.7**2 / 2) * length, rel=1e-5)  # the same factor below sigma = 1
        assert step.weight == pytest.approx(1 / length, rel=1e-5)
        assert step.kl_std * math.sqrt(length) == pytest.approx(step.std, rel=1e-5)
    assert steps[0].output == pytest.approx(sigmas[1] - sigmas[0])


def test_a_window_leaves_the_other_steps_deterministic() -> None:
    for scheduler, kind in ((flow(8), "flow-sde"), (flow(8), "cps"), (ddim(8), "ddim")):
        full, none = (stochastic_steps(scheduler, kind, level=level) for level in (0.5, 0.0))  # type: ignore[arg-type]
        for window in (range(2, 5), {0, 6}, []):
            mixed = stochastic_steps(scheduler, kind, level=0.5, window=window)  # type: ignore[arg-type]
            assert mixed == [full[i] if i in window else none[i] for i in range(8)]


# -- what is drawn -------------------------------------------------------------------------------------------------


def test_what_a_step_draws_has_its_mean_and_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 40_000
    for scheduler, kind in ((flow(5), "flow-sde"), (flow(5), "dance-sde"), (flow(5), "cps"), (ddim(5), "ddim")):
        for step in stochastic_steps(scheduler, kind, level=0.8)[:-1]:  # type: ignore[arg-type]
            x, output = torch.full((n, 1), 0.7), torch.full((n, 1), -1.3)
            taken = take_step(step, x, output, torch.randn(n, 1, generator=generator))
            mean = step.sample * 0.7 - step.output * 1.3
            assert float(taken.sample.mean()) == pytest.approx(mean, abs=5 * step.std / math.sqrt(n))
            assert float(taken.sample.std()) == pytest.approx(step.std, rel=5 / math.sqrt(2 * n))


MEAN, STD = 0.6, 0.5  # of the data, a normal distribution, for which the best denoiser is known


def exact_flow(x: Tensor, sigma: float) -> Tensor:
    """E[eps - x_0 | x], x = (1 - sigma) x_0 + sigma eps."""
    kept = 1 - sigma
    residual = (x - kept * MEAN) / (kept**2 * STD**2 + sigma**2)
    return sigma * residual - (MEAN + kept * STD**2 * residual)


def exact_epsilon(x: Tensor, alpha: float) -> Tensor:
    return math.sqrt(1 - alpha) * (x - math.sqrt(alpha) * MEAN) / (alpha * STD**2 + 1 - alpha)


def end_points(steps: list[StochasticStep], denoise: Callable[[Tensor, int], Tensor], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20_000, 1, generator=generator)
    for number, step in enumerate(steps):
        x = take_step(step, x, denoise(x, number), torch.randn(x.shape, generator=generator)).sample
    return x


@pytest.mark.parametrize(("kind", "level"), [("flow-sde", 0.7), ("dance-sde", 0.3), ("dance-sde", 1.0), ("cps", None)])
def test_flows_end_in_the_data_whatever_the_noise(kind: Any, level: float | None) -> None:
    n = 400
    scheduler = flow(n)
    sigmas = scheduler.sigmas.tolist()
    # CPS's noise does not shrink with its steps: a level that does is the limit in which it is an SDE's.
    level = level if level is not None else 2 / math.pi * math.asin(1 / math.sqrt(n))
    without = end_points(stochastic_steps(scheduler, kind, level=0.0), lambda x, i: exact_flow(x, sigmas[i]))
    found = end_points(stochastic_steps(scheduler, kind, level=level), lambda x, i: exact_flow(x, sigmas[i]))
    # 20,000 draws: five standard errors of a mean are 0.018, of a deviation 2.5 %.
    for ends in (without, found):
        assert float(ends.mean()) == pytest.approx(MEAN, abs=0.02)
        assert float(ends.std()) == pytest.approx(STD, rel=0.03)
    assert abs(torch.corrcoef(torch.cat([without, found], 1).T)[0, 1]) < 0.9  # other ends from the same noise


def test_cps_at_a_fixed_level_narrows_what_is_drawn_by_a_fifth() -> None:
    """As its docstring warns."""
    scheduler = flow(640)
    sigmas = scheduler.sigmas.tolist()
    steps = stochastic_steps(scheduler, "cps", level=0.8)
    assert float(end_points(steps, lambda x, i: exact_flow(x, sigmas[i])).std()) == pytest.approx(0.8 * STD, rel=0.03)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_ends_in_the_data_whatever_the_noise(eta: float) -> None:
    scheduler = ddim(500, set_alpha_to_one=True)
    alphas = scheduler.alphas_cumprod[scheduler.timesteps].tolist()
    for level in (0.0, eta):
        steps = stochastic_steps(scheduler, "ddim", level=level)
        ends = end_points(steps, lambda x, i: exact_epsilon(x, alphas[i]))
        assert float(ends.mean()) == pytest.approx(MEAN, abs=0.03)  # the run starts a little off pure noise
        assert float(ends.std()) == pytest.approx(STD, rel=0.03)


# -- densities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_densities_are_those_of_torch(dtype: torch.dtype) -> None:
    sample, mean, _ = (values.to(dtype) for values in latents(seed=3, n=3))
    std = torch.tensor([0.3, 1.0, 2.5])
    each = Normal(mean.double(), std.double().view(3, 1, 1, 1)).log_prob(sample.double()).flatten(1).mean(1)
    limits = {"rtol": 1e-6, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(gaussian_log_prob(sample, mean, std), each, **limits)  # type: ignore[arg-type]
    for row, own in enumerate(std.tolist()):
        one = gaussian_log_prob(sample[row : row + 1], mean[row : row + 1], own)
        torch.testing.assert_close(one[0], each[row], **limits)  # type: ignore[arg-type]
    squares = (sample.double() - mean.double()).square().flatten(1).mean(1)
    torch.testing.assert_close(constant_free_log_prob(sample, mean), -squares, **limits)  # type: ignore[arg-type]


def test_the_gradient_of_a_density_goes_to_the_mean_alone() -> None:
    step = flow_sde_step(0.8, 0.6, level=0.7, second_sigma=0.9)
    x, output, noise = latents(seed=4)
    output.requires_grad_()
    taken = take_step(step, x, output, noise)
    gaussian_log_prob(taken.sample, taken.mean, taken.std).sum().backward()
    # With a gradient through the sample it would be 0: x' - mean does not depend on the mean.
    expected = noise / step.std * step.output / noise[0].numel()
    torch.testing.assert_close(output.grad, expected, rtol=1e-4, atol=1e-7)


def test_half_precision_is_computed_in_float32() -> None:
    step = flow_sde_step(0.8, 0.75, level=0.7, second_sigma=0.9)
    x, output, noise = (values.bfloat16() for values in latents(seed=5))
    taken = take_step(step, x, output, noise)
    exact = take_step(step, x.double(), output.double(), noise.double())
    assert taken.mean.dtype == taken.sample.dtype == torch.float32
    assert exact.sample.dtype == torch.float64
    torch.testing.assert_close(taken.sample.double(), exact.sample, rtol=1e-6, atol=1e-6)


# -- what is refused -----------------------------------------------------------------------------------------------


def unset(scheduler: Any) -> Any:
    return type(scheduler)(**STABLE_DIFFUSION) if isinstance(scheduler, DDIMScheduler) else type(scheduler)()


@pytest.mark.parametrize(
    ("scheduler", "kind", "level", "words"),
    [
        (ddim(4), "flow-sde", 0.7, "DDIMScheduler does not go with sampler 'flow-sde'.*set sampler \"ddim\""),
        (flow(4), "ddim", 1.0, "FlowMatchEulerDiscreteScheduler does not go.*flow-sde"),
        (EulerDiscreteScheduler(), "ddim", 1.0, "EulerDiscreteScheduler does not go.*ddim_like"),
        (DDPMScheduler(), "cps", 0.8, "DDPMScheduler does not go"),
        (FlowMatchHeunDiscreteScheduler(), "cps", 0.8, "Heun.*does not go.*FlowMatchEulerDiscreteScheduler"),
        (ddim(4, clip_sample=True), "ddim", 1.0, "clip_sample"),
        (ddim(4, thresholding=True), "ddim", 1.0, "thresholding"),
        (ddim(4, prediction_type="sample"), "ddim", 1.0, "prediction_type 'sample'"),
        (unset(ddim(4)), "ddim", 1.0, "set_timesteps"),
        (flow(4, invert_sigmas=True), "flow-sde", 0.7, "invert_sigmas"),
        (flow(4), "flow-sde", -0.1, "noise level is -0.1; give 0 or more"),
        (flow(4), "flow-sde", math.nan, "finite"),
        (flow(4), "cps", 1.1, r"noise level is 1.1; give a number in \[0, 1\]"),
        (ddim(4), "ddim", 1.5, r"\[0, 1\]"),
        (flow(4), "ode", 0.5, "sampler is 'ode'; give one of flow-sde, dance-sde, cps, ddim"),
    ],
)
def test_what_does_not_go_together_is_refused(scheduler: Any, kind: Any, level: float, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        stochastic_steps(scheduler, kind, level=level)
    assert "\n" not in str(caught.value)
