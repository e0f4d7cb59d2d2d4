"""Prompts to images, each of which can be made again: `generate`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from mmalign.checks import at_least
from mmalign.errors import InputError
from mmalign.progress import progress_bar
from mmalign.provenance import libraries

from .adapters import Adapter, adapters_applied, find_adapters
from .drawing import ImageRequest, SamplingOptions, borrowed, draw, plan_requests, sampling_options
from .images import GeneratedImage, read_settings, refuse_folder, saved_or_free
from .pipelines import DEFAULT_MODEL, denoiser_of, load_pipeline, pipeline_fingerprints

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["drawn_with", "generate", "generate_again", "generate_each", "model_name"]

_BATCH_SIZE = 4


def generate(
    prompts: str | Sequence[str],
    *,
    model: str | os.PathLike[str] | DiffusionPipeline = DEFAULT_MODEL,
    unet: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    adapter_weight: float | Sequence[float] = 1.0,
    negative_prompt: str | Sequence[str] | None = None,
    images_per_prompt: int = 1,
    steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    out: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    batch_size: int | None = None,
    seed: int | Sequence[int] | None = None,
    progress: bool = False,
) -> list[GeneratedImage]:
    """Draw images of prompts.

    Every image starts from noise of its own seed, drawn on the CPU, so `generate(prompt, seed=image.seed)` with equal
    settings gives the same picture whatever else was in the batch (to the rounding that another batch size brings).
    `generate_again` does so from an image, or its file.

    Args:
        prompts: one or several; a blank one is allowed and asks for any image.
        model: whatever `load_pipeline` takes. A name is loaded anew at each call; for many calls pass a pipeline,
            which is used as it is and left as it was.
        unet: see `load_pipeline`: what `mmalign train --adaptation full` exports.
        adapter: LoRA or soft tokens by file, folder or hub id, or several; see `find_adapter`.
        adapter_weight: one for all or one each; 1 is full strength, 0 is none. Soft tokens know these two.
        negative_prompt: what to move away from, one for all or one a prompt. FLUX takes none.
        images_per_prompt: how many images of each prompt; the images of a prompt follow each other in the result.
        steps: denoising steps; the pipeline's own number by default, as with the next three.
        guidance_scale: how strongly to follow the prompt. For FLUX it is the value the model was distilled with.
        height: in pixels, a multiple of 8 (16 for SD3 and FLUX).
        width: as `height`.
        out: folder to save each image in as soon as its batch is done, as PNG with its settings. What is already there
            with equal settings, weights included, is not made again, so a call that was stopped goes on; nothing is
            overwritten.
        device: see `load_pipeline`.
        dtype: see `load_pipeline`.
        batch_size: images denoised together, 4 by default.
        seed: seed of the first image; those that follow add 1 each. Or a seed for each image. `None` draws one.
        progress: show a bar on standard error.

    Raises:
        InputError: an argument that cannot be used, an adapter that does not fit, or an image that came out as NaN.
        ModelUnavailableError: model or adapter are not on this machine and cannot be fetched.
    """
    images = generate_each(
        prompts,
        model=model,
        unet=unet,
        adapter=adapter,
        adapter_weight=adapter_weight,
        negative_prompt=negative_prompt,
        images_per_prompt=images_per_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        out=out,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    return list(images)


def generate_each(
    prompts: str | Sequence[str],
    *,
    model: str | os.PathLike[str] | DiffusionPipeline = DEFAULT_MODEL,
    unet: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    adapter_weight: float | Sequence[float] = 1.0,
    negative_prompt: str | Sequence[str] | None = None,
    images_per_prompt: int = 1,
    steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    out: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    batch_size: int | None = None,
    seed: int | Sequence[int] | None = None,
    progress: bool = False,
) -> Iterator[GeneratedImage]:
    """`generate` an image at a time, with the same arguments, so that any number of them fits in memory.

    Arguments are looked at by the call, as far as they can be without the model, which is loaded for the first image.
    """
    requests = plan_requests(prompts, negative_prompt=negative_prompt, images_per_prompt=images_per_prompt, seed=seed)
    adapters = find_adapters(adapter, adapter_weight)
    at_least("batch_size", batch_size)
    size = int(batch_size or _BATCH_SIZE)
    folder = None if out is None else Path(out)
    if folder is not None:
        refuse_folder(folder)

    def images() -> Iterator[GeneratedImage]:
        pipeline = load_pipeline(model, device=device, dtype=dtype, unet=unet)
        if pipeline is not model:
            pipeline.vae.enable_slicing()
        options = sampling_options(pipeline, steps=steps, guidance_scale=guidance_scale, height=height, width=width)
        name = model_name(model, pipeline) | ({} if unet is None else {"unet": os.fspath(unet)})
        settings = name | drawn_with(pipeline, adapters, options)
        with contextlib.ExitStack() as stack:
            stack.enter_context(borrowed(pipeline))
            stack.enter_context(adapters_applied(pipeline, adapters))
            advance = stack.enter_context(progress_bar("generating", total=len(requests), enabled=progress))
            for start in range(0, len(requests), size):
                batch = _finish(pipeline, requests[start : start + size], options, settings, folder)
                advance(len(batch))
                yield from batch

    return images()


def generate_again(
    image: GeneratedImage | str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | DiffusionPipeline | None = None,
    device: str | torch.device | None = None,
) -> GeneratedImage:
    """Draw an image once more from its settings: the same pixels on the same device with the same libraries.

    An image that was drawn in a batch may differ by the rounding that another batch size brings. Its settings name
    model and adapters as they were first given.

    Args:
        image: a generated image, or the file that one was saved as.
        model: where its model is now, or the pipeline itself, if the name in the settings does not lead there.
        device: see `load_pipeline`.

    Raises:
        InputError: the file carries no settings, or model or adapters are not those that it was drawn with.
        ModelUnavailableError: they are not on this machine and cannot be fetched.
    """
    if isinstance(image, GeneratedImage):
        made = {"prompt": image.prompt, "seed": image.seed, **image.settings}
    else:
        made = read_settings(image)
    try:
        adapters = find_adapters(
            [adapter["adapter"] for adapter in made["adapters"]], [adapter["weight"] for adapter in made["adapters"]]
        )
        if model is None or isinstance(model, (str, os.PathLike)):
            unet = made.get("unet") if model is None else None
            pipeline = load_pipeline(model or made["model"], device=device, dtype=made["dtype"], unet=unet)
        else:
            pipeline = load_pipeline(model, device=device)
        _refuse_others(made, pipeline, adapters)
        (again,) = generate_each(
            made["prompt"],
            model=pipeline,
            adapter=[adapter.file for adapter in adapters],
            adapter_weight=[adapter.weight for adapter in adapters],
            seed=made["seed"],
            **{name: made[name] for name in ("negative_prompt", "steps", "guidance_scale", "height", "width")},
        )
    except KeyError as missing:
        raise InputError(f"the settings lack {missing}, so the image cannot be drawn again; give another") from None
    names = {name: made[name] for name in ("model", "unet", "adapters") if name in made}
    return replace(again, settings=names | {name: value for name, value in again.settings.items() if name not in names})


def _refuse_others(made: dict[str, Any], pipeline: DiffusionPipeline, adapters: Sequence[Adapter]) -> None:
    """Before anything is drawn: what would give another picture, by content."""
    own = pipeline_fingerprints(pipeline)
    others = [name for name, known in made["fingerprints"].items() if own.get(name) != known]
    if others:
        raise InputError(
            f"{' and '.join(others)} of {made['model']!r} are not those that the image was drawn with; "
            "give the model that has them"
        )
    for adapter, known in zip(adapters, made["adapters"], strict=True):
        if adapter.to_dict()["sha256"] != known["sha256"]:
            raise InputError(f"adapter {adapter.name} is not the file that the image was drawn with; restore that one")


def _finish(
    pipeline: DiffusionPipeline,
    batch: list[ImageRequest],
    options: SamplingOptions,
    settings: dict[str, Any],
    folder: Path | None,
) -> list[GeneratedImage]:
    """The images of a batch in order; with a folder, saved, or found there."""
    own = [settings | {"negative_prompt": request.negative_prompt} for request in batch]
    places: list[tuple[Path | None, bool]] = [(None, False)] * len(batch)
    if folder is not None:
        places = [saved_or_free(folder, r.number, r.prompt, r.seed, of) for r, of in zip(batch, own, strict=True)]
    missing = [request for request, (_, there) in zip(batch, places, strict=True) if not there]
    drawn = iter(draw(pipeline, missing, options) if missing else ())
    finished = []
    for request, of, (path, there) in zip(batch, own, places, strict=True):
        if path is not None and there:
            with Image.open(path) as saved:
                image = saved.convert("RGB")
        else:
            image = next(drawn)
        made = GeneratedImage(image, request.prompt, request.seed, of, path)
        if path is not None and not there:
            made.save(path)
        finished.append(made)
    return finished


def model_name(model: str | os.PathLike[str] | DiffusionPipeline, pipeline: DiffusionPipeline) -> dict[str, str]:
    """How an image's settings call the model that was asked for."""
    if isinstance(model, (str, os.PathLike)):
        return {"model": os.fspath(model)}
    return {"model": str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)}


def drawn_with(pipeline: DiffusionPipeline, adapters: Sequence[Adapter], options: SamplingOptions) -> dict[str, Any]:
    """An image's settings beside model, prompts and seed."""
    return {
        "fingerprints": pipeline_fingerprints(pipeline),
        "adapters": [adapter.to_dict() for adapter in adapters],
        **asdict(options),
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": str(denoiser_of(pipeline)[1].dtype).removeprefix("torch."),
        "libraries": libraries("diffusers"),
    }
