"""A pipeline steered step by step draws what it draws by itself, and is left as it was."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from generation import tiny_pipeline
from generation.drawing import borrowed
from generation.noise_levels import NoiseLevels, ddim_like
from generation.pipelines import denoiser_of
from generation.steering import DenoiserStep, run_steered, scheduler_memory
from mmalign.errors import InputError

FAMILIES = ("sdxl", "sd15", "sd3", "flux")


def call(steps: int = 5, count: int = 2) -> dict[str, Any]:
    return {
        "prompt": ["a fox", "two red boats"][:count],
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        "generator": [torch.Generator().manual_seed(seed) for seed in range(count)],
    }


def plain(pipeline: Any, **options: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**call(**options), output_type="latent").images


@pytest.fixture(params=[*FAMILIES, "dpm"])
def pipeline(request: pytest.FixtureRequest) -> Any:
    made = tiny_pipeline("sdxl" if request.param == "dpm" else request.param)
    if request.param == "dpm":  # remembers earlier predictions
        made.scheduler = DPMSolverMultistepScheduler.from_config(made.scheduler.config)
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def test_whole_runs_and_runs_in_two_parts_are_those_of_the_pipeline(pipeline: Any) -> None:
    wanted = plain(pipeline)
    network, scheduler = denoiser_of(pipeline)[1], pipeline.scheduler
    with borrowed(pipeline):
        assert torch.equal(run_steered(pipeline, call()), wanted)
        half = run_steered(pipeline, call(), end=3)
        memory = scheduler_memory(pipeline.scheduler)
        assert not torch.equal(half, wanted)
        asked: list[int] = []

        def denoise(number: int, forward: Any, args: Any, kwargs: Any) -> Any:
            asked.append(number)
            return forward(*args, **kwargs)

        rest = run_steered(pipeline, call(), first=3, latents=half, scheduler_state=memory, denoise=denoise)
        assert torch.equal(rest, wanted)
        assert asked == list(range(3, len(pipeline.scheduler.timesteps)))
    assert "forward" not in vars(network)
    assert "step" not in vars(scheduler)
    assert pipeline.scheduler is scheduler
    assert torch.equal(plain(pipeline), wanted)


@torch.no_grad()
def test_one_of_the_batch_goes_on_with_its_part_of_the_memory() -> None:
    pipeline = tiny_pipeline("sdxl")
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    wanted = plain(pipeline)
    half = run_steered(pipeline, call(), end=3)
    rows = torch.tensor([1])
    memory = scheduler_memory(pipeline.scheduler, rows)
    one = {name: value[1:] if isinstance(value, list) else value for name, value in call().items()}
    rest = run_steered(pipeline, one, first=3, latents=half[rows], scheduler_state=memory)
    torch.testing.assert_close(rest, wanted[1:], atol=2e-4, rtol=1e-4)  # another batch size rounds otherwise
    forgotten = run_steered(pipeline, one, first=3, latents=half[rows])
    assert (forgotten - wanted[1:]).abs().max() > 1e-2


def test_what_was_replaced_comes_back_after_a_failure() -> None:
    pipeline = tiny_pipeline("sdxl")
    pipeline.set_progress_bar_config(disable=True)

    def fail(*_: Any) -> Any:
        raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        run_steered(pipeline, call(), denoise=fail)
    assert "forward" not in vars(pipeline.unet)
    assert "step" not in vars(pipeline.scheduler)


@torch.no_grad()
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_one_step_estimates_agree_with_the_scheduler(family: str) -> None:
    """Stepping from x_i with the estimates of x_0 and eps gives x_(i+1), for Euler, DDIM and rectified flow."""
    made = tiny_pipeline(family)
    made.set_progress_bar_config(disable=True)
    schedulers = [made.scheduler]
    if family == "sdxl":
        schedulers += [
            ddim_like(made.scheduler),
            ddim_like(made.scheduler, prediction_type="v_prediction"),
            type(made.scheduler).from_config(made.scheduler.config, prediction_type="v_prediction"),
        ]
    for scheduler in schedulers:
        made.scheduler = scheduler
        seen: list[DenoiserStep] = []
        end = run_steered(made, call(), seen=seen.append)
        levels = NoiseLevels.of(scheduler)
        assert len(levels.levels) == len(seen) + 1 == 6
        samples = [*(step.sample for step in seen), end]
        for step, following in zip(seen, samples[1:], strict=True):
            here, there = levels.levels[step.number : step.number + 2]
            clean, noise = levels.split(step.sample, step.prediction, here)
            torch.testing.assert_close(levels.renoise(clean, noise, here), step.sample, atol=1e-3, rtol=1e-4)
            stepped = levels.renoise(clean, noise, there)
            torch.testing.assert_close(stepped, following.to(stepped), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("EDMEulerScheduler", "EDM's kind .* use SDXL, SD 1.5"),
        ("EDMDPMSolverMultistepScheduler", "EDM's kind .* use SDXL, SD 1.5"),
        ("PNDMScheduler", 'timesteps twice.* set sampler "ddim" for a training run; in Python .*ddim_like'),
        ("HeunDiscreteScheduler", "timesteps twice.*ddim_like"),
        ("KDPM2DiscreteScheduler", "between its noise levels.*ddim_like"),
        ("FlowMatchHeunDiscreteScheduler", "timesteps twice.*FlowMatchEulerDiscreteScheduler.from_config"),
    ],
)
def test_schedulers_whose_levels_would_be_wrong_are_refused(name: str, message: str) -> None:
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(5)
    with pytest.raises(InputError, match=message):
        NoiseLevels.of(scheduler)


def test_ddim_is_not_made_of_another_noise_schedule() -> None:
    for name, message in (
        ("EDMEulerScheduler", "EDM's kind"),
        ("EDMDPMSolverMultistepScheduler", "EDM's kind"),
        ("FlowMatchEulerDiscreteScheduler", "rectified flow"),
    ):
        with pytest.raises(InputError, match=message):
            ddim_like(getattr(diffusers, name)())
    # What was made from such a model's file is still of that kind.
    settings = diffusers.EDMEulerScheduler(sigma_data=0.5).config
    with pytest.raises(InputError, match="EDM's kind"):
        ddim_like(diffusers.EulerDiscreteScheduler.from_config(settings))
    euler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert torch.equal(ddim_like(euler).alphas_cumprod, euler.alphas_cumprod)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDIMScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("LMSDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ],
)
def test_at_another_level_the_network_sees_what_it_would_see_there(name: str, settings: dict[str, Any]) -> None:
    """Step 3's latents handed to step 0 at step 3's level: the same input, timestep and prediction."""
    made = tiny_pipeline("sdxl")
    made.scheduler = getattr(diffusers, name).from_config(made.scheduler.config, **settings)
    steps: list[DenoiserStep] = []
    inputs: list[tuple[torch.Tensor, float]] = []

    def denoise(_: int, forward: Any, args: Any, kwargs: Any) -> Any:
        inputs.append((args[0], float(args[1])))
        return forward(*args, **kwargs)

    run_steered(made, call(), denoise=denoise, seen=steps.append)
    level = NoiseLevels.of(made.scheduler).levels[3]
    run_steered(made, call(), end=1, latents=steps[3].sample, level=level, denoise=denoise, seen=steps.append)
    assert len(inputs) == len(steps) == 6
    torch.testing.assert_close(inputs[5][0], inputs[3][0], atol=1e-5, rtol=1e-5)
    assert inputs[5][1] == pytest.approx(inputs[3][1], abs=1e-3)
    torch.testing.assert_close(steps[5].prediction, steps[3].prediction, atol=1e-4, rtol=1e-4)
    assert "scale_model_input" not in vars(made.scheduler)
