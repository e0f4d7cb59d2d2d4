"""Choosing, building, tuning and reading the FAISS index over the raw vectors.

FAISS sees row numbers 0..n-1 only. Ids, filters and removed rows are ours: selectors nested in IDMap2, Refine or
PreTransform silently do not apply, and half of the index types cannot remove at all.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float, Int

from mmalign.errors import IndexDamagedError, InputError
from mmalign.progress import progress_bar

from .vectors import Vectors

__all__ = [
    "EXACT_ROWS",
    "Plan",
    "Tuning",
    "build",
    "choose_plan",
    "exact_search",
    "grow",
    "import_faiss",
    "merge_top",
    "read",
    "rerank",
    "search",
    "tune",
    "write",
]

_DISTRIBUTIONS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")
_log = logging.getLogger(__name__)

# Up to here an exact scan over half-precision rows is fast enough for anybody.
EXACT_ROWS = 50_000


@functools.cache
def import_faiss() -> Any:
    """The module `faiss`, once exactly one distribution provides it.

    Raises:
        InputError: none is installed, or several, which overwrite each other's files.
    """
    present = []
    for name in _DISTRIBUTIONS:
        try:
            importlib.metadata.version(name)
            present.append(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if len(present) > 1:
        raise InputError(
            f"{' and '.join(present)} are both installed and overwrite each other; run "
            f"`pip uninstall -y {' '.join(present)}` and then `pip install mmalign[cpu]` or `mmalign[gpu]`"
        )
    if sys.platform == "darwin" and "KMP_DUPLICATE_LIB_OK" not in os.environ:
        # torch and faiss each bring libomp on macOS and abort at the second one. Opt out by setting the variable.
        os.environ.update(KMP_DUPLICATE_LIB_OK="TRUE", OMP_NUM_THREADS="1")
        _log.info("macOS: OMP_NUM_THREADS=1 and KMP_DUPLICATE_LIB_OK=TRUE were set for faiss beside torch")
    try:
        import faiss
    except ImportError:
        raise InputError("FAISS is not installed; run `pip install mmalign[cpu]` (or `mmalign[gpu]`)") from None
    return faiss


@dataclass(frozen=True)
class Plan:
    """What to build. `candidates` results are fetched for each one wanted and re-ranked exactly."""

    factory: str
    parameters: dict[str, int] = field(default_factory=dict)
    candidates: int = 4
    options: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuning:
    """Measured recall@10 against exact search, re-ranking included."""

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


def choose_plan(rows: int, dim: int, *, factory: str | None = None, memory_bytes: int | None = None) -> Plan:
    """The index type for `rows` vectors of width `dim`.

    Up to 50,000 rows: exact scan over half-precision rows. Up to a million: inverted lists over 8-bit rows. Above, or
    when 8-bit rows would not fit `memory_bytes`: inverted lists over 1-bit rows (RaBitQ). Raw vectors on disk re-rank
    the candidates in every case, so no FAISS refinement layer is stored.

    Args:
        rows: number of vectors.
        dim: their width.
        factory: any FAISS factory string, instead of the choice.
        memory_bytes: what the FAISS index may take in memory; a half of the machine's by default.
    """
    lists = 2 ** round(math.log2(max(4 * math.sqrt(rows), 1)))
    if factory is not None:
        return _plan_of(factory, rows, dim)
    if rows <= EXACT_ROWS:
        return Plan("SQfp16")
    memory = memory_bytes if memory_bytes is not None else _machine_memory() // 2
    if rows <= 1_000_000 and rows * dim <= memory:
        return _plan_of(f"IVF{lists},SQ8", rows, dim)
    coarse = f"IVF{max(lists, 4096)}" + ("_HNSW32" if rows > 1_000_000 else "")
    return _plan_of(f"{coarse},RaBitQfs", rows, dim)


def _plan_of(factory: str, rows: int, dim: int) -> Plan:
    faiss = import_faiss()
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except Exception as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise InputError(f"FAISS does not understand the factory string {factory!r}: {reason}") from None
    inner = _innermost(faiss, index)
    quantised = "RaBitQ" in factory or "PQ" in factory
    parameters, options = {}, {}
    if isinstance(inner, faiss.IndexIVF):
        if inner.nlist > rows:
            raise InputError(f"{factory!r} has {inner.nlist} lists for {rows} vectors; ask for fewer lists")
        parameters["nprobe"] = max(1, inner.nlist // 16)
    elif hasattr(inner, "hnsw"):
        parameters["efSearch"] = 64
        options["efConstruction"] = 128
    return Plan(factory, parameters, candidates=30 if quantised else 4, options=options)


def _innermost(faiss: Any, index: Any) -> Any:
    index = faiss.downcast_index(index)
    while isinstance(index, (faiss.IndexPreTransform, faiss.IndexRefine)):
        index = faiss.downcast_index(index.index if isinstance(index, faiss.IndexPreTransform) else index.base_index)
    return index


def build(vectors: Vectors, rows: int, plan: Plan, *, progress: bool = False, seed: int = 0) -> Any:
    """Train and fill a FAISS index over the first `rows` vectors; reads them in pieces."""
    faiss = import_faiss()
    index = faiss.index_factory(vectors.dim, plan.factory, faiss.METRIC_INNER_PRODUCT)
    inner = _innermost(faiss, index)
    for name, value in plan.options.items():
        setattr(inner.hnsw, name, value)
    if not index.is_trained:
        lists = getattr(inner, "nlist", 0)
        if lists:
            # 64 points a list is inside FAISS's recommended 30-256 and a quarter of the default's time.
            inner.cp.max_points_per_centroid = 64
            inner.cp.niter = 10
            inner.cp.seed = seed + 1234
        sample = min(rows, max(64 * lists, 65_536))
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
        reason = str(error).strip().splitlines()[-1][:200]
        raise InputError(
            f"FAISS cannot make {factory!r} of {rows} vectors ({reason}); choose another type with --factory"
        ) from None


def grow(path: Path, vectors: Vectors, start: int, stop: int) -> Any:
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
        reason = str(error).strip().splitlines()[-1][:160]
        raise IndexDamagedError(
            f"{str(path)!r} cannot be read by FAISS ({reason}); `mmalign verify INDEX --repair` rebuilds it"
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


def exact_search(
    vectors: Vectors,
    queries: Float[np.ndarray, "q dim"],
    k: int,
    *,
    rows: Int[np.ndarray, " kept"] | None = None,
    start: int = 0,
    stop: int | None = None,
    mapped: bool = True,
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """Inner products with all rows in [start, stop), or with the given ones; the k best, row -1 as padding.

    `mapped=False` reads all rows through a buffer: slower when repeated, but a single pass keeps nothing in memory.
    """
    best_scores = np.full((len(queries), 0), -np.inf, np.float32)
    best_rows = np.zeros((len(queries), 0), np.int64)
    if rows is None:
        pass_over = vectors.chunks if mapped else vectors.stream
        pieces = ((np.arange(first, first + len(piece)), piece) for first, piece in pass_over(start, stop))
    else:
        pieces = ((part, vectors.gather(part)) for part in np.array_split(rows, max(1, len(rows) // 65_536)))
    for numbers, piece in pieces:
        scores = queries @ piece.T
        if scores.shape[1] > k:
            top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
            scores = np.take_along_axis(scores, top, axis=1)
            numbers = numbers[top]
        else:
            numbers = np.broadcast_to(numbers, scores.shape)
        best_scores, best_rows = merge_top(best_scores, best_rows, scores, numbers, k)
    return _padded(best_scores, best_rows, k)


def merge_top(
    scores: np.ndarray, rows: np.ndarray, other_scores: np.ndarray, other_rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of two lists, ties by lower row."""
    if scores.shape[1]:
        scores = np.concatenate([scores, other_scores], axis=1)
        rows = np.concatenate([rows, other_rows], axis=1)
    else:
        scores, rows = other_scores, other_rows
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def rerank(
    vectors: Vectors, queries: Float[np.ndarray, "q dim"], rows: Int[np.ndarray, "q c"], k: int
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """Replace approximate scores by exact inner products and keep the k best; row -1 stays last."""
    if len(queries) == 1:
        found = rows[0] if rows[0, -1] >= 0 else rows[0][rows[0] >= 0]
        exact = vectors.gather(found) @ queries[0]
        order = np.lexsort((found, -exact))[:k]
        scores, kept = exact[None, order], found[None, order]
    else:
        scores = np.full(rows.shape, -np.inf, np.float32)
        for number, query in enumerate(queries):
            valid = rows[number] >= 0
            scores[number, valid] = vectors.gather(rows[number, valid]) @ query
        order = np.lexsort((rows, -scores), axis=1)[:, :k]
        scores, kept = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
    return _padded(scores, kept, k)


def _padded(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """k columns: -inf and row -1 where there are fewer results."""
    short = k - scores.shape[1]
    if short <= 0:
        return scores, rows
    widths = ((0, 0), (0, short))
    return np.pad(scores, widths, constant_values=-np.inf), np.pad(rows, widths, constant_values=-1)


def tune(
    index: Any,
    vectors: Vectors,
    rows: int,
    queries: Float[np.ndarray, "q dim"],
    plan: Plan,
    *,
    kind: str,
    wanted: float = 0.95,
    k: int = 10,
) -> Tuning:
    """Raise nprobe, efSearch or the number of candidates until recall@k, re-ranking included, reaches `wanted`.

    Args:
        index: filled with the first `rows` of `vectors`.
        vectors: the truth to compare with.
        rows: how many of them the index covers.
        queries: unit rows of the kind users will ask; text queries reach lower recall than image queries at equal
            settings, so settings tuned on stored vectors alone promise too much.
        plan: where to start.
        kind: what the queries are, for the record.
        wanted: recall@k to reach; the strongest setting tried is kept if none does.
        k: depth of the comparison.

    Returns:
        The settings, with the recall reached and its 95 % interval (normal approximation over queries).
    """
    k = min(k, rows)
    _, truth = exact_search(vectors, queries, k, stop=rows, mapped=False)
    parameters, candidates = dict(plan.parameters), plan.candidates
    ceiling = {"nprobe": getattr(_innermost(import_faiss(), index), "nlist", 0), "efSearch": 1024}
    while True:
        set_parameters(index, parameters)
        _, found = search(index, queries, min(rows, candidates * k))
        _, best = rerank(vectors, queries, found, k)
        hits = np.array([len(np.intersect1d(a, b)) / k for a, b in zip(truth, best, strict=True)])
        recall = float(hits.mean())
        if recall >= wanted:
            break
        stronger = {name: min(2 * value, ceiling[name]) for name, value in parameters.items()}
        if stronger == parameters and candidates >= 240:
            break
        # More candidates cost little beside a wider probe, so they are tried first where vectors are coarse.
        if stronger == parameters or (candidates < 120 and plan.candidates >= 30 and candidates <= plan.candidates):
            candidates = min(2 * candidates, 240)
        else:
            parameters = stronger
    half = 1.96 * float(hits.std()) / math.sqrt(len(hits))
    return Tuning(parameters, candidates, recall, max(0.0, recall - half), min(1.0, recall + half), len(hits), kind)


def _machine_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 8 << 30
