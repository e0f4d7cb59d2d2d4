"""Images drawn in parts: looked at on their way, dropped, or gone on with in another batch.

Around `generation.steering`: what an image needs to go on (latents, what the scheduler remembers of it, the state of
its generator) is kept by image, and a finished one is decoded by the pipeline itself, so that it is what
`generation.generate` draws.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from mmalign.errors import InputError

from .drawing import ImageRequest, SamplingOptions, memory_told, negative_prompts, refuse_nan
from .latents import decode_latents, unit_pixels, unpacked
from .noise_levels import Level, NoiseLevels
from .pipelines import denoiser_of, pipeline_family
from .steering import DenoiserStep, replaced, run_steered, scheduler_memory

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["PartialRuns", "Unfinished", "check_step"]


@dataclass(frozen=True, slots=True, eq=False)
class Unfinished:
    """An image on its way.

    Attributes:
        request: what it is to be.
        steps: that were run.
        latents: after them; `None` before the first.
        memory: what the scheduler remembers of this image.
        generator: as the run left it, for schedulers that draw noise on the way.
    """

    request: ImageRequest
    steps: int = 0
    latents: Float[Tensor, "1 ..."] | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    generator: torch.Generator | None = None


class PartialRuns:
    """Draws with one pipeline, which has to be `borrowed` meanwhile.

    Attributes:
        pipeline: of any family.
        options: for all images.
        total: steps of a whole run as the scheduler counts them: PNDM takes one more than asked for, Heun twice as
            many less one.
        evaluations: images that the denoiser was asked about so far. Guidance asks about an image twice a step.
        rows: how often it is asked about an image in a step; known after the first.
    """

    def __init__(self, pipeline: DiffusionPipeline, options: SamplingOptions, example: ImageRequest) -> None:
        """Ask the scheduler how many steps it takes, by a run that leaves all of them out.

        Raises:
            InputError: a scheduler that images cannot be separated in, or a negative prompt without effect.
        """
        self.pipeline, self.options = pipeline, options
        self.evaluations, self.rows = 0, 1
        self._conditional: Tensor | None = None
        if hasattr(pipeline.scheduler, "noise_sampler"):
            raise InputError(
                f"{type(pipeline.scheduler).__name__} draws noise for a batch as a whole, so no image of it can go on "
                "alone; give the pipeline another scheduler"
            )
        with self._running(1), torch.no_grad():
            run_steered(pipeline, self._call([Unfinished(example)]), end=0)
        self.total = len(pipeline.scheduler.timesteps)

    @torch.no_grad()
    def advance(self, batch: Sequence[Unfinished], end: int) -> tuple[list[Unfinished], Float[Tensor, "n ..."]]:
        """Run a batch of equal progress up to step `end`, and estimate where it goes.

        The estimates are of x_0 in one step, by what the denoiser said at the last. Guidance in full overshoots over
        that far a way, so it counts only by the share of the steps that were run (ours; it brought early and final
        scores nearer to each other for one trained miniature).

        Returns:
            The images after step `end`, and the estimates: float32, in the pipeline's own layout.
        """
        estimates: list[Tensor] = []

        def seen(step: DenoiserStep) -> None:
            if step.number == end - 1:
                prediction = step.prediction.float()
                if self._conditional is not None:
                    prediction = torch.lerp(self._conditional.float(), prediction, end / self.total)
                levels, level = _level(self.pipeline.scheduler, step.number)
                estimates.append(levels.split(step.sample.float(), prediction, level)[0])

        generators = _copies(batch)
        latents = self._run(batch, generators, end, seen)
        rows = [torch.tensor([place]) for place in range(len(batch))]
        after = [
            Unfinished(one.request, end, latents[row], scheduler_memory(self.pipeline.scheduler, row), generator)
            for one, row, generator in zip(batch, rows, generators, strict=True)
        ]
        return after, estimates[0]

    @torch.no_grad()
    def finish(self, batch: Sequence[Unfinished]) -> list[Image.Image]:
        """Run the steps that are left and decode, as the pipeline does: precision, watermark, safety checker.

        Raises:
            InputError: an image that came out as NaN.
        """
        latents = self._run(batch, _copies(batch), None, None)
        pixels = self._decoded(batch, latents)
        refuse_nan(self.pipeline, [one.request for one in batch], pixels)
        return self.pipeline.image_processor.numpy_to_pil(pixels)

    @torch.no_grad()
    def preview(self, estimates: Float[Tensor, "n ..."], scale: int = 1) -> Float[Tensor, "n 3 height width"]:
        """Estimates decoded to pixels in [0, 1], float32.

        Args:
            estimates: of `advance`.
            scale: average this many latents in height and in width first; the images are as much smaller.
        """
        pipeline, height, width = self.pipeline, self.options.height // scale, self.options.width // scale
        if scale > 1:
            whole = unpacked(pipeline, estimates, height=self.options.height, width=self.options.width)
            spatial = avg_pool2d(whole, scale)
            estimates = spatial
            if pipeline_family(pipeline) == "flux":
                estimates = pipeline._pack_latents(spatial, *spatial.shape)
        vae = pipeline.vae
        # SDXL's own VAE overflows in float16, and its pipeline does the same.
        upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast")
        with self._running(len(estimates)):
            try:
                if upcast:
                    vae.to(torch.float32)
                return unit_pixels(decode_latents(pipeline, estimates, height=height, width=width))
            finally:
                if upcast:
                    vae.to(torch.float16)

    def _run(
        self, batch: Sequence[Unfinished], generators: list[torch.Generator], end: int | None, seen: Any
    ) -> Float[Tensor, "n ..."]:
        """The latents after step `end`."""
        first = batch[0].steps

        def denoise(number: int, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            asked = len(args[0] if args else kwargs["hidden_states"])
            self.evaluations += asked
            self.rows = asked // len(batch)
            answer = forward(*args, **kwargs)
            # of guidance, the first half is unconditional
            self._conditional = answer[0].chunk(2)[1] if self.rows == 2 else None
            return answer

        call = self._call(batch) | {"generator": generators}
        more: dict[str, Any] = {}
        if first:
            latents = torch.cat([one.latents for one in batch if one.latents is not None])
            memory = {name: _joined([one.memory[name] for one in batch]) for name in batch[0].memory}
            more = {"latents": latents, "scheduler_state": memory}
            call["latents"] = latents  # any, so that the generators stay where they are
        with self._running(len(batch)):
            return run_steered(self.pipeline, call, first=first, end=end, denoise=denoise, seen=seen, **more)

    def _decoded(self, batch: Sequence[Unfinished], latents: Float[Tensor, "n ..."]) -> Float[np.ndarray, "n h w 3"]:
        def idle(_: Any, *args: Any, **kwargs: Any) -> Any:
            return (torch.zeros_like(args[0] if args else kwargs["hidden_states"]),)

        def done(_: Any, number: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            self.pipeline._interrupt = True
            return {**tensors, "latents": latents}

        call = self._call(batch) | {"latents": latents}
        with self._running(len(batch)), replaced(denoiser_of(self.pipeline)[1], "forward", idle):
            return self.pipeline(**call, output_type="np", callback_on_step_end=done).images

    def _call(self, batch: Sequence[Unfinished]) -> dict[str, Any]:
        requests, options = [one.request for one in batch], self.options
        call = {
            "prompt": [request.prompt for request in requests],
            "num_inference_steps": options.steps,
            "guidance_scale": options.guidance_scale,
            "height": options.height,
            "width": options.width,
            "generator": [torch.Generator().manual_seed(request.seed) for request in requests],
        }
        return call | negative_prompts(self.pipeline, requests, options)

    @contextmanager
    def _running(self, count: int) -> Iterator[None]:
        with memory_told(self.pipeline, self.options, count), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers warns about calls that are its own
            yield


def check_step(share: float, total: int) -> int:
    """The number of steps that a share of a whole run is: the nearest, but not all.

    Raises:
        InputError: no share between 0 and 1, or a run of one step.
    """
    if isinstance(share, str) or not 0 < share < 1:
        raise InputError(f"check_at is {share!r}; give a share of the steps between 0 and 1, such as 0.4")
    if total < 2:
        raise InputError(f"there is nothing to check on the way of {total} step; give more steps, or check_at None")
    return min(max(round(share * total), 1), total - 1)


def _level(scheduler: Any, number: int) -> tuple[NoiseLevels, Level]:
    """The level that the denoiser is asked at in a step.

    PNDM and Heun go to a timestep twice, so their levels do not name steps and `NoiseLevels.of` refuses them; what the
    denoiser says in one step is an estimate all the same.
    """
    if hasattr(scheduler, "sigmas_interpol"):
        raise InputError(
            f"{type(scheduler).__name__} also asks between its noise levels; give the pipeline another scheduler, or "
            "check_at None"
        )
    if len(set(scheduler.timesteps.tolist())) == len(scheduler.timesteps):
        levels = NoiseLevels.of(scheduler)
        return levels, levels.levels[number]
    one = copy.copy(scheduler)
    one.timesteps = scheduler.timesteps[number : number + 1]
    if hasattr(scheduler, "sigmas"):
        one.sigmas = scheduler.sigmas[number : number + 2]
    levels = NoiseLevels.of(one)
    return levels, levels.levels[0]


def _copies(batch: Sequence[Unfinished]) -> list[torch.Generator]:
    copies = []
    for one in batch:
        generator = torch.Generator()
        if one.generator is None:
            generator.manual_seed(one.request.seed)
        else:
            generator.set_state(one.generator.get_state())
        copies.append(generator)
    return copies


def _joined(values: list[Any]) -> Any:
    """What a scheduler remembers of each image as what it remembers of a batch."""
    first = values[0]
    if isinstance(first, list):
        return [_joined(list(entries)) for entries in zip(*values, strict=True)]
    if isinstance(first, Tensor) and first.ndim > 2:
        return torch.cat(values)
    return first
