"""The method beside its baselines: the same pairs to fit on, the same images to measure on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int

from ..evaluation import compare_retrieval
from ..metrics import opis
from ..provenance import libraries, written_now
from .aligning import align
from .result import Alignment
from .split import PairSubset

__all__ = ["BASELINES", "encoded_by", "fit_beside_baselines", "report_of"]

BASELINES = ("ridge", "cca")
_BASELINE_VALIDATION = 0.1


def fit_beside_baselines(
    training: PairSubset,
    method: str,
    options: Mapping[str, Any],
    *,
    validation: float | Bool[np.ndarray, " n"],
    groups: Sequence[object] | None = None,
    labels: Sequence[object] | None = None,
    device: str | torch.device | None,
    seed: int,
    progress: bool,
) -> dict[str, Alignment]:
    """The baselines and, last, the method, all on the same pairs; see `align`."""
    fits: dict[str, Alignment] = {}
    for name in [*(name for name in BASELINES if name != method), method]:
        own = name == method
        share = validation
        if not own and isinstance(validation, (int, float)):
            # Closed forms choose their regularisation on held-out pairs, and are fitted on all of them after that.
            share = validation or _BASELINE_VALIDATION
        fits[name] = align(
            training.images,
            training.texts,
            method=name,
            owner=training.owner,
            labels=labels if own else None,
            groups=groups,
            validation=share,
            device=device,
            seed=seed,
            progress=progress and own,
            **(options if own else {}),
        )
    return fits


def encoded_by(fits: Mapping[str, Alignment], measured: PairSubset) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Unit rows of images and of texts, by the name of the method."""
    return {
        name: (fit.encode("image", measured.images), fit.encode("text", measured.texts)) for name, fit in fits.items()
    }


def report_of(
    fits: Mapping[str, Alignment],
    encoded: Mapping[str, tuple[np.ndarray, np.ndarray]],
    measured: PairSubset,
    seed: int,
    *,
    images: int,
    captions: int,
    **more: Any,
) -> dict[str, Any]:
    """What was measured and how it was fitted, JSON-safe; the method is the last of the fits."""
    *baselines, method = fits
    fit = fits[method]
    return {
        "retrieval": compare_retrieval(encoded, measured.owner, seed=seed).to_dict(),
        "opis": opis_figures(encoded, measured.owner),
        "zero_shot": None,
        "layers": None,
        "skipped": [],
        "pairs": {
            "images": images,
            "captions": captions,
            "training": fit.counts["image"]["rows"],
            "held_out": fit.counts["image"]["held_out"],
            "test": len(measured.rows),
        },
        "sources": {side: asdict(source) for side, source in fit.sources.items()},
        "fit": fit.summary(),
        "baselines": {name: fits[name].learned for name in baselines},
        "history": fit.history,
        "libraries": libraries(),
        "written": written_now(),
        **more,
    }


def opis_figures(
    encoded: Mapping[str, tuple[np.ndarray, np.ndarray]], owner: Int[np.ndarray, " m"]
) -> dict[str, dict[str, float]]:
    """How much one threshold means different things for different images; see `metrics.opis`."""
    out: dict[str, dict[str, float]] = {}
    if int(owner.max()) < 1:
        return out
    for name, (images, texts) in encoded.items():
        found = opis(images, np.arange(len(images)), gallery=texts, gallery_labels=owner)
        out[name] = {"opis": float(found.opis), "d_min": float(found.d_min), "d_max": float(found.d_max)}
    return out
