"""What every way of drawing shares: requests, a family's own steps and sizes, a pipeline borrowed, a batch drawn."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import operator
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import nn

from mmalign.checks import at_least, in_range
from mmalign.errors import InputError

from .pipelines import denoiser_of, pipeline_family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "ImageRequest",
    "SamplingOptions",
    "borrowed",
    "draw",
    "memory_told",
    "negative_prompts",
    "plan_requests",
    "refuse_nan",
    "sampling_options",
]

_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image to draw; `number` counts those of a call from 0, `seed` is of its noise."""

    number: int
    prompt: str
    negative_prompt: str | None
    seed: int


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How all images of a call are drawn; sizes in pixels."""

    steps: int
    guidance_scale: float
    height: int
    width: int


def plan_requests(
    prompts: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    images_per_prompt: int = 1,
    seed: int | Sequence[int] | None = None,
) -> list[ImageRequest]:
    """The images that the arguments of `generation.generate` ask for, those of a prompt one after the other.

    Raises:
        InputError: no prompt, something that is no text, or numbers that do not go together.
    """
    texts = _texts(prompts)
    at_least("images_per_prompt", images_per_prompt)
    negatives = _negative_prompts(negative_prompt, len(texts))
    seeds = _seeds(seed, len(texts) * images_per_prompt)
    places = [number // images_per_prompt for number in range(len(seeds))]
    return [
        ImageRequest(number, texts[place], negatives[place], one)
        for number, (place, one) in enumerate(zip(places, seeds, strict=True))
    ]


def sampling_options(
    pipeline: DiffusionPipeline,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
) -> SamplingOptions:
    """The options given, and for the others what the pipeline itself takes.

    Raises:
        InputError: a value that this pipeline cannot draw with.
    """
    own = inspect.signature(type(pipeline).__call__).parameters
    at_least("steps", steps)
    in_range("guidance_scale", guidance_scale, 0)
    height, width = _sizes(pipeline, height, width)
    return SamplingOptions(
        steps=int(own["num_inference_steps"].default if steps is None else steps),
        guidance_scale=float(own["guidance_scale"].default if guidance_scale is None else guidance_scale),
        height=height,
        width=width,
    )


@contextlib.contextmanager
def borrowed(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within the block a pipeline is quiet, out of training mode and has its own scheduler; then all is as it was.

    Two loggers are kept still that warn without cause: of a VAE cast on purpose, and of tokens too many before
    diffusers cuts them and says so.
    """
    bars, scheduler = getattr(pipeline, "_progress_bar_config", None), pipeline.scheduler
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    training = [module for part in parts for module in part.modules() if module.training]
    names = ("diffusers.models.modeling_utils", "transformers.tokenization_utils_base")
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = copy.deepcopy(scheduler)
    for module in training:
        module.training = False
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        for module in training:
            module.training = True
        pipeline.scheduler = scheduler
        if bars is None:
            del pipeline._progress_bar_config
        else:
            pipeline._progress_bar_config = bars


def draw(pipeline: DiffusionPipeline, requests: Sequence[ImageRequest], options: SamplingOptions) -> list[Image.Image]:
    """Draw one batch; every image starts from noise of its own seed, drawn on the CPU.

    Raises:
        InputError: negative prompts without effect, too little memory, or an image that came out as NaN.
    """
    negatives = negative_prompts(pipeline, requests, options)
    with memory_told(pipeline, options, len(requests)), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers warns about calls that are its own
        pixels = pipeline(
            prompt=[request.prompt for request in requests],
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            height=options.height,
            width=options.width,
            generator=[torch.Generator().manual_seed(request.seed) for request in requests],
            output_type="np",
            **negatives,
        ).images
    refuse_nan(pipeline, requests, pixels)
    return pipeline.image_processor.numpy_to_pil(pixels)


