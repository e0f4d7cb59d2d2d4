"""Searches while the encoder of an index is being replaced: old and new vectors beside each other.

The old partition stays whole. What a kind of query ("text", "image") does is its mode, chosen by measurement whenever
the index has been written (`checking`):

    old       the old encoder's query on the old vectors, as if there were no upgrade
    bridged   the new encoder's query, brought to the old space, on the old vectors
    merged    bridged on the old vectors of what has not been embedded again, the new encoder's query on the new
              vectors of the rest, both rankings sorted by calibrated scores (`mmalign.score_calibration`); once all
              is embedded, the new encoder's query on the new vectors
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mmalign.errors import IndexDamagedError

from ..calibration import Calibration, background_rows, best_by_chance
from ..exact import merge_top
from ..partition import Partition, SearchedRows
from ..query_rows import Found, QueryRows
from ..storage import Manifest, Store
from ..vectors import ChosenRows
from .bridge import Bridge, KindBridge
from .part import alive_places, new_rows, read_numbers

__all__ = ["MODES", "LiveUpgrade", "bridged_levels"]

MODES = ("old", "bridged", "merged")


class LiveUpgrade:
    """The second partition of an opened index, and how both answer together.

    Attributes:
        about: the manifest's entry `upgrade`.
        partition: of the new encoder.
        places: old row of each new row, -1 where that is gone.
        bridge: see `retrieval.upgrading.bridge`.
    """

    def __init__(self, store: Store, manifest: Manifest, own: Partition, alive: Bool[np.ndarray, " old_rows"]) -> None:
        self.about = manifest["upgrade"]
        self.own, self.own_alive = own, alive
        self.partition = Partition(store, manifest, self.about)
        self.places = read_numbers(store.folder, self.about["places"])
        if len(self.places) != len(self.partition) or self.places.max(initial=-1) >= len(own):
            raise IndexDamagedError(
                f"index {str(store.folder)!r}: the vectors of its upgrade do not stand for rows that exist; `mmalign "
                "upgrade INDEX --roll-back` gives it back as it was before"
            )
        self.alive = alive_places(self.places, alive)
        self.bridge = Bridge.read(store.folder, self.about["bridge"])
        self.rest = Rest(store, manifest, own) if self.about["rest"] else None

    @cached_property
    def new_row(self) -> Int[np.ndarray, " old_rows"]:
        """New row of each old row; -1 for those that have none yet."""
        return new_rows(self.places, len(self.own))

    @cached_property
    def remaining(self) -> Bool[np.ndarray, " old_rows"]:
        """Which old rows are in use and have no new vector."""
        mask: np.ndarray = self.own_alive & (self.new_row < 0)
        return mask

    @cached_property
    def remaining_count(self) -> int:
        """How many these are."""
        return int(np.count_nonzero(self.remaining))

    @cached_property
    def _own_count(self) -> int:
        return int(np.count_nonzero(self.own_alive))

    @cached_property
    def _alive_count(self) -> int:
        return int(np.count_nonzero(self.alive))

    @cached_property
    def _in_rest(self) -> tuple[Bool[np.ndarray, " rest"], int]:
        assert self.rest is not None
        allowed = self.remaining[self.rest.rows]
        return allowed, int(np.count_nonzero(allowed))

    @cached_property
    def _beyond_rest(self) -> Bool[np.ndarray, " old_rows"] | None:
        """What has come since the rest was indexed; `None` if nothing has."""
        assert self.rest is not None
        mask = self.remaining.copy()
        mask[: self.rest.known] = False
        return mask if mask.any() else None

    def mode(self, kind: str) -> str:
        """How queries of a kind are answered now; "old" for a kind that was not measured."""
        mode = str(self.about["modes"].get(kind, "old"))
        # Images may have come since all was embedded and "merged" needed no common scale.
        return mode if mode != "merged" or self.can_merge(kind) else "old"

    def can_merge(self, kind: str) -> bool:
        """Whether old and new vectors have a common scale for a kind of query, or none is needed."""
        one = self.bridge.kinds.get(kind)
        return not self.remaining_count or (one is not None and one.bridged is not None and one.renewed is not None)

    def needs(self, kind: str) -> tuple[bool, bool]:
        """Whether the old and whether the new encoder have to embed queries of a kind."""
        mode = self.mode(kind)
        if mode == "old":
            return True, False
        return bool(mode == "bridged" or self.remaining_count) and self.bridge.kinds[kind].needs_old, True

    def stored(self, row: int) -> Float[np.ndarray, "1 new_dim"] | None:
        """The new vector of an old row; `None` if it has none yet."""
        place = self.new_row[row : row + 1]
        return self.partition.vectors.gather(place) if place[0] >= 0 else None

    def find(
        self,
        query: QueryRows,
        k: int,
        *,
        mask: Bool[np.ndarray, " old_rows"] | None = None,
        exact: bool = False,
        mode: str | None = None,
    ) -> Found:
        """The k best old rows for each query.

        Args:
            query: by both encoders, as far as `needs` asks for them.
            k: results a query.
            mask: which old rows may be returned.
            exact: scan all vectors instead of asking FAISS.
            mode: another one than is in force, to try it.
        """
        mode = mode or self.mode(query.kind)
        if mode == "merged":
            return self._merged(query, k, mask, exact) if self.remaining_count else self._renewed(query, k, mask, exact)
        one = self.bridge.kinds[query.kind] if mode == "bridged" else KindBridge("old", 0.0)
        allowed, kept = (self.own_alive, self._own_count) if mask is None else (self.own_alive & mask, None)
        rows = one.queries(query.old, query.new, self.own.dim)
        scores, found = self.own.search(rows, k, allowed, kept=kept, exact=exact)
        return Found(scores, found, self._old_match(one, scores, query.kind))

    def _renewed(self, query: QueryRows, k: int, mask: Bool[np.ndarray, " old_rows"] | None, exact: bool) -> Found:
        """By new vectors alone."""
        assert query.new is not None
        allowed, kept = (self.alive, self._alive_count) if mask is None else (self.alive & mask[self.places], None)
        scores, rows = self.partition.search(query.new, k, allowed, kept=kept, exact=exact)
        calibration = self.partition.calibration
        matches = calibration.match(scores, query.kind) if calibration else None
        return Found(scores, np.where(rows >= 0, self.places[rows], -1), matches, rows >= 0)

    def _merged(self, query: QueryRows, k: int, mask: Bool[np.ndarray, " old_rows"] | None, exact: bool) -> Found:
        one = self.bridge.kinds[query.kind]
        assert one.bridged is not None
        assert one.renewed is not None
        bridged = one.queries(query.old, query.new, self.own.dim)
        if mask is not None:
            scores, rows = self.own.search(bridged, k, self.remaining & mask, exact=exact)
        elif self.rest is not None:
            scores, rows = self._search_rest(bridged, k, exact)
        else:
            scores, rows = self.own.search(bridged, k, self.remaining, kept=self.remaining_count, exact=exact)
        renewed = self._renewed(query, k, mask, exact)
        common = [one.bridged.log_likelihood_ratio(scores), one.renewed.log_likelihood_ratio(renewed.scores)]
        both = np.concatenate([rows, renewed.rows], axis=1)
        order = np.lexsort((both, -np.concatenate(common, axis=1)), axis=1)[:, :k]

        def best(old: np.ndarray | None, new: np.ndarray | None, unknown: Any) -> np.ndarray:
            parts = [np.full(scores.shape, unknown) if part is None else part for part in (old, new)]
            return np.take_along_axis(np.concatenate(parts, axis=1), order, axis=1)

        matches = self._old_match(one, scores, query.kind)
        known = matches is not None or renewed.matches is not None
        return Found(
            best(scores, renewed.scores, -np.inf),
            best(rows, renewed.rows, -1),
            best(matches, renewed.matches, np.nan) if known else None,
            best(None, renewed.by_new, False),
        )

    def _search_rest(self, bridged: np.ndarray, k: int, exact: bool) -> tuple[np.ndarray, np.ndarray]:
        assert self.rest is not None
        allowed, kept = self._in_rest
        scores, places = self.rest.search(bridged, k, allowed, kept=kept, exact=exact)
        rows = np.where(places >= 0, self.rest.rows[places], -1)
        if self._beyond_rest is not None:
            scores, rows = merge_top(scores, rows, *self.own.search(bridged, k, self._beyond_rest), k)
        return scores, rows

    def _old_match(self, one: KindBridge, scores: np.ndarray, kind: str) -> np.ndarray | None:
        if one.how == "old" or one.alpha == 0 or not len(one.levels):
            return self.own.calibration.match(scores, kind) if self.own.calibration else None
        return Calibration(one.levels, one.levels).match(scores, kind)


class Rest(SearchedRows):
    """Old rows that were still to be embedded when they were last indexed by themselves.

    Attributes:
        rows: which they are.
        known: old rows that there were then.
    """

    def __init__(self, store: Store, manifest: Manifest, own: Partition) -> None:
        super().__init__(store, manifest, manifest["upgrade"]["rest"])
        self.dim, self.known = own.dim, int(self.about["rows"])
        self.rows = read_numbers(store.folder, self.about["members"])
        self.vectors = ChosenRows(own.vectors, self.rows)
        if self.known > len(own) or self.rows.max(initial=-1) >= self.known:
            raise IndexDamagedError(
                f"index {str(store.folder)!r}: the rest of its upgrade names rows that do not exist; `mmalign upgrade "
                "INDEX --roll-back` gives it back as it was before"
            )


def bridged_levels(
    store: Store, manifest: Manifest, about: dict[str, Any], alive: Bool[np.ndarray, " old_rows"]
) -> dict[str, Float[np.ndarray, " references"]]:
    """What chance gives bridged queries on the old vectors, by kind.

    Reference phrases by both encoders where both take text; for images, the sample, which both have seen.
    """
    own = Partition(store, manifest, manifest)
    live = LiveUpgrade(store, {**manifest, "upgrade": about}, own, alive)
    size = int(np.count_nonzero(alive))
    levels = {}
    for kind, one in live.bridge.kinds.items():
        if kind == "text":
            old, new = own.reference_queries(), live.partition.reference_queries()
            if old is None or new is None or len(old) != len(new):
                continue
            background = own.vectors.gather(background_rows(alive))
        else:
            rows = background_rows(live.alive)
            old, new = own.vectors.gather(live.places[rows]), live.partition.vectors.gather(rows)
            background = old
        if len(background) < 8:
            continue
        bridged = one.queries(old, new, own.dim)
        levels[kind] = best_by_chance(bridged, background, size, leave_one_out=kind != "text")
    return levels
