"""What is derived from the vectors of a draft, brought up to date: FAISS, reference queries, calibration."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool

from mmalign.encoders import Encoder
from mmalign.errors import InputError

from . import faiss_index
from .calibration import Calibration, query_bank
from .draft import Draft
from .faiss_index import Plan, choose_plan
from .index_types import check_factory, is_registered
from .options import FaissOptions
from .part import Part
from .vectors import ChosenRows, Vectors, checked_rows, write_rows

__all__ = [
    "AS_IT_WAS",
    "build_faiss",
    "check_type",
    "derive",
    "finish",
    "needs_queries",
    "reference_queries",
    "write_queries",
]

# Rows past the FAISS index are scanned exactly: 2,000 cost 0.2 ms a query. Beyond this share they are merged in.
MERGE_SHARE = 0.05
DEFAULT_RECALL = 0.95
AS_IT_WAS = FaissOptions()


def check_type(draft: Draft, options: FaissOptions = AS_IT_WAS) -> None:
    """Before any work: whether FAISS, or this process, knows the index type that `finish` will be asked for.

    Raises:
        InputError: it does not.
    """
    if options.factory is not None:
        if options.factory != "auto":
            check_factory(options.factory, draft.dim)
        return
    kept = draft.settings.get("factory", "")
    if draft.settings.get("registered") and not is_registered(kept):
        raise InputError(
            f"index {str(draft.folder)!r} is of type {kept!r}, which nothing has registered in this process; import "
            f"what calls register_index_type({kept!r}, ...) (`mmalign --plugin MODULE index ...`), or go back to the "
            'choice by size with --factory auto (factory="auto")'
        )


def needs_queries(part: Part, rows: int) -> bool:
    """Whether the encoder, which takes text, should embed the built-in phrases: for the first time, or more of them."""
    about = part.about["queries"]
    if "text" not in part.about["encoder"]["modalities"]:
        return False
    return about is None or (about["built_in"] and about["count"] < len(query_bank(rows)))


def write_queries(part: Part, queries: np.ndarray, *, built_in: bool) -> None:
    """Keep unit rows of reference text queries, for tuning and calibration."""
    name = part.writer.add("queries", lambda file: write_rows(file, [queries], len(queries), part.dim))
    part.about["queries"] = {"file": name, "built_in": built_in, "count": len(queries)}
    part.changed = True


def finish(
    draft: Draft,
    encoder: Callable[[], Encoder] | None = None,
    options: FaissOptions = AS_IT_WAS,
    *,
    force: bool = False,
    progress: bool = False,
) -> None:
    """Drop dead rows, join segments, bring FAISS and calibration up to date, publish.

    Args:
        draft: what to finish.
        encoder: gives what embeds the reference queries, asked only if they are needed; `None` does without.
        options: hold from now on.
        force: rebuild FAISS even if nothing asks for it.
        progress: show a bar.

    Raises:
        InputError: the index type does not fit the vectors.
    """
    check_type(draft, options)
    retune = _settle(draft, options)
    draft.compact()
    part, text_queries = draft.part, options.text_queries
    if draft.rows:
        if text_queries is None and encoder is not None and needs_queries(part, draft.rows):
            text_queries = encoder().encode_texts(query_bank(draft.rows))
        if text_queries is not None:
            built_in = text_queries is not options.text_queries
            write_queries(part, checked_rows(text_queries, draft.dim), built_in=built_in)
        rebuild = force or retune or options.text_queries is not None
        derive(
            draft, part, draft.alive(), force=rebuild or text_queries is not None, rebuild=rebuild, progress=progress
        )
    elif part.about["faiss"] or part.about["calibration"]:
        part.about["faiss"] = part.about["calibration"] = None
        part.changed = True
    if draft.upgrade is not None:
        from .upgrading.checking import prepare  # which calls `derive`

        draft.write_items()
        prepare(draft, draft.upgrade, rebuild=force, progress=progress)
    draft.checkpoint()


def derive(
    draft: Draft,
    part: Part,
    alive: Bool[np.ndarray, " rows"],
    *,
    force: bool = False,
    rebuild: bool = False,
    progress: bool = False,
) -> None:
    """Bring FAISS and calibration of a partition with rows up to date with its vectors and reference queries.

    Args:
        draft: says how FAISS is to be made.
        part: one of its partitions.
        alive: which of its rows belong to an item.
        force: do it even if nothing asks for it; an index that can grow is grown.
        rebuild: make the FAISS index from nothing.
        progress: show a bar.
    """
    if not (force or _is_stale(draft, part)):
        return
    vectors = part.vectors()
    build_faiss(draft, part, vectors, rebuild=rebuild, progress=progress)
    size = None if part is draft.part else int(draft.alive().sum())
    calibration = Calibration.measure(vectors, alive, reference_queries(part), size=size)
    part.about["calibration"] = calibration.to_dict() if calibration else None
    part.changed = True


def _settle(draft: Draft, options: FaissOptions) -> bool:
    """Take over what was asked for; whether another recall was."""
    settings = draft.settings
    before = settings.get("recall", DEFAULT_RECALL)
    for name in ("recall", "memory_bytes"):
        if (value := getattr(options, name)) is not None:
            settings[name] = value
    if options.factory == "auto":
        settings.pop("factory", None)
        settings.pop("registered", None)
    elif options.factory is not None:
        settings["factory"], settings["registered"] = options.factory, is_registered(options.factory)
    return bool(settings.get("recall", DEFAULT_RECALL) != before)


def _is_stale(draft: Draft, part: Part) -> bool:
    """Whether there is no FAISS index, or one of too few rows or of another type than is wanted."""
    current = part.about["faiss"]
    if current is None:
        return True
    grown = part.rows - current["rows"] > MERGE_SHARE * part.rows
    return grown or not _same_type(_plan(draft, part), current)


def _plan(draft: Draft, part: Part) -> Plan:
    """What was asked for; the choice by size if that was in an earlier run and does not fit the rows there are now."""
    settings = draft.settings
    factory, memory_bytes = settings.get("factory"), settings.get("memory_bytes")
    try:
        return choose_plan(part.rows, part.dim, factory=factory, memory_bytes=memory_bytes, collection=draft.rows)
    except InputError:
        if not _forgiven(draft, part):
            raise
        return choose_plan(part.rows, part.dim, memory_bytes=memory_bytes, collection=draft.rows)


def _forgiven(draft: Draft, part: Part) -> bool:
    """Whether a type that does not fit may give way: it was asked for in an earlier run, or for the other partition."""
    factory = draft.settings.get("factory")
    return factory is not None and (part is not draft.part or factory == draft.first_settings.get("factory"))


def _same_type(plan: Plan, current: dict[str, Any]) -> bool:
    """Whether a FAISS file is what a plan asks for; a number of lists that was chosen by size may lag behind growth."""
    wanted, present = plan.factory, current["factory"]
    if plan.by_size and current["by_size"]:
        wanted, present = (re.sub(r"\bIVF\d+", "IVF", factory) for factory in (wanted, present))
    return bool(wanted == present)


def build_faiss(
    draft: Draft, part: Part, vectors: Vectors | ChosenRows, *, rebuild: bool = True, progress: bool = False
) -> None:
    """Make the FAISS index of a partition, or grow it, and tune it; recorded in the partition's entry."""
    rows = len(vectors)
    plan, current = _plan(draft, part), part.about["faiss"]
    trained_on = rows
    if current and not rebuild and _same_type(plan, current) and rows <= 2 * current["trained_on"]:
        trained_on = current["trained_on"]
        traits = choose_plan(rows, part.dim, factory=current["factory"]).traits
        plan = Plan(current["factory"], current["by_size"], replace(traits, parameters=current["parameters"]))
        draft.writer.require_intact(draft.manifest, [current["file"]])
        assert isinstance(vectors, Vectors)
        index = faiss_index.grow(draft.folder / current["file"], vectors, current["rows"], rows)
    else:
        try:
            index = faiss_index.build(vectors, rows, plan, progress=progress)
        except InputError:
            if plan.by_size or not _forgiven(draft, part):
                raise
            memory_bytes = draft.settings.get("memory_bytes")
            plan = choose_plan(rows, part.dim, memory_bytes=memory_bytes, collection=draft.rows)
            index = faiss_index.build(vectors, rows, plan, progress=progress)
    queries = reference_queries(part)
    kind = "text" if queries is not None else "image"
    if queries is None:
        queries = noisy_rows(vectors)
    recall = draft.settings.get("recall", DEFAULT_RECALL)
    tuning = faiss_index.tune(index, vectors, rows, queries, plan, kind=kind, recall=recall)
    part.about["faiss"] = {
        "file": draft.writer.add("faiss", lambda file: faiss_index.write(index, file)),
        "factory": plan.factory,
        "by_size": plan.by_size,
        "rows": rows,
        "trained_on": trained_on,
        "parameters": tuning.parameters,
        "candidates": tuning.candidates,
    }
    part.about["measured"] = tuning.to_dict()


def reference_queries(part: Part) -> np.ndarray | None:
    """Unit rows of the text queries that tune and calibrate a partition; `None` where its encoder takes no text."""
    about = part.about["queries"]
    return np.load(part.writer.folder / about["file"], allow_pickle=False) if about else None


def noisy_rows(vectors: Vectors | ChosenRows, count: int = 200, noise: float = 0.5, seed: int = 0) -> np.ndarray:
    """Queries like stored images but not equal to any: stored rows plus Gaussian noise of half their norm."""
    random = np.random.default_rng(seed)
    rows = vectors.gather(np.sort(random.choice(len(vectors), min(count, len(vectors)), replace=False)))
    rows = rows + noise * random.standard_normal(rows.shape, np.float32) / np.sqrt(np.float32(vectors.dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
