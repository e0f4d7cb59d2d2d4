"""Prompts to images, each of which can be made again: `generate`."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import logging
import operator
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from mmalign.errors import InputError
from mmalign.progress import progress_bar

from .adapters import Adapter, adapters_applied, find_adapter
from .images import GeneratedImage, refuse_folder, saved_or_free
from .pipelines import DEFAULT_MODEL, load_pipeline, pipeline_family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["generate", "generate_each"]

_BATCH_SIZE = 4
_LARGEST_SEED = 2**63 - 1


def generate(
    prompts: str | Sequence[str],
    *,
    model: str | Path | DiffusionPipeline = DEFAULT_MODEL,
    unet: str | Path | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    adapter_weight: float | Sequence[float] = 1.0,
    negative_prompt: str | Sequence[str] | None = None,
    seed: int | Sequence[int] | None = None,
    images_per_prompt: int = 1,
    steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    out: str | Path | None = None,
    progress: bool = False,
) -> list[GeneratedImage]:
    """Draw images of prompts.

    Every image starts from noise of its own seed, drawn on the CPU, so `generate(prompt, seed=image.seed)` with equal
    settings gives the same picture whatever else was in the batch (to the rounding that another batch size brings).

    Args:
        prompts: one or several; a blank one is allowed and asks for any image.
        model: whatever `load_pipeline` takes. A name is loaded anew at each call; for many calls pass a pipeline,
            which is used as it is and left as it was.
        unet: see `load_pipeline`: what `mmalign train --adaptation full` exports.
        adapter: LoRA file, folder or hub id, or several; see `find_adapter`.
        adapter_weight: one for all or one each; 1 is full strength, 0 is none.
        negative_prompt: what to move away from, one for all or one a prompt. FLUX takes none.
        seed: seed of the first image; those that follow add 1 each. Or a seed for each image. `None` draws one.
        images_per_prompt: how many images of each prompt; the images of a prompt follow each other in the result.
        steps: denoising steps; the pipeline's own number by default, as with the next three.
        guidance_scale: how strongly to follow the prompt. For FLUX it is the value the model was distilled with.
        height: in pixels, a multiple of 8 (16 for SD3 and FLUX).
        width: as `height`.
        batch_size: images denoised together, 4 by default.
        device: see `load_pipeline`.
        dtype: see `load_pipeline`.
        out: folder to save each image in as soon as its batch is done, as PNG with its settings. What is already there
            with equal settings is not made again, so a call that was stopped goes on; nothing is overwritten.
        progress: show a bar on standard error.

    Raises:
        InputError: an argument that cannot be used, an adapter that does not fit, or an image that came out as NaN.
        ModelUnavailableError: model or adapter are not on this machine and cannot be fetched.
    """
    return list(generate_each(**locals()))


def generate_each(prompts: str | Sequence[str], **options: Any) -> Iterator[GeneratedImage]:
    """`generate` an image at a time, so that any number of them fits in memory; nothing is done before the first.

    Args:
        prompts: as for `generate`.
        options: those of `generate`.
    """
    arguments = inspect.signature(generate).bind(prompts, **options)
    arguments.apply_defaults()
    given = SimpleNamespace(**arguments.arguments)
    jobs = _plan(given.prompts, given.negative_prompt, given.seed, given.images_per_prompt)
    adapters = _find_adapters(given.adapter, given.adapter_weight)
    batch_size = _positive("batch_size", given.batch_size) or _BATCH_SIZE
    if given.out is not None:
        refuse_folder(Path(given.out))
    pipeline = load_pipeline(given.model, device=given.device, dtype=given.dtype, unet=given.unet)
    call = _call_options(pipeline, given)
    settings = _settings(pipeline, given, adapters, call)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_borrowed(pipeline, ours=pipeline is not given.model))
        stack.enter_context(_without_false_alarms())
        stack.enter_context(adapters_applied(pipeline, adapters))
        advance = stack.enter_context(progress_bar("generating", total=len(jobs), enabled=given.progress))
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            images = _finish(pipeline, batch, call, settings, given.out)
            advance(len(images))
            yield from images


@dataclass(frozen=True, slots=True)
class _Job:
    number: int
    prompt: str
    negative_prompt: str | None
    seed: int


def _finish(
    pipeline: DiffusionPipeline, batch: list[_Job], call: dict[str, Any], settings: dict[str, Any], out: Any
) -> list[GeneratedImage]:
    """The images of a batch in order; with `out`, saved, or found there."""
    finished: dict[int, GeneratedImage] = {}
    places: dict[int, Path] = {}
    for job in batch if out is not None else ():
        own = settings | {"negative_prompt": job.negative_prompt}
        path, there = saved_or_free(Path(out), job.number, job.prompt, job.seed, own)
        places[job.number] = path
        if there:
            with Image.open(path) as image:
                finished[job.number] = GeneratedImage(image.convert("RGB"), job.prompt, job.seed, own, path)
    missing = [job for job in batch if job.number not in finished]
    for job, image in zip(missing, _draw(pipeline, missing, call) if missing else (), strict=True):
        own = settings | {"negative_prompt": job.negative_prompt}
        finished[job.number] = made = GeneratedImage(image, job.prompt, job.seed, own, places.get(job.number))
        if made.path is not None:
            made.save(made.path)
    return [finished[job.number] for job in batch]


def _draw(pipeline: DiffusionPipeline, jobs: list[_Job], call: dict[str, Any]) -> list[Image.Image]:
    if jobs[0].negative_prompt is not None:
        call = call | {"negative_prompt": [job.negative_prompt for job in jobs]}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers warns about calls that are its own
            pixels = pipeline(
                prompt=[job.prompt for job in jobs],
                generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
                output_type="np",
                **call,
            ).images
    except torch.OutOfMemoryError:
        size = f"{call['width']} x {call['height']}"
        raise InputError(
            f"{len(jobs)} images of {size} together do not fit in the memory of {pipeline.device}; "
            + (f"give batch_size {len(jobs) // 2}" if len(jobs) > 1 else "give a smaller size or bfloat16")
        ) from None
    for job, image in zip(jobs, pixels, strict=True):
        if not np.isfinite(image).all():
            raise InputError(
                f"image {job.number} (seed {job.seed}) came out as NaN in {_dtype(pipeline)}; give dtype bfloat16 or "
                "float32, or a VAE made for float16"
            )
    return pipeline.image_processor.numpy_to_pil(pixels)


@contextlib.contextmanager
def _borrowed(pipeline: DiffusionPipeline, ours: bool) -> Iterator[None]:
    """Quiet bars, a scheduler of our own, and, where nobody else has the pipeline, a VAE that decodes one by one."""
    bars, scheduler = getattr(pipeline, "_progress_bar_config", None), pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = copy.deepcopy(scheduler)
    if ours:
        pipeline.vae.enable_slicing()
    try:
        yield
    finally:
        pipeline.scheduler = scheduler
        if bars is None:
            del pipeline._progress_bar_config
        else:
            pipeline._progress_bar_config = bars


@contextlib.contextmanager
def _without_false_alarms() -> Iterator[None]:
    """Keep two loggers still: of a VAE cast on purpose, and of tokens before diffusers cuts them and says so."""
    names = ("diffusers.models.modeling_utils", "transformers.tokenization_utils_base")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _plan(prompts: Any, negative: Any, seed: Any, images_per_prompt: int) -> list[_Job]:
    if not isinstance(prompts, Iterable):
        raise InputError(f"prompts {prompts!r} are not text; give one or several")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise InputError("there is no prompt; give one or several")
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise InputError(f"prompt {wrong[0]!r} is not text")
    count = _positive("images_per_prompt", images_per_prompt) or 1
    negatives = [negative] * len(texts) if negative is None or isinstance(negative, str) else list(negative)
    if len(negatives) != len(texts):
        raise InputError(f"{len(negatives)} negative prompts for {len(texts)} prompts; give one, or one a prompt")
    if any(text is not None and not isinstance(text, str) for text in negatives) or (
        None in negatives and any(negatives)
    ):
        raise InputError('every negative prompt of a list has to be text; "" moves away from nothing in particular')
    seeds = _seeds(seed, len(texts) * count)
    return [_Job(number, texts[number // count], negatives[number // count], one) for number, one in enumerate(seeds)]


def _seeds(seed: Any, count: int) -> list[int]:
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    try:
        if isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str):
            seeds = [operator.index(one) for one in seed]
        else:
            seeds = [operator.index(seed) + number for number in range(count)]
    except TypeError:
        raise InputError(f"seed {seed!r} is not a whole number, or several") from None
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds for {count} images; give a seed for each image, or one to count from")
    for one in seeds:
        if not 0 <= one <= _LARGEST_SEED:
            raise InputError(f"seed {one} is out of range; give 0 to 2^63 - 1")
    return seeds


def _find_adapters(adapter: Any, weight: Any) -> list[Adapter]:
    names = [] if adapter is None else [adapter] if isinstance(adapter, (str, Path)) else list(adapter)
    weights = [weight] * len(names) if isinstance(weight, (int, float)) else list(weight)
    if len(weights) != len(names):
        raise InputError(f"{len(weights)} adapter weights for {len(names)} adapters; give one, or one each")
    for one in weights:
        if not np.isfinite(one):
            raise InputError(f"adapter weight {one} is not a finite number; 1 is full strength")
    return [find_adapter(name, float(one)) for name, one in zip(names, weights, strict=True)]


def _call_options(pipeline: DiffusionPipeline, given: SimpleNamespace) -> dict[str, Any]:
    """What is passed on to the pipeline for all images, with its own defaults filled in."""
    family = pipeline_family(pipeline)
    if family == "flux" and given.negative_prompt is not None:
        raise InputError("FLUX takes no negative prompt, as its guidance is distilled into it; leave it out")
    own = inspect.signature(type(pipeline).__call__).parameters
    steps = _positive("steps", given.steps) or own["num_inference_steps"].default
    scale = own["guidance_scale"].default if given.guidance_scale is None else float(given.guidance_scale)
    if not np.isfinite(scale) or scale < 0:
        raise InputError(
            f"guidance_scale {scale} is out of range; give 0 or more, such as the usual {own['guidance_scale'].default}"
        )
    height, width = _size(pipeline, family, given.height, given.width)
    return {"num_inference_steps": steps, "guidance_scale": scale, "height": height, "width": width}


def _size(pipeline: DiffusionPipeline, family: str, height: int | None, width: int | None) -> tuple[int, int]:
    if family == "flux":  # its transformer has no size of its own
        standard = pipeline.vae.config.sample_size
    else:
        standard = pipeline.default_sample_size if family == "sd3" else _unet_size(pipeline)
        standard *= pipeline.vae_scale_factor
    unit = pipeline.vae_scale_factor * (2 if family in ("sd3", "flux") else 1)
    sizes = []
    for name, value in (("height", height), ("width", width)):
        size = _positive(name, value) or standard
        if size % unit:
            near = max(round(size / unit), 1) * unit
            raise InputError(f"{name} {size} is not a multiple of {unit}, as this {family} model needs; give {near}")
        largest = pipeline.transformer.config.pos_embed_max_size * unit if family == "sd3" else size
        if size > largest:
            raise InputError(f"{name} {size} is more than this model knows places for; give {largest} at most")
        sizes.append(size)
    return sizes[0], sizes[1]


def _unet_size(pipeline: DiffusionPipeline) -> int:
    size = pipeline.unet.config.sample_size
    return int(size if isinstance(size, int) else max(size))


def _positive(name: str, value: Any) -> int:
    """`value`, or 0 where there is none."""
    if value is None:
        return 0
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{name} {value!r} should be a whole number from 1 on")
    return value


def _settings(
    pipeline: DiffusionPipeline, given: SimpleNamespace, adapters: list[Adapter], call: dict[str, Any]
) -> dict[str, Any]:
    import diffusers

    from mmalign import __version__

    if isinstance(given.model, (str, Path)):
        model = {"model": str(given.model)} | ({"unet": str(given.unet)} if given.unet is not None else {})
    else:  # a name says nothing of what has been done to its weights since
        name = pipeline.config.get("_name_or_path") or type(pipeline).__name__
        model = {"model": str(name), "weights": _weights(pipeline)}
    return {
        **model,
        "adapters": [adapter.to_dict() for adapter in adapters],
        "steps": call["num_inference_steps"],
        "guidance_scale": call["guidance_scale"],
        "width": call["width"],
        "height": call["height"],
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": _dtype(pipeline),
        "versions": {"mmalign": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__},
    }


def _weights(pipeline: DiffusionPipeline) -> str:
    """A short name for the denoiser's weights as they are: sums, as hashing 5 GB would take longer than an image."""
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    sums = [(p.double().sum(), p.double().square().sum()) for p in denoiser.parameters() if p.device.type != "meta"]
    values = torch.stack([value for pair in sums for value in pair]).tolist()
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _dtype(pipeline: DiffusionPipeline) -> str:
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    return str(denoiser.dtype).removeprefix("torch.")
