"""Ways to fit heads, behind one signature: trained ones, closed forms, and one that needs no pairs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..checks import at_least, in_range
from ..closed_forms import CCA, LinearMap, fit_cca, fit_ridge, procrustes
from ..errors import InputError
from ..mini_vec2vec import fit_mini_vec2vec
from .fitting import TEXT, FitOptions, Fitted, PairedRows, fit_heads, mean_reciprocal_rank, subset_for_looks
from .heads import AnchorHead, CanonicalHead, FrameHead, Head, fitted_linear

__all__ = [
    "METHODS",
    "ASIFOptions",
    "CCAOptions",
    "Method",
    "MiniVec2VecOptions",
    "ProcrustesOptions",
    "RidgeOptions",
    "options_of",
]

# Shares of the mean variance that are tried on held-out pairs where none is given.
_AMOUNTS = (0.01, 0.03, 0.1, 0.3, 1.0)
_SHRINKAGES = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9)

Training = Mapping[str, PairedRows]
Fit = Callable[..., Fitted]


@dataclass(frozen=True)
class Method:
    """One entry of `METHODS`.

    Attributes:
        fit: (training, validation or None, options, seed=, progress=, unpaired=) -> Fitted.
        options: dataclass of its options.
        preset: values of these that make the method what it is.
        summary: for lists.
        paired: needs pairs.
        many: takes more than one modality beside text.
    """

    fit: Fit
    options: type[Any]
    summary: str
    preset: Mapping[str, Any] = field(default_factory=dict)
    paired: bool = True
    many: bool = False


@dataclass(frozen=True)
class CCAOptions:
    """Canonical correlation with shrinkage, scored as CSA.

    Attributes:
        shrinkage: share of each covariance that is replaced by its mean variance times the identity; `None` takes the
            best of a few on held-out pairs.
        dims: canonical directions; `None` likewise.
    """

    shrinkage: float | None = None
    dims: int | None = None

    def __post_init__(self) -> None:
        in_range("shrinkage", self.shrinkage, 0, 1)
        at_least("dims", self.dims)


@dataclass(frozen=True)
class RidgeOptions:
    """Ridge regression into the space of the texts.

    Attributes:
        regularisation: penalty, in mean variances of the input; `None` takes the best of a few on held-out pairs.
    """

    regularisation: float | None = None

    def __post_init__(self) -> None:
        in_range("regularisation", self.regularisation, 0)


@dataclass(frozen=True)
class ProcrustesOptions:
    """Orthogonal Procrustes; nothing to choose."""


@dataclass(frozen=True)
class ASIFOptions:
    """ASIF.

    Attributes:
        top: anchors kept a row.
        power: to which similarities are raised.
        anchors: pairs that serve as anchors, drawn at random, at most; the space has one coordinate for each.
    """

    top: int = 800
    power: float = 8.0
    anchors: int = 10_000

    def __post_init__(self) -> None:
        at_least("top", self.top)
        at_least("anchors", self.anchors, 2)
        in_range("power", self.power, 1e-6)


@dataclass(frozen=True)
class MiniVec2VecOptions:
    """mini-vec2vec; see `mini_vec2vec.fit_mini_vec2vec` for the symbols of the paper.

    Attributes:
        runs: anchor runs.
        clusters: of each.
        restarts: of the quadratic assignment.
        refine_steps: of the first refinement.
        refine_sample: rows of each of its steps.
        orthogonal: end on the nearest orthogonal map.
    """

    runs: int = 30
    clusters: int = 20
    restarts: int = 30
    refine_steps: int = 100
    refine_sample: int = 1000
    orthogonal: bool = False

    def __post_init__(self) -> None:
        for name in ("runs", "clusters", "restarts", "refine_sample"):
            at_least(name, getattr(self, name))
        at_least("refine_steps", self.refine_steps, 0)


def options_of(method: str, given: Mapping[str, Any]) -> Any:
    """The options of a method: its preset, and what is given.

    Raises:
        InputError: no such method, an option that it does not have, or one that the others leave without effect.
    """
    if method not in METHODS:
        raise InputError(f"method is {method!r}; give one of {', '.join(METHODS)}")
    entry = METHODS[method]
    known = [option.name for option in dataclasses.fields(entry.options)]
    for name in given:
        if name not in known:
            raise InputError(f"method {method!r} has no option {name!r}; it has {', '.join(known) or 'none'}")
    options = entry.options(**{**entry.preset, **given})
    if isinstance(options, FitOptions):
        _refuse_idle(options, given)
    return options


def _refuse_idle(options: FitOptions, given: Mapping[str, Any]) -> None:
    heads = {options.head, options.text_head or options.head}
    needed = {
        "layers": ("mlp" in heads, "no head is 'mlp'"),
        **dict.fromkeys(("rank", "dropout"), ("residual" in heads, "no head is 'residual'")),
        "bias": (options.loss == "siglip", f"loss is {options.loss!r}"),
        "soften_temperature": (options.soften > 0, "soften is 0"),
        **dict.fromkeys(("structure_warmup", "levels", "divergence"), (options.structure > 0, "structure is 0")),
    }
    for name, (works, reason) in needed.items():
        if name in given and not works:
            raise InputError(f"{name} is given and {reason}, so that it would do nothing; leave {name} out")


def _trained(
    training: Training,
    validation: Training | None,
    options: FitOptions,
    *,
    unpaired: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Fitted:
    looks = validation and {name: subset_for_looks(pairs, seed) for name, pairs in validation.items()}
    return fit_heads(training, looks, options, unpaired=unpaired, seed=seed, progress=progress)


def _chosen(
    options: Any,
    candidates: Sequence[Any],
    training: Training,
    validation: Training | None,
    fit: Callable[[Training, Any], dict[str, Head]],
) -> tuple[dict[str, Head], Any]:
    """Heads for the candidate of the highest mean reciprocal rank on the held-out pairs, fitted again on all pairs."""
    if len(candidates) > 1 and validation is None:
        unset = " and ".join(name for name, value in dataclasses.asdict(options).items() if value is None)
        raise InputError(f"nothing is held out to choose {unset} by; give {unset}, or hold out some pairs")
    best = candidates[0]
    if len(candidates) > 1 and validation is not None:
        looks = {name: subset_for_looks(pairs, seed=0) for name, pairs in validation.items()}
        scores = [_mrr(fit(training, candidate), looks) for candidate in candidates]
        best = candidates[int(np.argmax(scores))]
    return fit(_whole(training, validation), best), best


@torch.no_grad()
def _mrr(heads: Mapping[str, Head], validation: Training) -> float:
    values = []
    for name, held in validation.items():
        values.append(mean_reciprocal_rank(heads[name](held.rows), heads[TEXT](held.texts), held.owner))
    return float(np.mean(values))


def _whole(training: Training, validation: Training | None) -> Training:
    """Training and held-out pairs together."""
    held = validation or {}
    return {name: _together(pairs, held[name]) if name in held else pairs for name, pairs in training.items()}


def _together(one: PairedRows, other: PairedRows) -> PairedRows:
    return PairedRows(
        torch.cat([one.rows, other.rows]),
        torch.cat([one.texts, other.texts]),
        np.concatenate([one.owner, other.owner + len(one.rows)]),
    )


def _pairs(pairs: PairedRows) -> tuple[Tensor, Tensor]:
    """One row a text, in float64."""
    return pairs.rows[torch.from_numpy(pairs.owner).to(pairs.rows.device)].double(), pairs.texts.double()


def _only(training: Training, method: str) -> str:
    if len(training) != 1:
        raise InputError(
            f"method {method!r} joins two sets of features, {len(training) + 1} are given; for more take "
            f"{', '.join(name for name, entry in METHODS.items() if entry.many)}"
        )
    return next(iter(training))


def _span(rows: Tensor) -> Tensor:
    """The directions that rows span around their mean, [dim, rank].

    A fit in there is the one by the pseudo-inverse: directions in which the rows do not differ take no part.
    """
    _, sizes, directions = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    # Covariances square it: what the closed forms would take for zero is left out.
    least = 2 * math.sqrt(max(rows.shape) * torch.finfo(rows.dtype).eps)
    return directions[sizes > sizes[0] * least].T


def _spanned(name: str, rows: Tensor, remedy: str) -> list[str]:
    """A warning where too few rows leave a fit without regularisation undetermined."""
    dim, rank = _span(rows).shape
    if rank == dim:
        return []
    return [
        f"the pairs span {rank} of {dim} dimensions of {name}, and nothing holds the fit there: expect new rows to do "
        f"badly; give {remedy}, e.g. 0.1, or more pairs"
    ]


def _fit_cca(x: Tensor, y: Tensor, shrinkage: float) -> CCA:
    if shrinkage:
        return fit_cca(x, y, shrinkage=shrinkage)
    mean_x, mean_y, span_x, span_y = x.mean(dim=0), y.mean(dim=0), _span(x), _span(y)
    found = fit_cca((x - mean_x) @ span_x, (y - mean_y) @ span_y)
    return CCA(mean_x, mean_y, span_x @ found.projection_x, span_y @ found.projection_y, found.correlations)


def _fit_ridge(x: Tensor, y: Tensor, regularisation: float) -> LinearMap:
    if regularisation:
        return fit_ridge(x, y, regularisation=regularisation)
    mean_x, span = x.mean(dim=0), _span(x)
    found = fit_ridge((x - mean_x) @ span, y, regularisation=0)
    return LinearMap(mean_x, found.mean_y, span @ found.matrix)


def _cca(training: Training, validation: Training | None, options: CCAOptions, **_: Any) -> Fitted:
    name = _only(training, "cca")
    shrinkages = _SHRINKAGES if options.shrinkage is None else (options.shrinkage,)
    pairs = training[name]
    widest = min(pairs.rows.shape[1], pairs.texts.shape[1], len(pairs.rows) - 1)
    if options.shrinkage == 0:
        widest = min(_span(rows).shape[1] for rows in _pairs(pairs))
    if options.dims is not None and options.dims > widest:
        raise InputError(f"dims is {options.dims}, these features give {widest} canonical directions; give fewer")
    # Few directions often do best: the later ones are fitted to noise.
    doubling = [2**power for power in range(3, 12) if 2**power < widest]
    widths = [*doubling, widest] if options.dims is None else [options.dims]
    fits: dict[tuple[int, float], CCA] = {}

    def fit(training: Training, candidate: tuple[float, int]) -> dict[str, Head]:
        shrinkage, dims = candidate
        key = (len(training[name].owner), shrinkage)
        if key not in fits:
            fits[key] = _fit_cca(*_pairs(training[name]), shrinkage)
        found = fits[key]
        heads: dict[str, Head] = {}
        sides = ((name, found.mean_x, found.projection_x), (TEXT, found.mean_y, found.projection_y))
        for side, (side_name, mean, projection) in enumerate(sides):
            head = CanonicalHead(len(mean), dims + 2, side=side)
            head.set_frame(mean)
            head.projection.copy_(projection[:, :dims])
            # Shrinkage can lift the first above 1; a common factor changes no order.
            weights = found.correlations.clamp(min=0)
            head.correlations.copy_(weights[:dims] / weights[:1].clamp(min=1))
            heads[side_name] = head.to(pairs.rows.device)
        return heads

    candidates = [(shrinkage, dims) for shrinkage in shrinkages for dims in widths]
    heads, (shrinkage, dims) = _chosen(options, candidates, training, validation, fit)
    fitted = Fitted(heads, 0, 0, learned={"shrinkage": shrinkage, "dims": dims})
    if not shrinkage:
        whole = _whole(training, validation)[name]
        fitted.warnings = [*_spanned(name, whole.rows, "shrinkage"), *_spanned(TEXT, whole.texts, "shrinkage")]
    return fitted


def _ridge(training: Training, validation: Training | None, options: RidgeOptions, **_: Any) -> Fitted:
    amounts = _AMOUNTS if options.regularisation is None else (options.regularisation,)

    def fit(training: Training, amount: float) -> dict[str, Head]:
        texts = torch.cat([pairs.texts for pairs in training.values()]).double()
        centre = texts.mean(dim=0)
        heads: dict[str, Head] = {TEXT: FrameHead(len(centre), len(centre)).set_frame(centre)}
        for name, pairs in training.items():
            x, y = _pairs(pairs)
            # Texts of one modality need not lie around the centre of all.
            found = _fit_ridge(x, y - centre, amount)
            heads[name] = fitted_linear(found.matrix, found.mean_x, bias=found.mean_y)
        return {name: head.to(texts.device) for name, head in heads.items()}

    heads, amount = _chosen(options, amounts, training, validation, fit)
    fitted = Fitted(heads, 0, 0, learned={"regularisation": amount})
    if not amount:
        for name, pairs in _whole(training, validation).items():
            fitted.warnings += _spanned(name, pairs.rows, "regularisation")
    return fitted


def _procrustes(training: Training, validation: Training | None, options: ProcrustesOptions, **_: Any) -> Fitted:
    def fit(training: Training, _: None) -> dict[str, Head]:
        texts = torch.cat([pairs.texts for pairs in training.values()]).double()
        centre = texts.mean(dim=0)
        text_head = FrameHead(len(centre), len(centre), unit_input=True)
        heads: dict[str, Head] = {TEXT: text_head.set_frame(centre)}
        for name, pairs in training.items():
            x, y = _pairs(pairs)
            mean = x.mean(dim=0)
            # Not `fit_procrustes`, which takes the texts around their own centre: here they share that of all.
            matrix = procrustes(normalize(x - mean, dim=1), normalize(y - centre, dim=1))
            heads[name] = fitted_linear(matrix, mean, unit_input=True)
        return {name: head.to(texts.device) for name, head in heads.items()}

    return Fitted(_chosen(options, [None], training, validation, fit)[0], 0, 0)


def _asif(training: Training, validation: Training | None, options: ASIFOptions, seed: int = 0, **_: Any) -> Fitted:
    name = _only(training, "asif")
    whole = _whole(training, validation)[name]
    rows, texts = whole.rows, whole.first_texts()
    if len(rows) > options.anchors:
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), options.anchors, replace=False))
        rows, texts = rows[chosen], texts[chosen]
    heads: dict[str, Head] = {}
    for side, anchors in ((name, rows), (TEXT, texts)):
        top = min(options.top, len(anchors))
        head = AnchorHead(anchors.shape[1], len(anchors), top=top, power=options.power)
        centre = anchors.mean(dim=0)
        head.set_frame(centre)
        head.anchors.copy_(anchors - centre)
        heads[side] = head.to(anchors.device)
    return Fitted(heads, 0, 0)


def _mini_vec2vec(
    training: Training, validation: Training | None, options: MiniVec2VecOptions, seed: int = 0, progress: bool = False,
    **_: Any,
) -> Fitted:  # fmt: skip
    name = _only(training, "mini-vec2vec")
    pairs = training[name]
    found = fit_mini_vec2vec(
        pairs.rows,
        pairs.texts,
        runs=options.runs,
        clusters=options.clusters,
        restarts=options.restarts,
        refine_steps=options.refine_steps,
        refine_sample=options.refine_sample,
        orthogonal=options.orthogonal,
        seed=seed,
        progress=progress,
    )
    text = FrameHead(len(found.mean_b), len(found.mean_b), unit_input=True).set_frame(found.mean_b)
    heads: dict[str, Head] = {name: fitted_linear(found.matrix, found.mean_a, unit_input=True), TEXT: text}
    return Fitted(
        {key: head.to(pairs.rows.device) for key, head in heads.items()}, 0, 0, learned=dict(found.confidence)
    )


METHODS: dict[str, Method] = {
    "structure": Method(_trained, FitOptions, "trained heads, CLIP loss and STRUCTURE's regulariser", many=True),
    "clip": Method(_trained, FitOptions, "trained heads, CLIP loss alone", {"structure": 0.0}, many=True),
    "siglip": Method(
        _trained,
        FitOptions,
        "trained heads, sigmoid loss",
        {"loss": "siglip", "structure": 0.0, "temperature": 0.1, "learn_temperature": True},
        many=True,
    ),
    "ape": Method(
        _trained,
        FitOptions,
        "APE-style: four layers on the texts, a linear map on the images, learnt temperature",
        {
            "head": "linear",
            "text_head": "mlp",
            "layers": 4,
            "structure": 0.0,
            "temperature": 0.07,
            "learn_temperature": True,
        },
        many=True,
    ),
    "ridge": Method(_ridge, RidgeOptions, "ridge regression into the space of the texts", many=True),
    "cca": Method(_cca, CCAOptions, "shrunk canonical correlation, scored as CSA"),
    "procrustes": Method(_procrustes, ProcrustesOptions, "orthogonal map into the space of the texts", many=True),
    "asif": Method(_asif, ASIFOptions, "similarities to paired anchors; nothing is fitted"),
    "mini-vec2vec": Method(
        _mini_vec2vec, MiniVec2VecOptions, "a map from two unpaired sets; coarse across modalities", paired=False
    ),
}