def negative_prompts(
    pipeline: DiffusionPipeline, requests: Sequence[ImageRequest], options: SamplingOptions
) -> dict[str, list[str | None]]:
    """The argument of a pipeline's call, where the requests have negative prompts.

    Raises:
        InputError: they would have no effect.
    """
    if requests[0].negative_prompt is None:
        return {}
    if pipeline_family(pipeline) == "flux":
        raise InputError("FLUX takes no negative prompt, as its guidance is distilled into it; leave it out")
    if options.guidance_scale <= 1:
        raise InputError(
            f"negative_prompt has no effect at guidance_scale {options.guidance_scale:g}; give more than 1, or leave "
            "it out"
        )
    return {"negative_prompt": [request.negative_prompt for request in requests]}


@contextlib.contextmanager
def memory_told(pipeline: DiffusionPipeline, options: SamplingOptions, count: int) -> Iterator[None]:
    """While `count` images are drawn together: a full device is told with the ways out.

    Raises:
        InputError: instead of torch's OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise InputError(
            f"{count} images of {options.width} x {options.height} together do not fit in the memory of "
            f"{pipeline.device}; "
            + (f"give batch_size {count // 2}" if count > 1 else "give a smaller size or bfloat16")
        ) from None


def refuse_nan(
    pipeline: DiffusionPipeline, requests: Sequence[ImageRequest], pixels: Float[np.ndarray, "n height width 3"]
) -> None:
    """Raise InputError where an image came out as NaN."""
    for request, image in zip(requests, pixels, strict=True):
        if not np.isfinite(image).all():
            dtype = str(denoiser_of(pipeline)[1].dtype).removeprefix("torch.")
            raise InputError(
                f"image {request.number} (seed {request.seed}) came out as NaN in {dtype}; give dtype bfloat16 or "
                "float32, or a VAE made for float16"
            )


def _texts(prompts: object) -> list[str]:
    if not isinstance(prompts, Iterable):
        raise InputError(f"prompts {prompts!r} are not text; give one or several")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise InputError("there is no prompt; give one or several")
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"prompt {text!r} is not text; give text")
    return texts


def _negative_prompts(negative: str | Sequence[str] | None, count: int) -> list[str | None]:
    if negative is None or isinstance(negative, str):
        return [negative] * count
    texts = list(negative)
    if len(texts) != count:
        raise InputError(f"{len(texts)} negative prompts for {count} prompts; give one, or one a prompt")
    if not all(isinstance(text, str) for text in texts):
        raise InputError('every negative prompt of a list has to be text; "" moves away from nothing in particular')
    return list(texts)


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    try:
        if isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str):
            seeds = [operator.index(one) for one in seed]
        else:
            seeds = [operator.index(seed) + number for number in range(count)]
    except TypeError:
        raise InputError(f"seed {seed!r} is not a whole number, or several; give one, or one for each image") from None
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds for {count} images; give a seed for each image, or one to count from")
    for one in seeds:
        if not 0 <= one <= _LARGEST_SEED:
            raise InputError(f"seed {one} is out of range; give 0 to 2^63 - 1")
    return seeds


def _sizes(pipeline: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int, int]:
    family = pipeline_family(pipeline)
    if family == "flux":  # its transformer has no size of its own
        standard = pipeline.vae.config.sample_size
    else:
        own = pipeline.default_sample_size if family == "sd3" else pipeline.unet.config.sample_size
        standard = (own if isinstance(own, int) else max(own)) * pipeline.vae_scale_factor
    unit = pipeline.vae_scale_factor * (2 if family in ("sd3", "flux") else 1)
    sizes = []
    for name, value in (("height", height), ("width", width)):
        at_least(name, value)
        size = int(standard if value is None else value)
        if size % unit:
            near = max(round(size / unit), 1) * unit
            raise InputError(f"{name} {size} is not a multiple of {unit}, as this {family} model needs; give {near}")
        largest = pipeline.transformer.config.pos_embed_max_size * unit if family == "sd3" else size
        if size > largest:
            raise InputError(f"{name} {size} is more than this model knows places for; give {largest} at most")
        sizes.append(size)
    return sizes[0], sizes[1]
