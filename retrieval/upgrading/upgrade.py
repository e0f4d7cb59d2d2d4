"""`IndexUpgrade`: another encoder for an index that stays searchable, and never gets worse, on the way."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign.checks import at_least, one_of
from mmalign.encoders import Encoder
from mmalign.errors import InputError

from ..calibration import query_bank
from ..draft import CHECKPOINT_SECONDS, Draft
from ..finishing import needs_queries, write_queries
from ..recorded_encoder import check_encoder, describe_encoder, given_encoder, load_recorded
from ..snapshot import Snapshot
from ..storage import Store, find_index
from .bridge import Bridge, Content
from .checking import prepare
from .embedding import Progress, RowOfItem, changing, embed_rows, opened_upgrade
from .live import bridged_levels
from .ordering import Order, backfill_rows
from .part import UpgradePart, alive_places, new_entry, read_numbers
from .report import UpgradeReport
from .sampling import measure_sample
from .support import Support, read_support
from .switching import GONE, finish_upgrade, roll_back

__all__ = ["IndexUpgrade", "UpgradeStatus", "status_of"]


@dataclass(frozen=True)
class UpgradeStatus:
    """How far an upgrade is.

    Attributes:
        stage: "none", "measuring", "measured", "running", or "finished" where the index before it is archived.
        old: spec of the encoder of the index; the new one, once it is finished.
        new: spec of the one that replaces it.
        images: in the index, each content once.
        moved: of them, with a new vector.
        left_out: could not be embedded, see `IndexUpgrade.left_out`.
        modes: how queries of a kind are answered (`retrieval.upgrading.live`), while it is running.
        checked: hit@1 and hit@10 of each mode on the support set, by kind, at the last look.
        archive: folder of the index as it was, once it is finished.
    """

    stage: str
    old: str | None
    new: str | None
    images: int
    moved: int = 0
    left_out: int = 0
    modes: dict[str, str] = field(default_factory=dict)
    checked: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    archive: str | None = None

    @property
    def remaining(self) -> int:
        """Images that are still to be embedded."""
        return self.images - self.moved - self.left_out if self.stage not in ("none", "finished") else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {**asdict(self), "remaining": self.remaining}


def status_of(snapshot: Snapshot) -> UpgradeStatus:
    """How far the upgrade of an opened index is."""
    manifest, about, folder = snapshot.manifest, snapshot.manifest.get("upgrade"), snapshot.store.folder
    images, own = snapshot.alive_count, manifest["encoder"]["spec"]
    if not about:
        done = manifest.get("upgraded")
        if done and done["archive"] and (folder / done["archive"]).is_dir():
            return UpgradeStatus("finished", own, None, images, archive=os.fspath(folder / done["archive"]))
        return UpgradeStatus("none", own, None, images)
    assert snapshot.places is not None
    moved = int(np.count_nonzero(alive_places(snapshot.places, snapshot.alive)))
    left_out = len(snapshot.left_out)
    new, modes, checked = about["encoder"]["spec"], about["modes"], about["checked"]
    return UpgradeStatus(about["stage"], own, new, images, moved, left_out, modes, checked)


class IndexUpgrade:
    """Replaces the encoder of an index in steps, each of which can be stopped, continued and undone.

        upgrade = IndexUpgrade("photos/", "open_clip:ViT-L-14/...")
        print("\\n".join(upgrade.measure("captions.jsonl").lines()))
        upgrade.start()      # searches use the new model from here on, where that was measured to be no worse
        upgrade.backfill()   # for as long as it takes; others search, add and remove meanwhile
        upgrade.finish()     # or roll_back(), at any stage

    Old vectors are kept, whole, until the end. Embedding takes no lock; publishing takes it for a moment.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        to: str | os.PathLike[str] | Encoder | None = None,
        *,
        encoder: str | os.PathLike[str] | Encoder | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
    ) -> None:
        """Nothing is loaded or written yet.

        Args:
            folder: the index, or the folder that was indexed.
            to: the new encoder (spec, folder or encoder); may be left out once an upgrade has begun.
            encoder: the index's own, where its folder has moved since.
            device: where both run.
            dtype: weights of the new image tower; "auto" measures whether bfloat16 is faster. Recorded.

        Raises:
            InputError: no index there.
        """
        self.store = Store(find_index(folder))
        self._to, self._own = to, encoder
        self._device, self._dtype = device, dtype
        self._new: Encoder | None = None
        self._old: Encoder | None = None

    # -- what is there ---------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Where the index is."""
        return self.store.folder

    @property
    def new_encoder(self) -> Encoder:
        """The new encoder, loaded.

        Raises:
            InputError: none was given, and no upgrade has begun.
            EncoderMismatchError: an upgrade to another one has begun.
        """
        if self._new is None:
            about = self.store.read_manifest().get("upgrade")
            if self._to is None:
                entry = opened_upgrade(about, None)["encoder"]
                self._new = load_recorded(entry, self._device)
                check_encoder(entry, self._new, self.folder)
            else:
                dtype = about["encoder"]["dtype"] if about and not isinstance(self._to, Encoder) else self._dtype
                self._new = given_encoder(self._to, None if isinstance(self._to, Encoder) else self._device, dtype)
                if about:
                    opened_upgrade(about, self._new)
        return self._new

    @property
    def old_encoder(self) -> Encoder | None:
        """The index's own encoder, loaded; `None` where none is recorded."""
        about = self.store.read_manifest()["encoder"]
        if self._old is None and about["spec"] is not None:
            if self._own is None:
                self._old = load_recorded(about, self._device)
            else:
                loaded = isinstance(self._own, Encoder)
                self._old = given_encoder(
                    self._own, None if loaded else self._device, "auto" if loaded else about["dtype"]
                )
            check_encoder(about, self._old, self.folder)
        return self._old

    def status(self) -> UpgradeStatus:
        """How far it is; reads the manifest, loads no encoder."""
        return status_of(Snapshot(self.store))

    def report(self) -> UpgradeReport | None:
        """What the last `measure` found; `None` before it."""
        about = self.store.read_manifest().get("upgrade")
        return UpgradeReport.from_dict(about["report"]) if about and about["report"] else None

    def left_out(self) -> list[dict[str, Any]]:
        """Images that could not be embedded, with `id`, `path`, `reason` and `message`. They keep their old vectors."""
        return Snapshot(self.store).left_out

    # -- the steps -------------------------------------------------------------------------------------------------

    def measure(
        self,
        support: str | os.PathLike[str] | Support | None = None,
        *,
        sample: int | None = None,
        order: Order = "auto",
        batch_size: int | None = None,
        workers: int | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        seed: int = 0,
        progress: bool = False,
    ) -> UpgradeReport:
        """Embed a sample, fit bridges, and say what an upgrade would do. Searches stay as they are.

        The vectors of the sample are kept for the upgrade itself, and a run that was stopped goes on.

        Args:
            support: captions of images of the index (queries in words with a known answer), texts or images to fit on;
                see `retrieval.upgrading.support.read_support`. Queries by image are always measured: altered copies
                of images of the index.
            sample: images, at most; 1,000 or five for each dimension by default, whichever is more.
            order: in which the rest would be embedded, for the curve.
            batch_size: images a forward pass.
            workers: decoding threads.
            checkpoint_seconds: between states that cannot be lost, at least.
            seed: of the sample and of which queries choose and which measure.
            progress: show bars.

        Raises:
            InputError: no encoder was given, it is the index's own, or has no tower for what the index answers; the
                upgrade is running already; the support set has nothing to do with the index.
            EncoderMismatchError: an upgrade to another encoder has begun, or an encoder is not what was recorded.
        """
        at_least("sample", sample, 2)
        at_least("seed", seed, 0)
        given = read_support(support) if isinstance(support, (str, os.PathLike)) else support or Support()
        old = self.old_encoder
        given.captions_in(Snapshot(self.store).items)  # whether it has anything to do with the index, before it begins
        new = self._begin()
        result = measure_sample(
            self.store,
            old,
            new,
            given,
            sample=sample,
            order=order,
            embed={"batch_size": batch_size, "workers": workers, "checkpoint_seconds": checkpoint_seconds},
            seed=seed,
            progress=progress,
        )
        references = new.encode_texts(query_bank(result.report.images)) if "text" in new.modalities else None
        with changing(self.store, new, brief=True) as draft:
            part = self._part(draft, "measuring", "measured")
            part.about["bridge"] = result.bridge.write(draft.writer)
            part.about["report"] = result.report.to_dict()
            part.about["stage"], part.about["speed"] = "measured", result.report.images_per_second
            if references is not None and needs_queries(part, result.report.images):
                write_queries(part, references, built_in=True)
            part.changed = True
            draft.checkpoint()
        return result.report

    def start(self, *, order: Order = "auto", seed: int = 0, force: bool = False, progress: bool = False) -> None:
        """From here on searches use the new model wherever that was measured to be no worse. No image is read.

        Args:
            order: in which images are embedded: "density" (the most isolated first), "random", "class-mean:COLUMN" (the
                farthest from the mean of their class first, as in arXiv 2509.16664 but on the old vectors),
                "access:COLUMN" (the most used first), or a callable that gives a key for each of [n, dim] old vectors,
                highest first. COLUMN is one of your metadata. "auto" is density up to 100,000 images, then random.
            seed: of a random order.
            force: also where the report advises against it.
            progress: show bars.

        Raises:
            InputError: nothing was measured yet, the report advises against it, or the order cannot be had.
        """
        self._check_to()
        report = self.report()
        if report is None:
            raise InputError("nothing was measured yet; do that first: `mmalign upgrade INDEX --to ENCODER --measure`")
        if report.advice == "none" and not force:
            raise InputError(
                f"the report advises against this upgrade: {'; '.join(report.reasons)}. Use --force (force=True) to do "
                "it all the same, or --roll-back to forget it"
            )
        name = order if isinstance(order, str) else getattr(order, "__name__", "callable")
        snapshot = Snapshot(self.store)
        rows = backfill_rows(snapshot, order, seed=seed, progress=progress)  # long, and needs no lock
        with changing(self.store, None, brief=True) as draft:
            part = self._part(draft, "measured")
            if draft.manifest["generation"] != snapshot.manifest["generation"]:
                snapshot = Snapshot(self.store)
                rows = backfill_rows(snapshot, order, seed=seed, progress=progress)
            bridge = Bridge.read(self.folder, part.about["bridge"])
            bridge = bridge.with_levels(bridged_levels(self.store, draft.manifest, part.about, snapshot.alive))
            held = _release(draft, part, bridge)
            part.about["bridge"] = replace(bridge, held=held).write(draft.writer)
            part.set_order(name, rows[~part.moved(draft.rows)[rows]])
            part.about["stage"] = "running"
            prepare(draft, part, progress=progress)
            draft.checkpoint()

    def backfill(
        self,
        *,
        limit: int | None = None,
        batch_size: int | None = None,
        workers: int | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        progress: bool = False,
    ) -> Progress:
        """Embed what has no new vector yet, by priority, until all is done or it is stopped; then call it again.

        Images that are gone, changed or unreadable keep their old vectors and are listed (`left_out`); the next call
        tries them again.

        Args:
            limit: images, at most.
            batch_size: images a forward pass.
            workers: decoding threads.
            checkpoint_seconds: between publications, at least; searches see what is published when they `refresh`.
            progress: show a bar.

        Raises:
            InputError: the upgrade has not been started, or was rolled back meanwhile.
            EncoderMismatchError: the new encoder is not what was recorded.
        """
        at_least("limit", limit)
        new, total = self.new_encoder, Progress(0, 0.0, {})
        tried = 0
        while True:
            snapshot = Snapshot(self.store)
            if snapshot.upgrade is None:
                raise InputError(
                    "the upgrade is not running; `mmalign upgrade INDEX --to ENCODER` or `IndexUpgrade.start` starts it"
                )
            todo = _todo(snapshot, total.failed)
            todo = todo[: None if limit is None else limit - tried]
            if not len(todo):
                return total
            done = embed_rows(
                snapshot,
                new,
                todo,
                publish=prepare,
                known=snapshot.upgrade.bridge.held,
                batch_size=batch_size,
                workers=workers,
                checkpoint_seconds=checkpoint_seconds,
                progress=progress,
            )
            tried += len(todo)
            total.embedded += done.embedded
            total.seconds += done.seconds
            total.failed |= done.failed

    def finish(
        self, *, gone: str = "map", keep_old: bool = True, force: bool = False, progress: bool = False
    ) -> Path | None:
        """Switch: the index is one of the new encoder from here on.

        Args:
            gone: what becomes of images that could not be embedded: "map" keeps them, their old vectors taken to the
                new space by ridge regression and flagged `mapped` (they are embedded properly once an update finds
                them again); "drop" removes them from the index.
            keep_old: archive the index as it was inside the index folder; else its files go with the next write.
            force: also where the new encoder is worse on the support set, or more than a fifth would be dropped.
            progress: show a bar.

        Returns:
            The archive, an index of its own that can be opened and deleted; `None` without one.

        Raises:
            InputError: images are still to be embedded, the new encoder is worse on the support set, or too few pairs
                tell how to map what is gone.
        """
        one_of("gone", gone, GONE)
        self._check_to()
        return finish_upgrade(self.store, gone=gone, keep_old=keep_old, force=force, progress=progress)

    def roll_back(self, *, force: bool = False) -> None:
        """Forget the upgrade: the index is as if it had not been, updates since its start included.

        After `finish` it is the archived index that comes back, exactly, and the archive is gone.

        Args:
            force: go back after `finish` although the index has been written since, and lose that.

        Raises:
            InputError: there is nothing to roll back, or what was written since `finish` would be lost.
            IndexDamagedError: the archive is not what was written; nothing was changed.
        """
        roll_back(self.store, force=force)

    def _check_to(self) -> None:
        """An encoder that was named must be the one that the upgrade is to."""
        about = self.store.read_manifest().get("upgrade")
        if self._to is not None and about:
            opened_upgrade(about, self.new_encoder)

    def _begin(self) -> Encoder:
        """The new encoder, with an entry in the manifest."""
        new = self.new_encoder
        new.require("image")
        with self.store.write(wait=True) as writer:
            draft = Draft(writer, self.store.read_manifest())
            own = draft.manifest["encoder"]
            if draft.upgrade is not None:
                opened_upgrade(draft.upgrade.about, new)
                self._part(draft, "measuring", "measured")
                return new
            if new.fingerprint == own["fingerprint"]:
                raise InputError(f"{new.spec!r} is the index's own encoder; there is nothing to upgrade")
            lacking = set(own["modalities"]) - set(new.modalities)
            if lacking:
                raise InputError(
                    f"{new.spec!r} has no {' and no '.join(sorted(lacking))} tower, and the index answers such queries "
                    "today; choose an encoder that has, or make a second index with --out"
                )
            draft.upgrade = UpgradePart(writer, new_entry(describe_encoder(new)))
            draft.upgrade.changed = True
            draft.checkpoint()
        return new

    def _part(self, draft: Draft, *stages: str) -> UpgradePart:
        assert draft.upgrade is not None
        stage = draft.upgrade.about["stage"]
        if stage not in stages:
            raise InputError(
                "the upgrade is running already: `mmalign upgrade INDEX` goes on with it, --roll-back ends it"
                if stage == "running"
                else "nothing was measured yet; do that first: `mmalign upgrade INDEX --to ENCODER --measure`"
            )
        return draft.upgrade


