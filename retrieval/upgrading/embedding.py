"""Images of an index through the new encoder: in order, checked against their recorded content, kept as it goes on.

Images are read and encoded without any lock; it is taken for a moment whenever what is ready is published, and others
write in between. What is ready is therefore known by item and content, and looked up again under the lock.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.encoders import Encoder
from mmalign.encoders.stream import Outcome, encode_stream
from mmalign.errors import EncoderMismatchError, IndexLockedError, InputError, UnreadableImageError
from mmalign.imaging import DecodeSettings, FileContent, read_file
from mmalign.progress import progress_bar

from ..draft import CHECKPOINT_SECONDS, Draft
from ..items import NO_HASH, Item, Items
from ..snapshot import Snapshot
from ..storage import Store
from .bridge import Content
from .part import UpgradePart

MOST_READY = 20_000  # vectors in memory before a run waits for another writer

__all__ = ["Progress", "RowOfItem", "changing", "embed_rows", "opened_upgrade", "original_of"]


@dataclass
class Progress:
    """What a run has done.

    Attributes:
        embedded: images through the model.
        seconds: that reading, decoding and encoding took.
        failed: entries of `UpgradePart.left_out`, by item id, of this run.
    """

    embedded: int
    seconds: float
    failed: dict[int, dict[str, Any]]

    @property
    def images_per_second(self) -> float:
        """0 where nothing was embedded."""
        return self.embedded / self.seconds if self.embedded else 0.0


@dataclass(frozen=True)
class _Ready:
    item: Item
    vector: np.ndarray | None = None
    failure: dict[str, Any] | None = None


def embed_rows(
    snapshot: Snapshot,
    encoder: Encoder,
    rows: Int[np.ndarray, " n"],
    *,
    publish: Callable[[Draft, UpgradePart], None] | None = None,
    known: Mapping[Content, Float[np.ndarray, " dim"]] | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    progress: bool = False,
    title: str = "embedding",
) -> Progress:
    """Embed old rows that have no new vector yet, in the order given. Ctrl-C loses nothing that is encoded.

    Args:
        snapshot: the index as it was when the rows were chosen.
        encoder: the new one.
        rows: as the snapshot numbers them.
        publish: called under the lock before each publication.
        known: vectors that the encoder gave before; their files are read and compared, not encoded.
        batch_size: images a forward pass.
        workers: decoding threads.
        checkpoint_seconds: between publications, at least; longer where publishing takes more than a twentieth of it.
        progress: show a bar.
        title: of the bar.

    Raises:
        InputError: the upgrade was rolled back or finished meanwhile.
        EncoderMismatchError: another was begun.
    """
    store = snapshot.store
    done = Progress(0, 0.0, {})
    ready: list[_Ready] = []
    spent_publishing = 0.0
    begun = last = time.perf_counter()

    def settle(*, wait: bool) -> None:
        nonlocal spent_publishing, last, checkpoint_seconds
        started = time.perf_counter()
        with changing(store, encoder, wait=wait, brief=True) as draft:
            assert draft.upgrade is not None
            _enter(draft, draft.upgrade, ready)
            if publish is not None:
                publish(draft, draft.upgrade)
            draft.checkpoint()
        ready.clear()
        last = time.perf_counter()
        spent_publishing += last - started
        checkpoint_seconds = max(checkpoint_seconds, 20 * (last - started))

    load = _loader(encoder, snapshot.decode, known or {})
    stream = encode_stream(
        encoder, (_items_of(snapshot, row) for row in rows), load, batch_size=batch_size, workers=workers
    )
    with progress_bar(title, len(rows), enabled=progress, left_out=0) as advance:
        try:
            for batch in stream:
                for outcome in batch.outcomes:
                    what = _settled(outcome, batch.vectors)
                    ready.append(what)
                    if what.failure is not None:
                        done.failed[what.item.id] = what.failure
                done.embedded += len(batch.vectors)
                advance(len(batch.outcomes), left_out=len(done.failed))
                if time.perf_counter() - last >= checkpoint_seconds:
                    with contextlib.suppress(IndexLockedError):  # somebody else writes: go on, and try again
                        settle(wait=len(ready) >= MOST_READY)
        finally:
            # Of a stop in the middle of publishing nothing is lost either: it is entered again, or was entered whole.
            done.seconds = time.perf_counter() - begun - spent_publishing
            if ready:
                settle(wait=True)
    return done


@contextmanager
def changing(store: Store, encoder: Encoder | None, *, wait: bool = True, brief: bool = False) -> Iterator[Draft]:
    """Hold the lock of an index that is being upgraded (to an encoder, if one is given); a draft of it.

    Raises:
        InputError, EncoderMismatchError: as `opened_upgrade`.
        IndexLockedError: another process writes, and `wait` is false.
    """
    with store.write(wait=wait, brief=brief) as writer:
        draft = Draft(writer, store.read_manifest())
        opened_upgrade(draft.manifest["upgrade"], encoder)
        yield draft


def opened_upgrade(about: dict[str, Any] | None, encoder: Encoder | None) -> dict[str, Any]:
    """The manifest's entry `upgrade`, of that encoder.

    Raises:
        InputError: there is none.
        EncoderMismatchError: it is of another encoder.
    """
    if not about:
        raise InputError("no upgrade of this index is under way; begin one with `mmalign upgrade INDEX --to ENCODER`")
    if encoder is not None and encoder.fingerprint != about["encoder"]["fingerprint"]:
        raise EncoderMismatchError(
            f"this index is being upgraded to {about['encoder']['spec']!r} (fingerprint "
            f"{about['encoder']['fingerprint'][:12]}), not to {encoder.spec!r} ({encoder.fingerprint[:12]}); finish "
            "that, or end it with `mmalign upgrade INDEX --roll-back`"
        )
    return about


def _items_of(snapshot: Snapshot, row: int) -> list[Item]:
    return [snapshot.items.item(position) for position in snapshot.items.positions_of_row(int(row))]


def _settled(outcome: Outcome[list[Item], _Ready], vectors: np.ndarray) -> _Ready:
    """What became of an image, with its vector or why there is none."""
    if outcome.payload is None:
        return _Ready(outcome.source[0], failure=_failure(outcome.source[0], outcome.error))
    if outcome.vector is None:
        return outcome.payload
    item, vector = outcome.payload.item, vectors[outcome.vector]
    if not (np.isfinite(vector).all() and np.abs(vector).max() > 0):  # an encoder in half precision can overflow
        return _Ready(item, failure=_entry(item, "no_vector", "the encoder gives no finite vector"))
    return _Ready(item, vector)


def _loader(
    encoder: Encoder, decode: DecodeSettings, known: Mapping[Content, np.ndarray]
) -> Callable[[list[Item]], tuple[_Ready, Tensor | None]]:
    def load(items: list[Item]) -> tuple[_Ready, Tensor | None]:
        try:
            content = original_of(items)
        except UnreadableImageError as error:
            return _Ready(items[0], failure=_failure(items[0], error)), None
        if (vector := known.get((items[0].id, items[0].sha256))) is not None:
            return _Ready(items[0], vector), None
        return _Ready(items[0]), encoder.load_image(content, decode)[1]

    return load


def original_of(items: Sequence[Item]) -> FileContent:
    """The file of several items of one content: the first that still holds it.

    Raises:
        UnreadableImageError: none does; the reason is that of the first.
    """
    failure: UnreadableImageError | None = None
    for item in items:
        try:
            return _original(item)
        except UnreadableImageError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _original(item: Item) -> FileContent:
    if not item.path.is_absolute():
        raise UnreadableImageError("no_original", "the index was made from vectors, nobody said where the image is")
    content = read_file(os.fspath(item.path))
    if item.sha256 not in (content.sha256, NO_HASH.hex()):
        raise UnreadableImageError(
            "changed", "the file has other content than was indexed; `mmalign index` brings the index up to date"
        )
    return content


def _failure(item: Item, error: UnreadableImageError | None) -> dict[str, Any]:
    assert error is not None
    return _entry(item, error.reason, str(error))


def _entry(item: Item, reason: str, message: str) -> dict[str, Any]:
    path = os.fspath(item.path)
    return {"id": item.id, "sha256": item.sha256, "path": path, "reason": reason, "message": message}


def _enter(draft: Draft, part: UpgradePart, ready: Iterable[_Ready]) -> None:
    """New vectors for the rows that the items have now; what was removed or changed meanwhile is left."""
    known = draft.stored_items()
    row_of = RowOfItem(known)
    moved = part.moved(draft.rows)
    rows: list[int] = []
    vectors: list[np.ndarray] = []
    left_out = {entry["id"]: entry for entry in part.left_out}
    for what in ready:
        row = row_of(what.item.id, what.item.sha256)
        if row is None or moved[row]:
            continue
        if what.failure is not None:
            left_out[what.item.id] = what.failure
            continue
        assert what.vector is not None
        moved[row] = True
        rows.append(row)
        vectors.append(what.vector)
    if rows:
        part.take(rows, np.stack(vectors))
    part.set_left_out(list(left_out.values()))  # `checking.prepare` strikes out what is settled


class RowOfItem:
    """Vector rows by item id."""

    def __init__(self, items: Items) -> None:
        self.items = items
        self._order = np.argsort(items.numbers("id"), kind="stable")
        self._ids = items.numbers("id")[self._order]

    def __call__(self, number: int, sha256: str | None = None) -> int | None:
        """Row of an item; `None` if there is no such item, or it has another content than the hash says."""
        place = self._place(number)
        if place is None or (sha256 is not None and self.items.value("sha256", place).hex() != sha256):
            return None
        return int(self.items.numbers("row")[place])

    def _place(self, number: int) -> int | None:
        at = int(np.searchsorted(self._ids, number))
        return int(self._order[at]) if at < len(self._ids) and self._ids[at] == number else None
