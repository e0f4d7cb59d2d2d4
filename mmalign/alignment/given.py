"""Aligning features that are there already: tables of one's own, with or without the encoders that made them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from ..checks import in_range
from ..encoders import Encoder, load_encoder
from ..errors import InputError, reason_of
from ..features import Features, FeatureSet, load_features
from .aligning import checked_owner
from .baselines import encoded_by, fit_beside_baselines, report_of
from .encoder import TowerEncoder
from .fitting import TEXT
from .heads import FrameHead
from .methods import METHODS, options_of
from .report import AlignmentRun
from .result import FeatureSource
from .split import PairSubset, grouped, held_out

__all__ = ["align_features"]


def align_features(
    image_features: FeatureSet,
    text_features: FeatureSet,
    out: str | os.PathLike[str] | None,
    *,
    owner: Sequence[int] | Int[np.ndarray, " m"] | str | os.PathLike[str] | None = None,
    groups: Sequence[object] | None = None,
    method: str = "structure",
    options: Mapping[str, Any] | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    image_encoder: str | os.PathLike[str] | Encoder | None = None,
    text_encoder: str | os.PathLike[str] | Encoder | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = False,
) -> AlignmentRun:
    """As `align_encoders`, for features that have been extracted: the same baselines, split and report.

    Args:
        image_features: [n, image_dim], raw: a `.npy` file, a folder of `extract_features`, `Features` or an array.
        text_features: [m, text_dim] likewise.
        out: folder that is made: an encoder if both encoders are given, else an alignment (`load_alignment`); `None`
            saves nothing.
        owner: the image row that each text describes, or a `.npy` file of them; text i describes image i by default.
        groups: images of one group stay on one side. Equal rows always do.
        method: see `align`.
        options: of the method.
        validation: share of the training images held out while fitting.
        test: share of the images to measure on.
        image_encoder: whose own features (layer "output") the images' are; makes the result an encoder.
        text_encoder: likewise.
        device: where to load encoders and fit heads; the fastest present by default.
        seed: of splits and fit.
        progress: show a bar.

    Raises:
        InputError: rows that do not pair up or are not finite (named), one encoder without the other or of another
            width, or `out` exists and is neither an encoder nor an alignment.
        EncoderMismatchError: features of another encoder than the one given.
    """
    options_of(method, options or {})
    if not METHODS[method].paired:
        raise InputError(f"method {method!r} is for sets that are not paired; call `align` for it")
    in_range("validation", validation, 0, 0.9)
    in_range("test", test, 0, 0.9)
    given = [one for one in (image_encoder, text_encoder) if one is not None]
    if len(given) == 1:
        raise InputError("one encoder is given without the other; give image_encoder and text_encoder, or neither")
    kind = "encoder.json" if given else "alignment.json"
    if out is not None and Path(out).exists() and not (Path(out) / kind).is_file():
        raise InputError(f"{os.fspath(out)!r} exists and holds no {kind}; choose another path")
    images, texts = load_features(image_features), load_features(text_features)
    towers = [one if isinstance(one, Encoder) else load_encoder(one, device=device) for one in given]
    for tower, features, side in zip(towers, (images, texts), ("image", TEXT), strict=False):
        features.require_encoder(tower)
        _require_tower(tower, features, side)
    if isinstance(owner, (str, os.PathLike)):
        owner = _owner_file(Path(owner))
    whose = checked_owner("image", len(images), len(texts), owner)
    # Rows that could not be read are like no other.
    columns: list[Sequence[object]] = [[digest or None for digest in images.content]]
    if groups is not None:
        if len(groups) != len(images):
            raise InputError(f"groups are {len(groups)} for {len(images)} images; give one an image")
        columns.append(groups)
    numbers = grouped(*columns)
    described = np.bincount(whose, minlength=len(images)) > 0
    usable = images.usable & described
    tested = np.zeros(len(images), bool)
    tested[np.flatnonzero(usable)[held_out(numbers[usable], test, seed)]] = True

    training = PairSubset.of(images, texts, whose, usable & ~tested)
    fits = fit_beside_baselines(
        training,
        method,
        options or {},
        validation=validation,
        groups=numbers[training.rows].tolist(),
        device=device,
        seed=seed,
        progress=progress,
    )
    measured = PairSubset.of(images, texts, whose, tested)
    alignment = fits[method]
    warnings = [*alignment.warnings]
    if left_out := int((~usable).sum()):
        warnings.append(f"{left_out} images could not be read or have no text, and are left out")
    report = report_of(
        fits,
        encoded_by(fits, measured),
        measured,
        seed,
        images=len(images),
        captions=len(texts),
        warnings=warnings,
        skipped=images.skipped,
    )
    alignment.report = report
    if not towers:
        folder = None if out is None else alignment.save(out)
        return AlignmentRun(None, alignment, report, folder, warnings)
    encoder = alignment.encoder(*towers)
    encoder.baselines = {name: dict(fit.heads) for name, fit in fits.items() if name != method}
    if images.encoder is not None:  # else they are hashes of rows, not of image files
        encoder.fitted_on = frozenset(training.images.content)
    encoder.report = report
    return AlignmentRun(encoder, alignment, report, None if out is None else encoder.save(out), warnings)


def _require_tower(encoder: Encoder, features: Features, side: str) -> None:
    """Check that the encoder gives such features, before anything is fitted on them."""
    for layer, rows in features.layers.items():
        source = FeatureSource.of(features, layer, rows.shape[1])
        TowerEncoder(encoder, side, FrameHead(source.dim, source.dim), layer=layer, pooling=source.pooling)


def _owner_file(path: Path) -> Int[np.ndarray, " m"]:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "it is no .npy file"
        raise InputError(f"owner {str(path)!r} cannot be read ({reason}); give a .npy file of whole numbers") from None
