"""Choosing, building, tuning and reading the FAISS index over the raw vectors.

FAISS sees row numbers 0..n-1 only. Ids, filters and removed rows are ours: selectors nested in IDMap2, Refine or
PreTransform silently do not apply, and half of the index types cannot remove at all.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float, Int

from mmalign.errors import IndexDamagedError, InputError
from mmalign.progress import progress_bar

from .exact import exact_search, rescore
from .faiss_module import faiss_reason, import_faiss
from .index_types import Traits, make_index
from .storage import verify_command
from .vectors import ChosenRows, Vectors

__all__ = [
    "EXACT_ROWS",
    "Plan",
    "Tuning",
    "build",
    "choose_plan",
    "grow",
    "read",
    "search",
    "tune",
    "write",
]

# Up to here an exact scan over half-precision rows is fast enough for anybody.
EXACT_ROWS = 50_000
_EXACT_IN_PARTITIONS = 4096
# Beyond this many for each result wanted, another index type serves better.
_MOST_CANDIDATES = 240


@dataclass(frozen=True)
class Plan:
    """What to build, and whether that was chosen by size."""

    factory: str
    by_size: bool
    traits: Traits


@dataclass(frozen=True)
class Tuning:
    """Measured recall@10 against exact search, exact scoring of the candidates included."""

    parameters: dict[str, int]
    candidates: int
    recall: float
    low: float
    high: float
    queries: int
    kind: str

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "recall@10": round(self.recall, 4),
            "interval95": [round(self.low, 4), round(self.high, 4)],
            "queries": self.queries,
            "kind": self.kind,
        }


def choose_plan(
    rows: int,
    dim: int,
    *,
    factory: str | None = None,
    memory_bytes: int | None = None,
    collection: int | None = None,
) -> Plan:
    """The index type for `rows` vectors of width `dim`.

    Up to 50,000 rows: exact scan over half-precision rows. Up to a million: inverted lists over 8-bit rows. Above, or
    when 8-bit rows would not fit `memory_bytes`: inverted lists over 1-bit rows (RaBitQ). Raw vectors on disk give the
    candidates their exact scores in every case, so no FAISS refinement layer is stored.

    Args:
        rows: number of vectors.
        dim: their width.
        factory: any FAISS factory string or registered type, instead of the choice.
        memory_bytes: what the FAISS index may take in memory; a half of the machine's by default.
        collection: rows of the whole index, where these are one partition of it: what is quick for a small index would
            be most of the time that a large one takes.

    Raises:
        InputError: the factory is not known, or has more lists than there are rows.
    """
    chosen = factory if factory is not None else _by_size(rows, dim, memory_bytes, max(rows, collection or 0))
    return Plan(chosen, factory is None, make_index(chosen, dim, rows)[1])


def _by_size(rows: int, dim: int, memory_bytes: int | None, collection: int) -> str:
    if collection <= EXACT_ROWS or rows <= _EXACT_IN_PARTITIONS:
        return "SQfp16"
    lists = 2 ** round(math.log2(4 * math.sqrt(rows)))
    memory = memory_bytes if memory_bytes is not None else _machine_memory() // 2
    if collection <= 1_000_000 and rows * dim <= memory:
        return f"IVF{lists},SQ8"
    return (
        f"IVF{max(lists, 4096) if rows > EXACT_ROWS else lists}" + ("_HNSW32" if rows > 1_000_000 else "") + ",RaBitQfs"
    )


def build(vectors: Vectors | ChosenRows, rows: int, plan: Plan, *, progress: bool = False, seed: int = 0) -> Any:
    """Train and fill a FAISS index over the first `rows` vectors; reads them in pieces."""
    index, traits = make_index(plan.factory, vectors.dim, rows, seed)
    if not index.is_trained:
        sample = min(rows, traits.training_rows)
        chosen = np.zeros(rows, bool)
        chosen[np.random.default_rng(seed).choice(rows, sample, replace=False)] = True
        # Picking rows out of the mapped file would make most of its pages resident.
        picked = [piece[chosen[first : first + len(piece)]] for first, piece in vectors.stream(0, rows)]
        with _explained(plan.factory, sample):
            index.train(np.concatenate(picked))
    with progress_bar("building the FAISS index", rows, unit="vectors", enabled=progress) as advance:
        for _, piece in vectors.stream(0, rows):
            with _explained(plan.factory, rows):
                index.add(piece)
            advance(len(piece))
    return index


@contextlib.contextmanager
def _explained(factory: str, rows: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"FAISS cannot make {factory!r} of {rows} vectors ({faiss_reason(error)}); choose another type with "
            "--factory (factory=...)"
        ) from None


def grow(path: Path, vectors: Vectors | ChosenRows, start: int, stop: int) -> Any:
    """A copy of a stored index with rows [start, stop) added to it."""
    faiss = import_faiss()
    index = faiss.read_index(str(path))
    for _, piece in vectors.stream(start, stop):
        index.add(piece)
    return index


def write(index: Any, file: IO[bytes]) -> None:
    """Serialise into an open file."""
    faiss = import_faiss()
    writer = faiss.PyCallbackIOWriter(file.write)
    faiss.write_index(index, writer)


def read(path: Path, parameters: dict[str, int]) -> Any:
    """Map an index file into memory; nothing is copied where the type allows it.

    Raises:
        IndexDamagedError: FAISS cannot read it.
    """
    faiss = import_faiss()
    try:
        if hasattr(faiss, "set_deserialization_vector_byte_limit"):
            faiss.set_deserialization_vector_byte_limit(max(path.stat().st_size, 1 << 20))
        index = faiss.read_index(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP))
    except Exception as error:
        raise IndexDamagedError(
            f"{str(path)!r} cannot be read by FAISS ({faiss_reason(error)}); "
            f"{verify_command(path.parent, repair=True)} rebuilds it"
        ) from None
    set_parameters(index, parameters)
    return index


def set_parameters(index: Any, parameters: dict[str, int]) -> None:
    """Set nprobe, efSearch, ... on whatever layer has them."""
    faiss = import_faiss()
    space = faiss.ParameterSpace()
    for name, value in parameters.items():
        space.set_index_parameter(index, name, value)


def search(
    index: Any, queries: Float[np.ndarray, "q dim"], k: int
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """FAISS search; row -1 pads short results. Few queries run on one thread, which is faster and safe in servers."""
    faiss = import_faiss()
    if len(queries) >= 8:
        # Since FAISS 1.14.2 the matrix-product path starts at 128,000 = queries x dim, far too late at dim 512.
        faiss.cvar.distance_compute_blas_threshold = 2 * queries.shape[1]
        return index.search(queries, k)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        return index.search(queries, k)
    finally:
        faiss.omp_set_num_threads(threads)


def tune(
    index: Any,
    vectors: Vectors | ChosenRows,
    rows: int,
    queries: Float[np.ndarray, "q dim"],
    plan: Plan,
    *,
    kind: str,
    recall: float = 0.95,
    k: int = 10,
) -> Tuning:
    """Raise nprobe, efSearch or the number of candidates until recall@k, exact scoring included, reaches `recall`.

    Args:
        index: filled with the first `rows` of `vectors`.
        vectors: the truth to compare with.
        rows: how many of them the index covers.
        queries: unit rows of the kind users will ask; text queries reach lower recall than image queries at equal
            settings, so settings tuned on stored vectors alone promise too much.
        plan: where to start.
        kind: what the queries are, for the record.
        recall: recall@k to reach; the strongest setting tried is kept if none does.
        k: depth of the comparison.

    Returns:
        The settings, with the recall reached and its 95 % interval (normal approximation over queries).
    """
    k = min(k, rows)
    _, truth = exact_search(vectors, queries, k, stop=rows, mapped=False)
    traits = plan.traits
    parameters, candidates = dict(traits.parameters), traits.candidates
    coarse = candidates > Traits.candidates
    while True:
        with _explained(plan.factory, rows):
            set_parameters(index, parameters)
            _, found = search(index, queries, min(rows, candidates * k))
        _, best = rescore(vectors, queries, found, k)
        hits = np.array([len(np.intersect1d(a, b)) / k for a, b in zip(truth, best, strict=True)])
        reached = float(hits.mean())
        if reached >= recall:
            break
        stronger = {name: min(2 * value, traits.ceilings[name]) for name, value in parameters.items()}
        if stronger == parameters and candidates >= _MOST_CANDIDATES:
            break
        # More candidates cost little beside a wider probe, so they are doubled first where vectors are coarse.
        if stronger == parameters or (coarse and candidates == traits.candidates < _MOST_CANDIDATES):
            candidates = min(2 * candidates, _MOST_CANDIDATES)
        else:
            parameters = stronger
    half = 1.96 * float(hits.std()) / math.sqrt(len(hits))
    return Tuning(parameters, candidates, reached, max(0.0, reached - half), min(1.0, reached + half), len(hits), kind)


def _machine_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 8 << 30