def _release(draft: Draft, part: UpgradePart, bridge: Bridge) -> dict[Content, np.ndarray]:
    """Keep back the new vectors of what the support set asks for; see `Bridge.held`."""
    asked = sorted({answer for queries in bridge.support.values() for answer in queries.answers})
    row_of, moved = RowOfItem(draft.stored_items()), part.moved(draft.rows)
    known = {answer: row for answer in asked if (row := row_of(*answer)) is not None and moved[row]}
    if not known:
        return {}
    vectors = part.release(np.array(list(known.values()), np.int64), manifest=draft.manifest)
    return dict(zip(known, vectors, strict=True))


def _todo(snapshot: Snapshot, failed: dict[int, dict[str, Any]]) -> np.ndarray:
    """Old rows without a new vector, by priority; those that came after the start follow."""
    assert snapshot.upgrade is not None
    open_rows = snapshot.upgrade.remaining.copy()
    row_of = RowOfItem(snapshot.items)
    for number in failed:
        if (row := row_of(number)) is not None:
            open_rows[row] = False
    about = snapshot.manifest["upgrade"]
    order = read_numbers(snapshot.store.folder, about["order"]["file"] if about["order"] else None)
    first = order[open_rows[order]]
    open_rows[first] = False
    return np.concatenate([first, np.flatnonzero(open_rows)])
