"""Whether searches of a running upgrade are as good as they were before it, asked before every publication."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..draft import Draft
from ..finishing import build_faiss, derive
from ..part import Part
from ..partition import Partition
from ..query_rows import QueryRows
from ..vectors import ChosenRows
from .bridge import SupportQueries
from .embedding import RowOfItem
from .live import MODES, LiveUpgrade
from .measuring import choose_mode
from .part import UpgradePart

__all__ = ["check_modes", "measure_modes", "prepare"]

REST_SHARE = 0.8
LEAST_REST = 256  # fewer are scanned as fast


def prepare(draft: Draft, part: UpgradePart, *, rebuild: bool = False, progress: bool = False) -> None:
    """Bring what is derived from the new vectors up to date, and choose the modes; before every publication."""
    _settle_left_out(draft, part)
    if part.rows:
        derive(draft, part, part.alive(draft.alive()), force=rebuild, rebuild=rebuild, progress=progress)
    if part.about["stage"] == "running":
        _index_rest(draft, part, rebuild)
        check_modes(draft, part)


def _settle_left_out(draft: Draft, part: UpgradePart) -> None:
    """Strike out images that are no longer in the index, have other content there, or have been embedded after all."""
    if part.left_out:
        row_of, moved = RowOfItem(draft.stored_items()), part.moved(draft.rows)
        rows = [row_of(entry["id"], entry["sha256"]) for entry in part.left_out]
        entries = zip(part.left_out, rows, strict=True)
        part.set_left_out([entry for entry, row in entries if row is not None and not moved[row]])


def _index_rest(draft: Draft, part: UpgradePart, rebuild: bool) -> None:
    """Old rows that are still to be embedded get a FAISS index of their own whenever they have become much fewer.

    Asking the old one for them alone would take as long as ever, or longer. All these indexes together take about four
    times as long to build as the old one, a twentieth of a run at most.
    """
    rest = np.flatnonzero(draft.alive() & ~part.moved(draft.rows))
    covered = len(part.rest) or draft.rows
    if len(rest) < LEAST_REST:
        if part.about["rest"]:
            part.set_rest(None)
    elif rebuild or len(rest) < REST_SHARE * covered:
        pseudo = Part(draft.writer, {**draft.manifest, "segments": [], "faiss": None})
        pseudo.rows = len(rest)
        build_faiss(draft, pseudo, ChosenRows(draft.vectors(), rest))
        part.set_rest({"faiss": pseudo.about["faiss"], "rows": draft.rows}, rest)


def check_modes(draft: Draft, part: UpgradePart) -> None:
    """Measure every mode on the support set in the index as it is about to be, and put the best that lose nothing."""
    part.record()  # what is measured has to be on disk
    draft.part.record()
    store, manifest = draft.writer.store, {**draft.manifest, "upgrade": part.about}
    alive = draft.alive()
    live = LiveUpgrade(store, manifest, Partition(store, draft.manifest, draft.manifest), alive)
    row_of = RowOfItem(draft.stored_items())
    for kind, queries in live.bridge.support.items():
        figures = measure_modes(live, kind, queries, row_of)
        if not figures:  # nothing is left to judge by
            part.about["modes"].pop(kind, None)
            part.about["checked"].pop(kind, None)
        else:
            part.about["modes"][kind] = choose_mode(figures)
            part.about["checked"][kind] = {mode: list(found) for mode, found in figures.items()}
        part.changed = True


def measure_modes(
    live: LiveUpgrade, kind: str, queries: SupportQueries, row_of: RowOfItem
) -> Mapping[str, tuple[float, float]]:
    """hit@1 and hit@10 of each mode that is possible; nothing where no right answer is in the index any more."""
    found_rows = [row_of(*answer) for answer in queries.answers]
    rows = np.array([-1 if row is None else row for row in found_rows], np.int64)
    there = rows >= 0
    if not there.any():
        return {}
    one = live.bridge.kinds.get(kind)
    kept = QueryRows(kind, None if queries.old is None else queries.old[there], queries.new[there])
    figures = {}
    for mode in MODES:
        if mode == "old" and kept.old is None:
            continue
        # A bridge that is the old query is no other mode.
        if mode == "bridged" and (one is None or one.how == "old" or (one.needs_old and kept.old is None)):
            continue
        if mode == "merged" and not live.can_merge(kind):
            continue
        found = live.find(kept, 10, mode=mode).rows == rows[there][:, None]
        figures[mode] = (float(found[:, 0].mean()), float(found.any(axis=1).mean()))
    return figures
