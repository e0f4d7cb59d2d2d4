"""Reward gradients through tiny SDXL, SD3 and FLUX against loops written by hand, and what a graded step holds."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from generation import tiny_pipeline
from generation.latents import decode_latents, unit_pixels
from generation.lora import add_lora, lora_disabled
from generation.noise_levels import NoiseLevels, ddim_like
from generation.pipelines import denoiser_of
from generation.reward_gradient import RewardGradientOptions, graded_latents
from mmalign.errors import InputError

STEPS, GUIDANCE = 5, 3.0


class Rig:
    """A tiny pipeline with a LoRA that does something, and prompts encoded."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.pipeline: Any = tiny_pipeline(family)
        self.pipeline.set_progress_bar_config(disable=True)
        if family in ("sdxl", "sd15"):
            self.pipeline.scheduler = ddim_like(self.pipeline.scheduler)
        self.network: Any = denoiser_of(self.pipeline)[1]
        self.parameters = add_lora(self.network, rank=2, targets=("to_q", "to_v"), seed=1)
        generator = torch.Generator().manual_seed(2)
        for parameter in self.parameters:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        own = {"prompt_2": None} if family in ("sd3", "flux") else {}
        own |= {"prompt_3": None} if family == "sd3" else {}
        with torch.no_grad():
            found = self.pipeline.encode_prompt(
                prompt=["a fox", "two red boats"], **own, device="cpu", num_images_per_prompt=1,
                **({} if family == "flux" else {"do_classifier_free_guidance": True}),
            )  # fmt: skip
        names = {
            2: ("prompt_embeds", "negative_prompt_embeds"),
            3: ("prompt_embeds", "pooled_prompt_embeds", "text_ids"),
            4: ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
        }[len(found)]
        self.embeds = dict(zip(names, found, strict=True))
        self.embeds.pop("text_ids", None)

    def call(self) -> dict[str, Any]:
        return {
            **self.embeds,
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "generator": [torch.Generator().manual_seed(seed) for seed in (5, 6)],
            "height": 64,
            "width": 64,
        }

    def run(self, **options: Any) -> Any:
        reference = options.pop("reference", None)
        return graded_latents(
            self.pipeline,
            self.call(),
            RewardGradientOptions(**options),
            generator=torch.Generator().manual_seed(0),
            reference=reference,
        )

    def value(self, latents: Tensor) -> Tensor:
        """Redness of the images, summed over pixels so that gradients are of the order of 1."""
        pixels = unit_pixels(decode_latents(self.pipeline, latents, height=64, width=64))
        return (pixels[:, 0] - pixels[:, 1:].mean(dim=1)).sum()

    def gradient(self, value: Tensor) -> Tensor:
        self.network.zero_grad()
        value.backward()
        return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in self.parameters])


@pytest.fixture(scope="module", params=["sdxl", "sd3"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param)


@pytest.fixture(scope="module")
def sdxl() -> Rig:
    return Rig("sdxl")


def by_hand(rig: Rig, graded: list[int], input_grad: bool = True) -> Tensor:
    """The sampler as its papers write it; steps that are not graded are detached, and inputs if asked for."""
    pipeline, embeds = rig.pipeline, rig.embeds
    generators = rig.call()["generator"]
    channels = rig.network.config.in_channels
    x = torch.cat([torch.randn(1, channels, 8, 8, generator=generator) for generator in generators])
    texts = torch.cat([embeds["negative_prompt_embeds"], embeds["prompt_embeds"]])
    pooled = torch.cat([embeds["negative_pooled_prompt_embeds"], embeds["pooled_prompt_embeds"]])
    for i in range(STEPS):
        doubled = torch.cat([x, x]) if input_grad else torch.cat([x, x]).detach()
        with torch.enable_grad() if i in graded else torch.no_grad():
            if rig.family == "sdxl":
                time = pipeline.scheduler.timesteps[i]
                sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 4)
                out = rig.network(
                    doubled, time, texts, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}
                ).sample
            else:
                sigma = pipeline.scheduler.sigmas[i]
                out = rig.network(
                    hidden_states=doubled, timestep=(sigma * 1000).expand(4), encoder_hidden_states=texts,
                    pooled_projections=pooled,
                ).sample  # fmt: skip
        without, told = out.chunk(2)
        guided = without + GUIDANCE * (told - without)
        if rig.family == "sdxl":
            kept = pipeline.scheduler.alphas_cumprod
            now = kept[time]
            before = time - 1000 // STEPS
            later = kept[before] if before >= 0 else kept[0]
            clean = (x - (1 - now) ** 0.5 * guided) / now**0.5
            x = later**0.5 * clean + (1 - later) ** 0.5 * guided
        else:
            x = x + (pipeline.scheduler.sigmas[i + 1] - sigma) * guided
    return x


