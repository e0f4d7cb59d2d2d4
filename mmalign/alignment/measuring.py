"""Encoders measured on a person's own captioned or labelled images, aligned ones beside their baselines."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from ..encoders import Encoder
from ..encoders.encoder import unit_rows
from ..encoders.states import Layer
from ..errors import InputError
from ..evaluation import (
    Comparison,
    ZeroShot,
    class_prompts,
    compare_retrieval,
    compare_zero_shot,
    named_templates,
)
from ..features import Features, extract_features
from ..pairs import class_folders, read_captioned
from .encoder import AlignedEncoder
from .heads import Head
from .split import unique_images

__all__ = ["evaluate_on_captions", "evaluate_zero_shot", "seen_before"]


def evaluate_on_captions(
    encoders: Mapping[str, Encoder],
    data: str | os.PathLike[str],
    *,
    split: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Comparison, list[dict[str, Any]]]:
    """Image-text retrieval of encoders over captioned images; baselines saved with an aligned encoder beside it.

    Args:
        encoders: by name, each of images and texts.
        data: see `pairs.read_captioned`.
        split: take the lines of this split alone.
        batch_size, workers, progress: see `Encoder.encode_images`.
        seed: of the resampling behind the intervals.

    Returns:
        The comparison, and the images that could not be read. Its notes say which encoder was fitted on these images.

    Raises:
        InputError: no captioned image of that split.
    """
    if not encoders:
        raise InputError("there is no encoder to measure; give at least one")
    _require_both(encoders)
    every, root = read_captioned(data)
    images = [image for image in every if image.captions and (split is None or image.split == split)]
    if not images:
        there = ", ".join(sorted({str(image.split) for image in every if image.split})) or "none"
        raise InputError(
            f"{os.fspath(data)!r} has no captioned image of split {split!r}; there is {there}; leave split out for all"
        )
    files = [root / image.file for image in images]
    captions = [caption for image in images for caption in image.captions]
    owner = np.repeat(np.arange(len(images)), [len(image.captions) for image in images])
    encoded: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    usable, notes = np.ones(len(images), bool), []
    skipped: dict[int, dict[str, Any]] = {}
    for name, encoder in encoders.items():
        sides = {
            "image": _features(encoder, "image", files, batch_size, workers, progress),
            "text": _features(encoder, "text", captions, batch_size, None, progress),
        }
        usable &= sides["image"].usable
        content = sides["image"].content
        skipped |= {entry["row"]: entry for entry in sides["image"].skipped}
        notes += seen_before(name, encoder, sides["image"])
        images_raw, texts_raw = _raw(sides["image"]), _raw(sides["text"])
        for label, _, heads in _heads(name, encoder):
            encoded[label] = (
                unit_rows(images_raw if heads is None else _mapped(heads["image"], images_raw)),
                unit_rows(texts_raw if heads is None else _mapped(heads["text"], texts_raw)),
            )
    if not usable.any():
        raise InputError(f"none of {len(images)} images can be read (first: {os.fspath(files[0])!r}); check the paths")
    kept, texts, owner = unique_images(content, usable, owner)
    encoded = {name: (rows[kept], words[texts]) for name, (rows, words) in encoded.items()}
    comparison = compare_retrieval(encoded, owner, seed=seed)
    comparison.notes.extend(notes)
    return comparison, list(skipped.values())


def evaluate_zero_shot(
    encoders: Mapping[str, Encoder],
    folder: str | os.PathLike[str],
    *,
    templates: str | Sequence[str] = "simple",
    batch_size: int | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> tuple[ZeroShot, list[dict[str, Any]]]:
    """Zero-shot classification of images that lie in one subfolder a class; baselines beside aligned encoders.

    Args:
        encoders: by name, each of images and texts.
        folder: its subfolders are named as the classes, `_` standing for a blank.
        templates: see `evaluation.named_templates`.
        batch_size, workers, progress: see `Encoder.encode_images`.

    Returns:
        The figures, and the images that could not be read.

    Raises:
        InputError: fewer than two subfolders with images.
    """
    _require_both(encoders)
    texts = named_templates(templates) if isinstance(templates, str) else list(templates)
    class_prompts(["any"], texts)
    root = Path(folder)
    images = class_folders(root)
    files = [root / image.file for image in images]
    labels = [str(image.label).replace("_", " ") for image in images]
    if len(set(labels)) < 2:
        raise InputError(
            f"{str(root)!r} has {len(set(labels))} subfolders with images; give a folder with one for each class"
        )
    usable, notes = np.ones(len(files), bool), []
    skipped: dict[int, dict[str, Any]] = {}
    rows: dict[str, np.ndarray] = {}
    judges: dict[str, Encoder] = {}
    for name, encoder in encoders.items():
        found = _features(encoder, "image", files, batch_size, workers, progress)
        usable &= found.usable
        skipped |= {entry["row"]: entry for entry in found.skipped}
        notes += seen_before(name, encoder, found)
        raw = _raw(found)
        for label, kind, heads in _heads(name, encoder):
            rows[label] = unit_rows(raw if heads is None else _mapped(heads["image"], raw))
            judges[label] = encoder.variant(kind) if isinstance(encoder, AlignedEncoder) else encoder
    kept = [label for label, keep in zip(labels, usable, strict=True) if keep]
    rows = {name: array[usable] for name, array in rows.items()}
    result = compare_zero_shot(judges, rows, kept, templates=texts, batch_size=batch_size)
    result.notes.extend(notes)
    return result, list(skipped.values())


def _require_both(encoders: Mapping[str, Encoder]) -> None:
    for encoder in encoders.values():
        encoder.require("image")
        encoder.require("text")


def seen_before(name: str, encoder: Encoder, images: Features) -> list[str]:
    """A note where an aligned encoder is, or may be, about to be measured on what it was fitted on."""
    if not isinstance(encoder, AlignedEncoder):
        return []
    if not encoder.fitted_on:
        return [f"which images {name} was fitted on is not known; its figures are too good if they are among these"]
    known = sum(digest in encoder.fitted_on for digest in images.content)
    if not known:
        return []
    return [
        f"{name} was fitted on {known:,} of these {len(images):,} images, so that its figures and its baselines' are "
        "too good; measure on other images"
    ]


def _features(
    encoder: Encoder,
    side: Literal["image", "text"],
    items: Sequence[Any],
    batch_size: int | None,
    workers: int | None,
    progress: bool,
) -> Features:
    """Raw features, of the layer that an aligned encoder reads."""
    tower: Encoder = encoder
    layer: Layer = "output"
    pooling: Literal["cls", "mean"] | None = None
    if isinstance(encoder, AlignedEncoder):
        own = encoder.image_encoder if side == "image" else encoder.text_encoder
        tower, layer, pooling = own.encoder, own.layer, own.pooling
    return extract_features(
        tower,
        items,
        modality=side,
        layers=[layer],
        pooling=pooling,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
    )


def _raw(features: Features) -> Float[torch.Tensor, "n dim"]:
    return torch.from_numpy(np.array(next(iter(features.layers.values())), np.float32))


def _heads(name: str, encoder: Encoder) -> list[tuple[str, str, Mapping[str, Head] | None]]:
    """Label, kind and heads of all that an encoder has to show; a plain one has no heads."""
    if not isinstance(encoder, AlignedEncoder):
        return [(name, "", None)]
    return [(f"{name}: {kind}", kind, heads) for kind, heads in encoder.heads().items()]


@torch.inference_mode()
def _mapped(head: Head, raw: Float[torch.Tensor, "n dim"]) -> Float[torch.Tensor, "n out"]:
    return head(raw.to(head.centre.device))
