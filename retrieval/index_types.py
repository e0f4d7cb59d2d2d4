"""What is known of kinds of FAISS index, in one table, and types that a user adds.

Everything but the choice by size (`faiss_index.choose_plan`) goes by this table: where tuning starts, how far it may
go, how much is trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmalign.checks import at_least
from mmalign.encoders.hub import closest
from mmalign.errors import InputError

from .faiss_module import faiss_reason, import_faiss

__all__ = ["Traits", "check_factory", "is_registered", "make_index", "register_index_type"]

# A quarter of the default's time of k-means, inside FAISS's recommended 30-256 points a list.
_POINTS_A_LIST, _ROUNDS = 64, 10


@dataclass(frozen=True)
class Traits:
    """How an index is trained, tuned and searched.

    Attributes:
        parameters: names as in `faiss.ParameterSpace`, and where tuning starts.
        ceilings: the most it may raise each to.
        candidates: how many results are fetched for each one wanted and scored exactly.
        lists: how many vectors there must be at least.
        training_rows: how many of them to train on at least.
    """

    parameters: dict[str, int] = field(default_factory=dict)
    ceilings: dict[str, int] = field(default_factory=dict)
    candidates: int = 4
    lists: int = 0
    training_rows: int = 65_536


@dataclass(frozen=True)
class _Family:
    """A kind of index, told by FAISS's class; `prepare` sets what has to be set before training.

    An index may be of several families (inverted lists over 1-bit rows).
    """

    holds: Callable[[Any, Any], bool]
    traits: Callable[[Any], Traits]
    prepare: Callable[[Any, int], None] = lambda index, seed: None


def _prepare_lists(index: Any, seed: int) -> None:
    index.cp.max_points_per_centroid, index.cp.niter, index.cp.seed = _POINTS_A_LIST, _ROUNDS, seed + 1234


def _prepare_graph(index: Any, seed: int) -> None:
    index.hnsw.efConstruction = 128


_FAMILIES = (
    _Family(  # inverted lists
        lambda faiss, index: isinstance(index, faiss.IndexIVF),
        lambda index: Traits(
            {"nprobe": max(1, index.nlist // 16)},
            {"nprobe": index.nlist},
            lists=index.nlist,
            training_rows=_POINTS_A_LIST * index.nlist,
        ),
        _prepare_lists,
    ),
    _Family(  # graphs
        lambda faiss, index: hasattr(index, "hnsw"),
        lambda index: Traits({"efSearch": 64}, {"efSearch": 1024}),
        _prepare_graph,
    ),
    _Family(  # a few bits a dimension
        lambda faiss, index: bool(re.search("PQ|RaBitQ", type(index).__name__)),
        lambda index: Traits(candidates=30),
    ),
)


@dataclass(frozen=True)
class _Registered:
    make: Callable[[int, int], Any]
    parameters: dict[str, int] | None
    ceilings: dict[str, int]
    candidates: int


_REGISTERED: dict[str, _Registered] = {}


def register_index_type(
    name: str,
    make: Callable[[int, int], Any],
    *,
    parameters: Mapping[str, int] | None = None,
    ceilings: Mapping[str, int] | None = None,
    candidates: int = 4,
) -> None:
    """Make `factory="name"` (`--factory name`) mean an index that `make` builds.

    It is then used as a FAISS factory string is: trained if it has to be, filled, tuned for recall, saved, grown.
    Reading an index of that type takes no registration, writing to one does.

    Args:
        name: anything that FAISS does not take for a factory string.
        make: `make(dim, rows)` returns an empty `faiss.Index` of width `dim` for inner products; it will hold about so
            many rows.
        parameters: what is set when searching, and where tuning starts, e.g. `{"nprobe": 8}`; names as in
            `faiss.ParameterSpace`. By default what inverted lists (nprobe) and graphs (efSearch) have.
        ceilings: the most that tuning may raise each parameter to; by default the number of lists for nprobe,
            1024 for others.
        candidates: how many results are fetched for each one wanted and scored exactly; tuning may raise that, too.

    Raises:
        InputError: the name means something else already, or a number is below 1.
    """
    if not isinstance(name, str) or not name.strip() or name == "auto" or _understood(name, 64) is None:
        raise InputError(f"index type {name!r} is no name, or one that means something to FAISS or here; give another")
    at_least("candidates", candidates)
    for numbers in (parameters, ceilings):
        for parameter, value in (numbers or {}).items():
            at_least(parameter, value)
    chosen = dict(parameters) if parameters is not None else None
    _REGISTERED[name] = _Registered(make, chosen, dict(ceilings or {}), candidates)


def is_registered(name: str) -> bool:
    """Whether `register_index_type` was called with that name in this process."""
    return name in _REGISTERED


def check_factory(factory: str, dim: int) -> None:
    """Find out early, without any vectors.

    Raises:
        InputError: neither FAISS nor a registration knows it.
    """
    if factory not in _REGISTERED and (reason := _understood(factory, dim)) is not None:
        raise InputError(
            f"FAISS does not understand the factory string {factory!r}: {reason}{closest(factory, list(_REGISTERED))}; "
            "a type of your own has to be registered first (`mmalign --plugin MODULE index ...`)"
        )


def make_index(factory: str, dim: int, rows: int, seed: int = 0) -> tuple[Any, Traits]:
    """An empty index for inner products, ready to be trained, and what is known of its kind.

    Raises:
        InputError: the type is not known, what was registered gives another thing, or it needs more vectors.
    """
    faiss = import_faiss()
    check_factory(factory, dim)
    registered = _REGISTERED.get(factory)
    if registered is None:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    else:
        index = registered.make(dim, rows)
        if not isinstance(index, faiss.Index) or (index.d, index.metric_type, index.ntotal) != (
            dim,
            faiss.METRIC_INNER_PRODUCT,
            0,
        ):
            raise InputError(
                f"index type {factory!r} gave {index!r}; `make` must return an empty faiss.Index of width {dim} with "
                "faiss.METRIC_INNER_PRODUCT"
            )
    inner = _innermost(faiss, index)
    traits = Traits()
    for family in _FAMILIES:
        if family.holds(faiss, inner):
            traits = _joined(traits, family.traits(inner))
            if registered is None:
                family.prepare(inner, seed)
    if registered is not None:
        parameters = traits.parameters if registered.parameters is None else registered.parameters
        known = {**traits.ceilings, **registered.ceilings}
        ceilings = {name: known.get(name, max(1024, value)) for name, value in parameters.items()}
        traits = Traits(parameters, ceilings, registered.candidates, traits.lists, traits.training_rows)
    if traits.lists > rows:
        raise InputError(f"{factory!r} has {traits.lists} lists for {rows} vectors; ask for fewer lists")
    return index, traits


def _joined(one: Traits, other: Traits) -> Traits:
    return Traits(
        {**one.parameters, **other.parameters},
        {**one.ceilings, **other.ceilings},
        max(one.candidates, other.candidates),
        max(one.lists, other.lists),
        max(one.training_rows, other.training_rows),
    )


def _understood(factory: str, dim: int) -> str | None:
    """Why FAISS cannot make anything of a string; `None` if it can."""
    faiss = import_faiss()
    try:
        faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except Exception as error:
        return faiss_reason(error)
    return None


def _innermost(faiss: Any, index: Any) -> Any:
    index = faiss.downcast_index(index)
    while isinstance(index, (faiss.IndexPreTransform, faiss.IndexRefine)):
        index = faiss.downcast_index(index.index if isinstance(index, faiss.IndexPreTransform) else index.base_index)
    return index