@pytest.mark.parametrize("steps", [1, 3, STEPS])
def test_samples_and_gradients_are_those_of_a_hand_written_loop(rig: Rig, steps: int) -> None:
    plain = rig.pipeline(**rig.call(), output_type="latent").images
    run = rig.run(gradient_steps=f"last:{steps}", checkpointing=False)
    assert torch.equal(run.sample, plain)
    assert torch.equal(run.scored[0], plain)
    assert run.gradient_steps == list(range(STEPS - steps, STEPS))
    found = rig.gradient(rig.value(run.scored[0]))
    wanted = rig.gradient(rig.value(by_hand(rig, run.gradient_steps)))
    assert wanted.abs().max() > 0.01
    assert (found - wanted).abs().max() <= 1e-6 * max(float(wanted.abs().max()), 1.0)
    # Computed again going backward, with everything as it was at that step.
    again = rig.run(gradient_steps=f"last:{steps}", checkpointing=True)
    assert torch.equal(again.sample, plain)
    assert (rig.gradient(rig.value(again.scored[0])) - found).abs().max() <= 1e-6 * max(float(found.abs().max()), 1.0)


def test_without_the_gradient_of_inputs_steps_are_linked_by_the_scheduler_alone(rig: Rig) -> None:
    run = rig.run(gradient_steps="last:3", input_grad=False)
    found = rig.gradient(rig.value(run.scored[0]))
    wanted = rig.gradient(rig.value(by_hand(rig, run.gradient_steps, input_grad=False)))
    assert (found - wanted).abs().max() <= 1e-6 * max(float(wanted.abs().max()), 1.0)
    chained = rig.gradient(rig.value(by_hand(rig, run.gradient_steps)))
    assert (found - chained).norm() > 1e-3 * chained.norm()


def test_a_late_bound_timestep_would_be_another_gradient(rig: Rig) -> None:
    """The trap of checkpointing: what a recomputed step took from the loop has its last value by then."""
    run = rig.run(gradient_steps="all", checkpointing=False)
    right = rig.gradient(rig.value(run.scored[0]))
    now: dict[str, Any] = {}
    forward = rig.network.forward

    def late(*args: Any, **kwargs: Any) -> Any:
        now.update({"timestep": kwargs.get("timestep", args[1] if len(args) > 1 else None)})

        def closure(sample: Tensor) -> Any:
            if "hidden_states" in kwargs:
                return forward(**{**kwargs, "hidden_states": sample, "timestep": now["timestep"]})
            return forward(sample, now["timestep"], *args[2:], **kwargs)

        sample = kwargs.get("hidden_states", args[0] if args else None)
        return torch.utils.checkpoint.checkpoint(closure, sample, use_reentrant=False)

    rig.network.forward = late
    try:
        wrong = rig.gradient(rig.value(rig.run(gradient_steps="all", checkpointing=False).scored[0]))
    finally:
        del rig.network.forward
    assert (wrong - right).norm() > 0.01 * right.norm()  # the trap is real here
    ours = rig.gradient(rig.value(rig.run(gradient_steps="all", checkpointing=True).scored[0]))
    assert (ours - right).norm() < 1e-4 * right.norm()


@torch.no_grad()
def test_flux_with_its_packed_latents_and_distilled_guidance() -> None:
    """There a loop by hand is long; along its gradient the value has to rise by the gradient's norm."""
    rig = Rig("flux")
    plain = rig.pipeline(**rig.call(), output_type="latent").images
    run = rig.run(gradient_steps="all")
    assert torch.equal(run.sample, plain)
    with torch.enable_grad():
        gradient = rig.gradient(rig.value(run.scored[0]))
    slope, step = float(gradient.norm()), 5e-3
    assert slope > 0.01
    values, states = [], [parameter.clone() for parameter in rig.parameters]
    for sign in (1, -1):
        moves = (gradient / slope).split([parameter.numel() for parameter in rig.parameters])
        for parameter, state, move in zip(rig.parameters, states, moves, strict=True):
            parameter.copy_(state + sign * step * move.view_as(state))
        values.append(float(rig.value(rig.run(gradient_steps="all").sample)))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.05)


