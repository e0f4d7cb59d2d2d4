"""`align`: features of frozen encoders in, fitted heads out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from ..checks import at_least, one_of
from ..device import resolve_device
from ..encoders.states import Layer
from ..errors import InputError
from ..features import Features, FeatureSet, load_features
from ..metrics._arrays import as_numpy
from .fitting import TEXT, PairedRows
from .methods import METHODS, options_of
from .result import Alignment, FeatureSource
from .split import grouped, held_out, shared_content

__all__ = ["Pairs", "align", "align_many", "checked_owner"]


@dataclass(frozen=True)
class Pairs:
    """Features of one modality and of the texts that describe its rows.

    Attributes:
        rows: [n, dim]; `Features`, a `.npy` file, a cache folder or an array.
        texts: [m, text_dim] likewise.
        owner: the row that each text describes, 0 to n - 1; row i has text i by default.
        labels: class of each row, for losses and reports that need classes.
        groups: rows of one group stay together when some are held out.
    """

    rows: FeatureSet
    texts: FeatureSet
    owner: Sequence[int] | Int[np.ndarray, " m"] | None = None
    labels: Sequence[object] | None = None
    groups: Sequence[object] | None = None


def align(
    image_features: FeatureSet,
    text_features: FeatureSet,
    *,
    method: str = "structure",
    owner: Sequence[int] | Int[np.ndarray, " m"] | None = None,
    labels: Sequence[object] | None = None,
    groups: Sequence[object] | None = None,
    validation: float | Bool[np.ndarray, " n"] = 0.1,
    unpaired_images: FeatureSet | None = None,
    unpaired_texts: FeatureSet | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Alignment:
    """Fit heads that bring the features of two frozen encoders into one space.

    Args:
        image_features: [n, image_dim], raw (not normalised); `Features`, a `.npy` file, a cache folder or an array.
        text_features: [m, text_dim] likewise.
        method: a name of `METHODS`: structure, clip, siglip, ape (trained); ridge, cca, procrustes, asif (closed
            forms); mini-vec2vec (no pairs: the two sets need not belong together).
        owner: the image row that each text describes; text i describes image i by default.
        labels: class of each image; for `intra_dispersion`.
        groups: images of one group are held out together or not at all. Rows of equal content are one image, with the
            texts of all of them.
        validation: share of the images held out for early stopping, and for choosing a closed form's regularisation; or
            a mask of the rows to hold out. 0 holds out nothing. Closed forms end with a fit on all rows, held out or
            not: measure on other rows.
        unpaired_images: further image features, for STRUCTURE's regulariser.
        unpaired_texts: further text features, likewise.
        device: where to fit; the fastest present by default.
        seed: of the split, initial weights and order; the same seed gives the same heads.
        progress: show a bar.
        options: of the method; see `FitOptions`, `CCAOptions`, `RidgeOptions`, `ASIFOptions`, `MiniVec2VecOptions`.

    Raises:
        InputError: rows that do not pair up, that are not finite (named), too few, or an option the method lacks.
        EncoderMismatchError: unpaired features of another encoder.
    """
    unpaired = {"image": unpaired_images, TEXT: unpaired_texts}
    return align_many(
        {"image": Pairs(image_features, text_features, owner, labels, groups)},
        method=method,
        validation=validation,
        unpaired={name: rows for name, rows in unpaired.items() if rows is not None},
        device=device,
        seed=seed,
        progress=progress,
        **options,
    )


def align_many(
    modalities: Mapping[str, Pairs],
    *,
    method: str = "structure",
    validation: float | Bool[np.ndarray, " n"] | Mapping[str, Bool[np.ndarray, " n"]] = 0.1,
    unpaired: Mapping[str, FeatureSet] | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Alignment:
    """Bind any number of modalities to the space of texts (LanguageBind, arXiv 2310.01852, on frozen features).

    Each modality comes with texts of its own; no row needs more than one modality. All texts are of one encoder and go
    through one head, so that modalities that were never paired with each other meet there.

    Args:
        modalities: pairs by name, such as {"image": Pairs(...), "audio": Pairs(...)}; "text" names the texts.
        method: one that takes many modalities, if there are more than one: structure, clip, siglip, ape, ridge,
            procrustes.
        validation: see `align`; masks by modality are taken too.
        unpaired: further rows by modality (or "text"), for STRUCTURE's regulariser.
        device, seed, progress, options: see `align`.

    Raises:
        InputError: as `align`, or a modality named "text", or texts of different widths.
        EncoderMismatchError: texts of different encoders, or unpaired features of another one.
    """
    at_least("seed", seed, 0)
    chosen = options_of(method, options)
    entry = METHODS[method]
    if TEXT in modalities or not modalities:
        raise InputError("modalities are those besides 'text', at least one; name them image, audio, depth or alike")
    if unpaired and not getattr(chosen, "structure", 0):
        raise InputError(f"unpaired rows are for STRUCTURE's regulariser, which method {method!r} does without here")
    masks = validation if isinstance(validation, Mapping) else {}
    for what, names, known in (("validation", masks, modalities), ("unpaired", unpaired or (), [*modalities, TEXT])):
        for name in names:
            one_of(f"a modality of {what}", name, known)
    for name, pairs in modalities.items():
        if not isinstance(pairs, Pairs):
            raise InputError(f"modality {name} is a {type(pairs).__name__}; give Pairs(rows, texts)")
    where = resolve_device(device)
    prepared = {name: _Prepared.of(name, pairs, paired=entry.paired) for name, pairs in modalities.items()}
    warnings = [warning for one in prepared.values() for warning in one.warnings]
    widths = {name: one.texts.shape[1] for name, one in prepared.items()}
    if len(set(widths.values())) > 1:
        raise InputError(f"texts have different widths ({widths}); take one text encoder for all modalities")
    first = next(iter(prepared.values()))
    for one in prepared.values():
        first.text_source.require(one.text_features, TEXT)
    if getattr(chosen, "intra_dispersion", 0) and any(one.labels is None for one in prepared.values()):
        raise InputError("intra_dispersion pulls images of one label together, and there are no labels; give labels")

    training: dict[str, PairedRows] = {}
    held: dict[str, PairedRows] = {}
    for name, one in prepared.items():
        rows = one.tensors(where)
        given = validation.get(name, 0.0) if isinstance(validation, Mapping) else validation
        mask = one.mask(given, seed) if entry.paired else np.zeros(len(one.rows), bool)
        training[name] = rows.take(~mask) if mask.any() else rows
        if mask.any():
            held[name] = rows.take(mask)
    sources = {name: one.source for name, one in prepared.items()} | {TEXT: first.text_source}
    extra = {name: _unpaired(name, load_features(rows), sources[name]) for name, rows in (unpaired or {}).items()}
    fitted = entry.fit(
        training,
        held or None,
        chosen,
        unpaired={name: rows.to(where) for name, rows in extra.items()},
        seed=seed,
        progress=progress,
    )
    return Alignment(
        heads={name: fitted.heads[name].cpu().eval().requires_grad_(False) for name in sources},
        method=method,
        options=dataclasses.asdict(chosen),
        sources=sources,
        counts={
            name: {
                "rows": len(training[name].rows),
                "texts": len(training[name].owner),
                "held_out": len(held[name].rows) if name in held else 0,
            }
            for name in training
        },
        step=fitted.step,
        stopped=fitted.stopped,
        learned=fitted.learned,
        history=fitted.history,
        warnings=[*warnings, *fitted.warnings],
        seed=seed,
    )


def _one_layer(features: Features, name: str) -> tuple[Layer, np.ndarray]:
    """The only layer of features, as float32."""
    if len(features.layers) != 1:
        raise InputError(
            f"features of {name} hold the layers {', '.join(map(str, features.layers))}; choose one, as in "
            "`features.only(LAYER)`"
        )
    layer = next(iter(features.layers))
    return layer, _finite(features, layer, name)


def _finite(features: Features, layer: Layer, name: str) -> np.ndarray:
    """One layer as float32."""
    with np.errstate(over="ignore"):
        rows = np.array(features[layer], dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        named = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise InputError(
            f"features of {name} are not finite in float32 in {len(bad)} of {len(rows)} rows ({named}); leave them out"
        )
    return rows


def _unpaired(name: str, features: Features, source: FeatureSource) -> Float[torch.Tensor, "k dim"]:
    """Further rows of what a head is fitted on."""
    layer = source.require(features, name)
    return torch.from_numpy(_finite(features, layer, name)[features.usable])


@dataclass
class _Prepared:
    """Features of one modality, checked: one row for each content that can be read and has a text."""

    rows: Float[np.ndarray, "n dim"]
    texts: Float[np.ndarray, "m text_dim"]
    owner: Int[np.ndarray, " m"]
    labels: Int[np.ndarray, " n"] | None
    given_groups: Int[np.ndarray, " given"]
    used: Bool[np.ndarray, " given"]
    kept: Int[np.ndarray, " n"]
    source: FeatureSource
    text_source: FeatureSource
    text_features: Features
    warnings: list[str]

    @classmethod
    def of(cls, name: str, pairs: Pairs, *, paired: bool) -> _Prepared:
        features, texts = load_features(pairs.rows), load_features(pairs.texts)
        layer, rows = _one_layer(features, name)
        text_layer, text_rows = _one_layer(texts, TEXT)
        n, m = len(rows), len(text_rows)
        for what, column in (("labels", pairs.labels), ("groups", pairs.groups)):
            if column is not None and len(column) != n:
                raise InputError(f"{what} are {len(column)} for {n} rows of {name}; give one a row")
        if pairs.labels is not None and None in (labels := list(pairs.labels)):
            raise InputError(f"label {labels.index(None)} of {name} is None; give every row a label, or no labels")
        used, kept, warnings = features.usable, np.flatnonzero(features.usable), []
        if unreadable := int((~used).sum()):
            warnings.append(f"{unreadable} rows of {name} could not be read and are left out")
        owner, text_place = np.zeros(m, np.int64), np.flatnonzero(texts.usable)
        if paired:
            owner = checked_owner(name, n, m, pairs.owner)
            text_place = np.flatnonzero(texts.usable & used[owner])
            described = np.bincount(owner[text_place], minlength=n) > 0
            if without := int((used & ~described).sum()):
                warnings.append(f"{without} rows of {name} have no text and are left out")
            used = used & described
            original = _originals([digest if use else "" for digest, use in zip(features.content, used, strict=True)])
            kept = np.unique(original[used])
            if copies := int(used.sum()) - len(kept):
                warnings.append(f"{copies} rows of {name} are copies of others; each counts once, with all its texts")
            place = np.full(n, -1)
            place[kept] = np.arange(len(kept))
            owner = place[original[owner]]
        elif not (pairs.owner is None and pairs.labels is None and pairs.groups is None):
            raise InputError("owner, labels and groups are for pairs, and this method takes none; leave them out")
        if len(kept) < 4:
            raise InputError(f"{len(kept)} rows of {name} can be used; give at least 4 pairs, better a thousand")
        columns: list[Sequence[object]] = [[digest or None for digest in features.content]]
        if pairs.groups is not None:
            columns.append(pairs.groups)
        return cls(
            rows=rows[kept],
            texts=text_rows[text_place],
            owner=owner[text_place],
            labels=None
            if pairs.labels is None
            else np.unique(list(map(str, pairs.labels)), return_inverse=True)[1][kept],
            given_groups=grouped(*columns),
            used=used,
            kept=kept,
            source=FeatureSource.of(features, layer, rows.shape[1]),
            text_source=FeatureSource.of(texts, text_layer, text_rows.shape[1]),
            text_features=texts,
            warnings=warnings,
        )

    def mask(self, validation: float | np.ndarray, seed: int) -> Bool[np.ndarray, " n"]:
        """Which rows to hold out."""
        groups = self.given_groups
        if isinstance(validation, (int, float)):
            if validation == 0:
                return np.zeros(len(self.rows), bool)
            mask = held_out(groups[self.kept], validation, seed)
        else:
            given = np.asarray(validation)
            if given.dtype != bool or given.shape != groups.shape:
                raise InputError(
                    f"validation is {given.dtype} of shape {given.shape}; give a share, or one True or False for each "
                    f"of the {len(groups)} rows"
                )
            separated = shared_content(list(map(str, groups)), self.used & given, self.used & ~given)
            if separated:
                held, trained = separated[0]
                raise InputError(
                    f"{len(separated)} rows to train on have copies (equal content or group) among those held out "
                    f"(rows {trained} and {held}, for one); hold out all copies of an image together, or give a share "
                    "and it is done"
                )
            mask = given[self.kept]
        if mask.sum() > len(mask) - 2:
            raise InputError(f"validation holds out {mask.sum()} of {len(mask)} rows; leave at least 2 to train on")
        return mask

    def tensors(self, device: torch.device) -> PairedRows:
        rows, texts = (torch.from_numpy(array).to(device) for array in (self.rows, self.texts))
        return PairedRows(rows, texts, self.owner, self.labels)


def _originals(content: Sequence[str]) -> Int[np.ndarray, " n"]:
    """For each row the first one of its content; itself where that is ""."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(digest, row) if digest else row for row, digest in enumerate(content)])


def checked_owner(name: str, n: int, m: int, given: Sequence[int] | np.ndarray | None) -> Int[np.ndarray, " m"]:
    """The row that each text describes.

    Raises:
        InputError: texts and rows do not pair up, or a number is out of range.
    """
    if given is None:
        if n != m:
            raise InputError(
                f"{n} rows of {name} and {m} texts do not pair up; give as many of each, or `owner`, the row that each "
                "text describes"
            )
        return np.arange(n)
    owner = as_numpy(given)
    if owner.shape != (m,) or not np.issubdtype(owner.dtype, np.integer):
        raise InputError(f"owner is {owner.dtype} of shape {owner.shape}; give one whole number for each of {m} texts")
    wrong = np.flatnonzero((owner < 0) | (owner >= n))
    if len(wrong):
        raise InputError(
            f"owner of text {wrong[0]} is {owner[wrong[0]]}, and {name} has the rows 0 to {n - 1}; mend owner"
        )
    return owner.astype(np.int64)
