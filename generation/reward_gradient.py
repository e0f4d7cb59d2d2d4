"""Gradients of a reward through the sampler of an unmodified pipeline: one engine for all published variants.

AlignProp (arXiv 2310.03739), DRaFT, DRaFT-K and DRaFT-LV (2309.17400), ReFL (2304.05977) and Direct-Align (2509.06942,
which D2-Align, 2512.24146, trains with) differ in four switches: through which steps the gradient goes, whether it also
goes through the network's input there, what the reward sees, and the outer loss
(`generation.objectives.reward_losses`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmalign.errors import InputError

from .noise_levels import Level, NoiseLevels, plain_scheduler
from .objectives.gradient_steps import draw_gradient_steps
from .pipelines import denoiser_of
from .steering import DenoiserStep, run_steered

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Anchor", "GradedLatents", "RewardGradientOptions", "graded_latents"]

Anchor = Literal["none", "l2", "kl"]
_Tree = Any  # tensors in tuples and dictionaries


@dataclass(frozen=True)
class RewardGradientOptions:
    """The switches; the defaults are AlignProp's, with one step.

    Attributes:
        gradient_steps: see `draw_gradient_steps`.
        input_grad: the gradient goes through the network's input as well, so that graded steps are chained by their
            Jacobians; without it they are linked by the scheduler's linear step alone (FlowBP, arXiv 2606.11075).
        reward_input: what is scored. "sample": the sampled x_0. "estimate": the one-step estimate of x_0 at the last
            graded step, where the run then ends (ReFL). "renoise": the sample, and `copies` of it re-noised to the last
            step and denoised once more (DRaFT-LV). "direct-align": the sample, drawn without gradient, re-noised to
            the one graded step and reconstructed (see `NoiseLevels.direct_align`).
        copies: of "renoise".
        inversion: of "direct-align", the probability of the step towards more noise instead of less.
        checkpointing: keep the input of each graded step only, and compute its activations again going backward.
        uncond_grad: False leaves the unconditional half of guidance without gradient, for half the backward pass.
        anchor: distance to the network before training at the graded steps, added to the loss: "l2" is the mean
            squared difference of predictions, "kl" weights it as the Kullback-Leibler divergence of the ancestral
            sampler's steps (no rectified flow).
    """

    gradient_steps: str = "last:1"
    input_grad: bool = True
    reward_input: Literal["sample", "estimate", "renoise", "direct-align"] = "sample"
    copies: int = 2
    inversion: float = 0.0
    checkpointing: bool = True
    uncond_grad: bool = True
    anchor: Anchor = "none"


@dataclass
class GradedLatents:
    """What a run came to.

    Attributes:
        scored: latents whose images the reward is to see, each a whole batch, with graph. One, but for "renoise".
        sample: the sampled x_0 of the batch, without graph, or where the run ended before.
        gradient_steps: numbers of the steps that the gradient goes through.
        distance: to the network before training, for each image of the batch; zeros without an anchor.
        level: of "direct-align", where the network was asked and where its step went.
    """

    scored: list[Float[Tensor, "n ..."]]
    sample: Float[Tensor, "n ..."]
    gradient_steps: list[int]
    distance: Float[Tensor, " n"]
    level: tuple[Level, Level] | None = None


Reference = Callable[[], AbstractContextManager[nn.Module]]


def graded_latents(
    pipeline: DiffusionPipeline,
    call: Mapping[str, Any],
    options: RewardGradientOptions,
    *,
    generator: torch.Generator,
    reference: Reference | None = None,
    noise: Sequence[Float[Tensor, "n ..."]] | None = None,
    direct: tuple[Level, Level] | None = None,
) -> GradedLatents:
    """Sample a batch with the gradient that `options` ask for.

    The samples are those of the plain pipeline, bit by bit; without `uncond_grad` but for rounding, as the two halves
    of guidance then go through the network one after the other. One-step estimates and Direct-Align's reconstructions
    are float32 at least, whatever the network computes in.

    Memory grows with "renoise": each of the `copies` keeps, as the sample does, the graph of one graded step, and then
    of its decoding, until a backward pass through all of them; `copies` + 1 times a batch of DRaFT-1.

    Args:
        pipeline: of any family; its denoiser's trainable weights get the gradient. Dropout has to be off.
        call: the pipeline's own arguments: embeddings, steps, guidance, sizes, and a generator for each image.
        options: the switches.
        generator: of which steps are graded and of re-noising; the same state gives the same run.
        reference: see `Trainer.reference`; needed with an anchor.
        noise: of the re-noised copies, or of Direct-Align, instead of drawing it.
        direct: levels of Direct-Align instead of two neighbours of the run's own.

    Raises:
        InputError: switches that exclude each other, or a scheduler that they do not go with.
    """
    if options.anchor != "none" and reference is None:
        raise InputError(f"anchor {options.anchor!r} compares with the model before training; give reference")
    if options.reward_input == "direct-align":
        return _direct_align(pipeline, call, options, generator, reference, noise, direct)
    total = int(call["num_inference_steps"])
    mask = draw_gradient_steps(options.gradient_steps, total, generator)
    last = max(i for i, graded in enumerate(mask) if graded)
    estimate = options.reward_input == "estimate"
    grading = _Grading(pipeline, _batch_size(call), options, mask, reference)
    with torch.enable_grad():
        latents = run_steered(
            pipeline, call, end=last + 1 if estimate else None, denoise=grading.denoise, seen=grading.seen
        )
    scored = [latents]
    levels = NoiseLevels.of(pipeline.scheduler) if estimate or options.reward_input == "renoise" else None
    if estimate:
        assert levels is not None
        assert grading.step is not None
        step = grading.step
        sample = step.sample if options.input_grad else step.sample.detach()
        scored = [levels.split(sample, step.prediction, levels.levels[last])[0]]
    elif options.reward_input == "renoise":
        assert levels is not None
        if mask != [i == total - 1 for i in range(total)]:
            raise InputError(
                f'reward_input "renoise" repeats the last step alone; give gradient_steps "last:1" instead of '
                f"{options.gradient_steps!r}"
            )
        for copy in range(options.copies):
            eps = _noise(latents, generator) if noise is None else noise[copy]
            again = levels.renoise(latents.detach(), eps, levels.levels[-2]).to(latents.dtype)
            with torch.enable_grad():
                scored.append(run_steered(pipeline, call, first=total - 1, latents=again, denoise=grading.denoise))
    distance = grading.distance()
    return GradedLatents(scored, latents.detach(), [i for i, graded in enumerate(mask) if graded], distance)


def _direct_align(
    pipeline: DiffusionPipeline,
    call: Mapping[str, Any],
    options: RewardGradientOptions,
    generator: torch.Generator,
    reference: Reference | None,
    noise: Sequence[Tensor] | None,
    direct: tuple[Level, Level] | None,
) -> GradedLatents:
    with torch.no_grad():
        sample = run_steered(pipeline, call)
    levels = NoiseLevels.of(pipeline.scheduler)
    total = len(levels.levels) - 1
    if direct is None:
        mask = draw_gradient_steps(options.gradient_steps, total, generator)
        if sum(mask) != 1:
            raise InputError(
                f'reward_input "direct-align" asks the network once; give gradient_steps "one:0:{total - 1}" instead '
                f"of {options.gradient_steps!r}"
            )
        step = mask.index(True)
        inverted = bool(torch.rand((), generator=generator) < options.inversion)
        # Nothing is left of the image in pure noise, which a rectified flow starts from.
        backward = inverted and step > 0 and levels.levels[step - 1].scale > 0
        here, there = levels.levels[step], levels.levels[step - 1 if backward else step + 1]
    else:
        (here, there), step = direct, 0
    eps = _noise(sample, generator) if noise is None else noise[0]
    noisy = levels.renoise(sample, eps, here)
    grading = _Grading(pipeline, _batch_size(call), options, [i == step for i in range(total)], reference)
    with torch.enable_grad():
        run_steered(
            pipeline,
            call,
            first=step,
            end=step + 1,
            latents=noisy.to(sample.dtype),
            level=None if direct is None else here,
            denoise=grading.denoise,
            seen=grading.seen,
        )
        assert grading.step is not None
        # What was rounded for the network is multiplied here, so the sample is taken as it was.
        image = levels.direct_align(noisy, grading.step.prediction, eps, here, there)
    return GradedLatents([image], sample, [step], grading.distance(), (here, there))


@dataclass
class _Grading:
    """Runs the denoiser with gradient at the steps of a mask, and without it, and so without memory, elsewhere."""

    pipeline: DiffusionPipeline
    size: int
    options: RewardGradientOptions
    mask: Sequence[bool]
    reference: Reference | None
    step: DenoiserStep | None = None
    differences: list[tuple[int, Tensor]] = field(default_factory=list)

    def denoise(self, number: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (steps := len(self.pipeline.scheduler.timesteps)) != len(self.mask):
            name = type(self.pipeline.scheduler).__name__
            raise InputError(
                f"{name} takes {steps} steps where {len(self.mask)} were asked for, so they cannot be told apart; "
                f"{plain_scheduler(self.pipeline.scheduler)}"
            )
        if not self.mask[number]:
            with torch.no_grad():
                return forward(*args, **kwargs)
        if not self.options.input_grad:
            args, kwargs = _mapped(torch.Tensor.detach, (args, kwargs))
        guided = len(args[0] if args else kwargs["hidden_states"]) == 2 * self.size
        if self.options.uncond_grad or not guided:
            answer = self._graded(forward, args, kwargs)
        else:
            halves = [_mapped(partial(_half, half), (args, kwargs)) for half in (0, 1)]
            with torch.no_grad():
                unconditional = forward(*halves[0][0], **halves[0][1])
            answer = (torch.cat([unconditional[0], self._graded(forward, *halves[1])[0]]),)
        if self.options.anchor != "none":
            assert self.reference is not None
            with self.reference() as network, torch.no_grad():
                # the network itself, adapters off, would come back to where we are
                same = network is denoiser_of(self.pipeline)[1]
                before = (forward if same else network)(*args, **kwargs)[0]
            self.differences.append((number, answer[0].float() - before.float()))
        return answer

    def seen(self, step: DenoiserStep) -> None:
        if self.mask[step.number]:
            self.step = step

    def distance(self) -> Float[Tensor, " n"]:
        """The mean over graded steps, for each image; both halves of guidance count."""
        if not self.differences:
            return torch.zeros(self.size)
        weights = [1.0] * len(self.differences)
        if self.options.anchor == "kl":
            levels = NoiseLevels.of(self.pipeline.scheduler)
            weights = [_kl_weight(levels, number) for number, _ in self.differences]
        total = sum(
            weight * difference.square().flatten(1).mean(dim=1).view(-1, self.size).mean(dim=0)
            for weight, (_, difference) in zip(weights, self.differences, strict=True)
        )
        assert isinstance(total, Tensor)
        return total / len(self.differences)

    def _graded(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.options.checkpointing:
            return forward(*args, **kwargs)
        # All that changes from step to step is an argument here: what a closure took from the loop would have its last
        # value by the time that backward computes the step again, and the gradient would be silently wrong.
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _kl_weight(levels: NoiseLevels, number: int) -> float:
    """Factor of the squared difference of predictions in the KL divergence of one ancestral step (DDIM, eta 1)."""
    if levels.prediction == "flow":
        raise InputError('anchor "kl" is of samplers with noise, and this is a rectified flow; give anchor "l2"')
    (scale, noise, _), (next_scale, next_noise, _) = levels.levels[number], levels.levels[number + 1]
    ratio = scale * next_noise / (next_scale * noise)
    added = next_noise**2 * max(1 - ratio**2, 0.0)  # variance of the step
    if added == 0:  # the last step adds none: no divergence is defined
        return 0.0
    per_eps = -next_scale * noise / scale + math.sqrt(max(next_noise**2 - added, 0.0))
    if levels.prediction == "epsilon":
        eps_per_prediction = 1.0
    else:  # up to the sign; of the image, eps = (x - scale * x_0) / noise
        eps_per_prediction = scale / (math.hypot(scale, noise) if levels.prediction == "v_prediction" else noise)
    return (per_eps * eps_per_prediction) ** 2 / (2 * added)


def _batch_size(call: Mapping[str, Any]) -> int:
    if isinstance(generators := call.get("generator"), list):  # one for each image
        return len(generators)
    prompts = call["prompt"] if call.get("prompt_embeds") is None else call["prompt_embeds"]
    return (1 if isinstance(prompts, str) else len(prompts)) * (call.get("num_images_per_prompt") or 1)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    # On the CPU, so that every device gets the same.
    drawn = torch.randn(like.shape, generator=generator)
    return drawn.to(like.device, torch.promote_types(like.dtype, torch.float32))


def _half(half: int, tensor: Tensor) -> Tensor:
    return tensor.chunk(2)[half] if tensor.ndim else tensor


def _mapped(function: Callable[[Tensor], Tensor], tree: _Tree) -> _Tree:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {name: _mapped(function, value) for name, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_mapped(function, value) for value in tree)
    return tree