def test_without_the_unconditional_gradient_samples_are_the_same_and_gradients_are_half_of_guidance(sdxl: Rig) -> None:
    whole, half = sdxl.run(), sdxl.run(uncond_grad=False)
    torch.testing.assert_close(half.sample, whole.sample, atol=1e-4, rtol=1e-4)

    def only_told(x: Tensor) -> Tensor:  # the last step by hand, unconditional half detached
        embeds, scheduler = sdxl.embeds, sdxl.pipeline.scheduler
        time = scheduler.timesteps[-1]
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        answers = []
        for name in ("negative_", ""):
            added = {"text_embeds": embeds[f"{name}pooled_prompt_embeds"], "time_ids": sizes}
            answers.append(sdxl.network(x, time, embeds[f"{name}prompt_embeds"], added_cond_kwargs=added).sample)
        without, told = answers[0].detach(), answers[1]
        return scheduler.step(without + GUIDANCE * (told - without), time, x).prev_sample

    before = sdxl.run(gradient_steps="0,0,0,1,0", reward_input="estimate")
    assert before.gradient_steps == [3]
    wanted = sdxl.gradient(sdxl.value(only_told(before.sample)))
    found = sdxl.gradient(sdxl.value(half.scored[0]))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert (found - sdxl.gradient(sdxl.value(whole.scored[0]))).norm() > 0.01 * found.norm()


def test_the_anchor_is_the_distance_to_the_network_without_adapters(sdxl: Rig) -> None:
    @contextlib.contextmanager
    def reference() -> Iterator[Any]:
        with torch.no_grad(), lora_disabled(sdxl.network):
            yield sdxl.network

    def no_lora() -> Iterator[Any]:
        return contextlib.nullcontext(sdxl.network)  # type: ignore[return-value]

    assert torch.equal(sdxl.run(anchor="l2", reference=no_lora).distance, torch.zeros(2))
    two = sdxl.run(gradient_steps="last:2", anchor="l2", reference=reference)
    assert two.distance.shape == (2,)
    assert (two.distance > 1e-6).all()
    assert sdxl.gradient(two.distance.mean()).abs().max() > 0
    # One ancestral step: the divergence of two Gaussians of equal variance is |difference of means|^2 / 2 variance.
    step, own = "0,0,1,0,0", sdxl.pipeline.scheduler
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = sdxl.pipeline.scheduler = ddim_like(own, prediction_type=kind)
        try:
            l2, kl = (sdxl.run(gradient_steps=step, anchor=kind, reference=reference).distance for kind in ("l2", "kl"))
        finally:
            sdxl.pipeline.scheduler = own
        time, shape = scheduler.timesteps[2], (1, 4, 8, 8)
        x = torch.randn(shape)
        told = [torch.zeros(shape), torch.ones(shape)]
        means = [scheduler.step(t, time, x, eta=1.0, variance_noise=torch.zeros(shape)).prev_sample for t in told]
        variance = scheduler._get_variance(time, time - 1000 // STEPS)
        ratio = (means[1] - means[0]).square().mean() / (2 * variance)
        torch.testing.assert_close(kl / l2, ratio.expand(2).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("listed", [True, False])
def test_several_images_of_a_prompt_are_that_many(sdxl: Rig, listed: bool) -> None:
    """As the pipeline does it: told apart from guidance's two halves, and a distance for each image."""

    @contextlib.contextmanager
    def reference() -> Iterator[Any]:
        with torch.no_grad(), lora_disabled(sdxl.network):
            yield sdxl.network

    def run(repeat: bool, **options: Any) -> Any:
        one = {name: value[:1] for name, value in sdxl.embeds.items()}
        call = sdxl.call() | ({name: v.repeat_interleave(2, dim=0) for name, v in one.items()} if repeat else one)
        if not listed:
            call["generator"] = torch.Generator().manual_seed(3)
        if not repeat:
            call["num_images_per_prompt"] = 2
        options_ = RewardGradientOptions(uncond_grad=False, anchor="l2")
        return graded_latents(sdxl.pipeline, call, options_, generator=torch.Generator(), reference=reference)

    wanted, found = run(repeat=True), run(repeat=False)
    assert found.distance.shape == (2,)
    torch.testing.assert_close(found.distance, wanted.distance)
    torch.testing.assert_close(found.sample, wanted.sample, atol=1e-5, rtol=1e-5)
    gradient = sdxl.gradient(sdxl.value(wanted.scored[0]))
    torch.testing.assert_close(sdxl.gradient(sdxl.value(found.scored[0])), gradient, atol=1e-5, rtol=1e-4)


def test_direct_align_reconstructs_the_image_exactly_if_the_network_knows_the_noise() -> None:
    """With the true noise as the prediction, the reconstruction is the image, whatever the two levels."""
    pipeline: Any = tiny_pipeline("sdxl")
    for scheduler in (ddim_like(pipeline.scheduler), pipeline.scheduler, tiny_pipeline("sd3").scheduler):
        scheduler.set_timesteps(6)
        levels = NoiseLevels.of(scheduler)
        image, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        answer = eps - image if levels.prediction == "flow" else eps
        for here, there in ((1, 2), (4, 5), (3, 2)):
            a, b = levels.levels[here], levels.levels[there]
            noisy = levels.renoise(image, eps, a)
            torch.testing.assert_close(levels.direct_align(noisy, answer, eps, a, b), image, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["ddim", "euler", "flow"])
def test_direct_align_between_levels_passed_in_is_that_between_the_same_two_of_the_run(kind: str) -> None:
    rig = Rig("sd3" if kind == "flow" else "sdxl")
    if kind == "euler":
        rig.pipeline.scheduler = tiny_pipeline("sdxl").scheduler
        assert type(rig.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    options = RewardGradientOptions("one:2:2", reward_input="direct-align")
    noise = [torch.randn(2, rig.network.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(7))]
    given: dict[str, Any] = {"generator": torch.Generator(), "noise": noise}
    own = graded_latents(rig.pipeline, rig.call(), options, **given)
    assert own.level == tuple(NoiseLevels.of(rig.pipeline.scheduler).levels[2:4])
    gradient = rig.gradient(rig.value(own.scored[0]))
    direct = graded_latents(rig.pipeline, rig.call(), options, direct=own.level, **given)
    torch.testing.assert_close(direct.scored[0], own.scored[0], atol=1e-4, rtol=1e-4)
    found = rig.gradient(rig.value(direct.scored[0]))
    assert (found - gradient).norm() < 1e-3 * gradient.norm()


class KnowsTheNoise:
    """In place of a network's forward: says what noise there is, in the precision it is asked in."""

    def __init__(self, pipeline: Any, noise: Tensor) -> None:
        self.noise = noise
        denoiser_of(pipeline)[1].forward = self

    def __call__(self, sample: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        assert sample.dtype == torch.bfloat16
        return (self.noise.to(sample.dtype).repeat(len(sample) // len(self.noise), 1, 1, 1),)


def half_pipeline(scheduler: str) -> tuple[Any, dict[str, Any]]:
    """A tiny SDXL in bfloat16, and a call of two prompts."""
    pipeline: Any = tiny_pipeline("sdxl").to(torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler == "ddim":
        pipeline.scheduler = ddim_like(pipeline.scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    call = {"prompt": ["a fox", "two red boats"], "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    return pipeline, call | {"generator": generators}


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_in_bfloat16_direct_align_and_estimates_lose_nothing_but_the_networks_own_rounding(scheduler: str) -> None:
    pipeline, call = half_pipeline(scheduler)
    exact = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7)).bfloat16()
    KnowsTheNoise(pipeline, exact)
    for step in range(STEPS - 1):  # each of the first has far more noise than image
        options = RewardGradientOptions(f"one:{step}:{step}", reward_input="direct-align", checkpointing=False)
        run = graded_latents(pipeline, call, options, generator=torch.Generator(), noise=[exact.float()])
        assert run.sample.dtype == torch.bfloat16
        assert run.scored[0].dtype == torch.float32
        error = (run.scored[0] - run.sample.float()).square().mean().sqrt()
        assert error < 1e-4 * run.sample.float().square().mean().sqrt()
    # What is drawn is not rounded to bfloat16 on its way; what the network says is.
    start = call | {"generator": [torch.Generator().manual_seed(seed) for seed in (5, 6)]}
    options = RewardGradientOptions("one:0:0", reward_input="estimate", checkpointing=False)
    run = graded_latents(pipeline, start, options, generator=torch.Generator())
    x = torch.cat(
        [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s), dtype=torch.bfloat16) for s in (5, 6)]
    )
    scale, noise, _ = NoiseLevels.of(pipeline.scheduler).levels[0]
    x = x * pipeline.scheduler.init_noise_sigma
    assert x.dtype == torch.bfloat16
    wanted = (x.double() - noise * exact.double()) / scale
    torch.testing.assert_close(run.scored[0].double(), wanted, atol=1e-4, rtol=1e-5)


def test_noise_that_is_drawn_for_a_bfloat16_network_is_float32() -> None:
    pipeline, call = half_pipeline("ddim")
    zeros = torch.zeros(2, 4, 8, 8)
    KnowsTheNoise(pipeline, zeros)
    options = RewardGradientOptions("one:0:0", reward_input="direct-align", checkpointing=False)
    run = graded_latents(pipeline, call, options, generator=torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(1)
    torch.randint(1, (), generator=draws)  # the step
    torch.rand((), generator=draws)  # its direction
    eps = torch.randn(2, 4, 8, 8, generator=draws)
    (here, there), image = run.level, run.sample.double()  # type: ignore[misc]
    wanted = image + (here.noise / here.scale - there.noise / there.scale) * eps.double()
    torch.testing.assert_close(run.scored[0].double(), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("form", "reward_input"), [("last:1", "renoise"), ("one:1:1", "direct-align"), ("one:1:1", "estimate")]
)
def test_a_bfloat16_network_is_given_what_it_computes_in(form: str, reward_input: Any) -> None:
    pipeline, call = half_pipeline("euler")
    run = graded_latents(
        pipeline, call, RewardGradientOptions(form, reward_input=reward_input), generator=torch.Generator()
    )
    assert all(bool(latents.isfinite().all()) for latents in run.scored)
    sum(latents.float().sum() for latents in run.scored).backward()  # type: ignore[union-attr]
    assert any(p.grad is not None and bool(p.grad.any()) for p in denoiser_of(pipeline)[1].parameters())


def test_inversion_is_the_share_of_steps_towards_more_noise(sdxl: Rig) -> None:
    def inverted(inversion: float, times: int) -> list[bool]:
        options = RewardGradientOptions("one:2:2", reward_input="direct-align", inversion=inversion)
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(times):
            run = graded_latents(sdxl.pipeline, sdxl.call(), options, generator=generator)
            here, there = run.level  # type: ignore[misc]
            assert here.noise != there.noise
            found.append(there.noise > here.noise)
        return found

    assert inverted(0.0, 2) == [False] * 2
    assert inverted(1.0, 2) == [True] * 2
    assert set(inverted(0.5, 6)) == {True, False}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"gradient_steps": "one:0:4", "reward_input": "direct-align"}, 1),
        ({"gradient_steps": "one:1:3", "reward_input": "direct-align", "inversion": 1.0}, 1),
        ({"gradient_steps": "one:2:3", "reward_input": "estimate", "input_grad": False}, 1),
        ({"gradient_steps": "last:1", "reward_input": "renoise", "copies": 3}, 1),
        ({"gradient_steps": "independent"}, None),
        ({"gradient_steps": "uniform:0:5", "input_grad": False}, None),
    ],
)
def test_every_variant_trains_the_adapter_and_repeats(rig: Rig, options: dict[str, Any], steps: int | None) -> None:
    run = rig.run(**options)
    assert len(run.scored) == (1 + options.get("copies", 0))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(run.scored, 2))
    assert steps is None or len(run.gradient_steps) == steps
    gradient = rig.gradient(sum(rig.value(latents) for latents in run.scored))
    assert gradient.abs().max() > 1e-6
    assert all(p.grad is None for n, p in rig.network.named_parameters() if "lora" not in n)
    again = rig.run(**options)
    assert again.gradient_steps == run.gradient_steps
    assert all(torch.equal(a, b) for a, b in zip(again.scored, run.scored, strict=True))
    if options.get("reward_input") == "direct-align":
        here, there = run.level
        assert (there.noise > here.noise) == (options.get("inversion") == 1.0)


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made under it took at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.known:
                    self.known.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_memory_does_not_grow_with_graded_steps_when_checkpointed(sdxl: Rig) -> None:
    peaks = {}
    for checkpointing in (True, False):
        for count in (1, 5):
            with PeakMemory() as memory:
                run = sdxl.run(gradient_steps=f"last:{count}", checkpointing=checkpointing)
                sdxl.gradient(sdxl.value(run.scored[0]))
            peaks[checkpointing, count] = memory.peak
    assert peaks[True, 5] < 1.1 * peaks[True, 1]
    assert peaks[False, 5] > 2 * peaks[False, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_steps": "last:6"}, "needs 6 steps and a run has 5"),
        ({"gradient_steps": "last:0"}, "nothing would be trained"),
        ({"gradient_steps": "last:2", "reward_input": "renoise"}, "last:1"),
        ({"gradient_steps": "last:2", "reward_input": "direct-align"}, "one:0:4"),
        ({"anchor": "l2"}, "give reference"),
    ],
)
def test_switches_that_exclude_each_other(sdxl: Rig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sdxl.run(**options)


def test_a_scheduler_that_repeats_a_timestep_is_refused() -> None:
    pipeline: Any = tiny_pipeline("sd15")
    pipeline.set_progress_bar_config(disable=True)
    call = {"prompt": ["a fox"], "num_inference_steps": 4}
    with pytest.raises(InputError, match="takes 5 steps where 4 were asked for"):
        graded_latents(pipeline, call, RewardGradientOptions(), generator=torch.Generator())
