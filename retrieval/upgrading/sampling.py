"""From an index and a support set to what is measured: a sample embedded by both encoders, queries, pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int

from mmalign.encoders import Encoder
from mmalign.files import sha256_of

from ..snapshot import Snapshot
from ..storage import Store
from .bridge import Bridge, SupportQueries
from .embedding import RowOfItem, embed_rows, original_of
from .measuring import Gallery, Pairs, Task, advise, measure_kinds
from .ordering import Order, backfill_rows
from .part import new_rows
from .report import UpgradeReport
from .support import Support, altered_copies, text_pairs

__all__ = ["Measured", "measure_sample"]

LEAST_SAMPLE = 1000
PAIRS_A_DIMENSION = 5
MOST_TARGETS = 600  # images that queries ask for; all others may be fitted on
MOST_ALTERED = 300
MOST_TEXTS = 3000


@dataclass(frozen=True)
class Measured:
    """A report, and what searches need of it."""

    report: UpgradeReport
    bridge: Bridge


def measure_sample(
    store: Store,
    old: Encoder | None,
    new: Encoder,
    support: Support,
    *,
    sample: int | None,
    order: Order,
    embed: Mapping[str, Any],
    seed: int,
    progress: bool,
) -> Measured:
    """See `IndexUpgrade.measure`; `embed` has the options of `embed_rows`."""
    snapshot = Snapshot(store)
    captions = support.captions_in(snapshot.items)
    wide = max(snapshot.dim, new.dim)
    size = sample or max(LEAST_SAMPLE, PAIRS_A_DIMENSION * wide)
    wanted = _draw(snapshot, list(captions), size, seed)
    drawn = [snapshot.items.item(snapshot.items.positions_of_row(int(row))[0]).id for row in wanted]
    done = embed_rows(
        snapshot, new, wanted[~_moved(snapshot)[wanted]], progress=progress, title="embedding a sample", **embed
    )
    snapshot = Snapshot(store)  # others may have removed, added and renumbered since
    captions = support.captions_in(snapshot.items)
    about = snapshot.manifest["upgrade"]
    row_of = RowOfItem(snapshot.items)
    there = [row for number in drawn if (row := row_of(number)) is not None]
    rows = np.intersect1d(np.array(there, np.int64), np.flatnonzero(_moved(snapshot)))
    gallery = _gallery(snapshot, about, rows, new, order, seed)
    # A handful of images, of a run that only had those left, tells no rate.
    speed = done.images_per_second if done.embedded >= 32 else about.get("speed") or done.images_per_second
    remaining = snapshot.alive_count - int(np.count_nonzero(snapshot.alive & _moved(snapshot)))

    targets = _targets(rows, captions, seed)
    tasks: dict[str, Task] = {}
    if captions and "text" in new.modalities:
        tasks |= _text_task(old, new, rows, captions, targets, seed, progress)
    tasks |= _image_task(snapshot, old, new, rows, targets, seed, progress)
    sources = _sources(snapshot, old, new, gallery, rows, captions, targets, support, progress)
    compatible = getattr(new, "compatible_with", None)
    reports, chosen, notes = measure_kinds(
        gallery,
        tasks,
        sources,
        compatible=compatible is not None and compatible == snapshot.manifest["encoder"]["fingerprint"],
        seed=seed,
        progress=progress,
    )
    if "text" in new.modalities and "text" not in tasks:
        why = "too few images of the sample have captions" if captions else "no image of the index came with captions"
        notes.append(
            f"queries in words were not measured ({why}), and stay with the old encoder until the end; give captions "
            "of images of the index with --support"
        )
    if done.failed:
        left = f"{len(done.failed):,} images of the sample could not be embedded"
        notes.append(f"{left} (`mmalign upgrade INDEX --left-out`)")
    report = UpgradeReport(
        old=snapshot.manifest["encoder"]["spec"],
        new=new.spec,
        images=snapshot.alive_count,
        sampled=len(rows),
        remaining=remaining,
        images_per_second=speed,
        hours=remaining / speed / 3600 if speed else 0.0,
        pairs={name: len(pairs[0]) for name, pairs in sources.items()},
        kinds=reports,
        advice="re-embed",
        reasons=[],
        notes=notes,
    )
    report.advice, report.reasons = advise(report)
    first = [snapshot.items.item(snapshot.items.positions_of_row(int(row))[0]) for row in rows]
    queries = {
        kind: SupportQueries(task.old, task.new, [(first[place].id, first[place].sha256) for place in task.target])
        for kind, task in tasks.items()
    }
    return Measured(report, Bridge(chosen, queries))


def _moved(snapshot: Snapshot) -> np.ndarray:
    assert snapshot.places is not None
    mask: np.ndarray = new_rows(snapshot.places, len(snapshot.vectors)) >= 0
    return mask


def _draw(snapshot: Snapshot, captioned: Sequence[int], size: int, seed: int) -> Int[np.ndarray, " n"]:
    """Captioned rows first, then any, all drawn at random; the same for the same index and seed."""
    alive = np.flatnonzero(snapshot.alive)
    random = np.random.default_rng((seed, 0))
    key = random.random(len(alive))
    key[np.isin(alive, np.array(captioned, np.int64))] -= 1
    return alive[np.argsort(key, kind="stable")[:size]]


def _gallery(
    snapshot: Snapshot, about: dict[str, Any], rows: Int[np.ndarray, " n"], new: Encoder, order: Order, seed: int
) -> Gallery:
    from ..partition import Partition

    partition = Partition(snapshot.store, snapshot.manifest, about)
    assert snapshot.places is not None
    new_row = new_rows(snapshot.places, len(snapshot.vectors))
    place = np.full(len(snapshot.vectors), -1, np.int64)
    place[rows] = np.arange(len(rows))
    ordered = place[backfill_rows(snapshot, order, seed=seed)]
    renewed = partition.vectors.gather(new_row[rows]) if len(rows) else np.zeros((0, new.dim), np.float32)
    return Gallery(snapshot.vectors.gather(rows), renewed, ordered[ordered >= 0])


def _targets(rows: Int[np.ndarray, " n"], captions: Mapping[int, list[str]], seed: int) -> Int[np.ndarray, " n"]:
    """0 for images to fit on, 1 for those whose queries choose, 2 for those whose queries measure."""
    able = np.isin(rows, list(captions)) if captions else np.ones(len(rows), bool)
    random = np.random.default_rng((seed, 1))
    chosen = random.permutation(np.flatnonzero(able))[: min(MOST_TARGETS, len(rows) // 2)]
    part = np.zeros(len(rows), np.int64)
    part[chosen[::2]] = 2
    part[chosen[1::2]] = 1
    return part


def _text_task(
    old: Encoder | None,
    new: Encoder,
    rows: Int[np.ndarray, " n"],
    captions: Mapping[int, list[str]],
    targets: Int[np.ndarray, " n"],
    seed: int,
    progress: bool,
) -> dict[str, Task]:
    pairs = [(place, text) for place in np.flatnonzero(targets) for text in captions.get(int(rows[place]), [])]
    if len(pairs) > MOST_TEXTS:
        kept = np.random.default_rng((seed, 2)).choice(len(pairs), MOST_TEXTS, replace=False)
        pairs = [pairs[number] for number in np.sort(kept)]
    target = np.array([place for place, _ in pairs], np.int64)
    part = targets[target]
    if not (part == 1).any() or not (part == 2).any():
        return {}
    texts = [text for _, text in pairs]
    able = old is not None and "text" in old.modalities
    old_rows = old.encode_texts(texts, progress=progress) if able and old is not None else None
    task = Task(
        "text",
        "your captions; right is their image",
        old_rows,
        new.encode_texts(texts, progress=progress),
        target,
        part,
    )
    return {"text": task}


def _image_task(
    snapshot: Snapshot,
    old: Encoder | None,
    new: Encoder,
    rows: Int[np.ndarray, " n"],
    targets: Int[np.ndarray, " n"],
    seed: int,
    progress: bool,
) -> dict[str, Task]:
    random = np.random.default_rng((seed, 3))
    asked = np.sort(random.permutation(np.flatnonzero(targets))[:MOST_ALTERED])
    items = [[snapshot.items.item(p) for p in snapshot.items.positions_of_row(int(rows[place]))] for place in asked]
    able = old if old is not None and "image" in old.modalities else None
    (old_rows, new_rows), kept = altered_copies(
        [able, new], [partial(original_of, files) for files in items], snapshot.decode, progress=progress
    )
    target = asked[kept]
    part = targets[target]
    if not (part == 1).any() or not (part == 2).any():
        return {}
    assert new_rows is not None
    what = "mirrored crops of 60 %; right is the image they are of"
    return {"image": Task("image", what, old_rows, new_rows, target, part)}


def _sources(
    snapshot: Snapshot,
    old: Encoder | None,
    new: Encoder,
    gallery: Gallery,
    rows: Int[np.ndarray, " n"],
    captions: Mapping[int, list[str]],
    targets: Int[np.ndarray, " n"],
    support: Support,
    progress: bool,
) -> dict[str, Pairs]:
    """Pairs of vectors to fit on: of images, of texts, and of both."""
    free = targets == 0
    images: Pairs = (gallery.old[free], gallery.new[free])
    if support.images and old is not None and "image" in old.modalities:
        asked = {
            snapshot.items.item(position).sha256
            for place in np.flatnonzero(~free)
            for position in snapshot.items.positions_of_row(int(rows[place]))
        }
        files = [path for path in support.images if sha256_of(path) not in asked]
        further = [one.encode_images(files, decode=snapshot.decode, progress=progress) for one in (old, new)]
        images = (np.concatenate([images[0], further[0]]), np.concatenate([images[1], further[1]]))
    given = [text for place in np.flatnonzero(free) for text in captions.get(int(rows[place]), [])]
    texts = text_pairs(old, new, [*given, *support.texts], progress=progress)
    if texts is None:
        return {"images": images}
    both = (np.concatenate([images[0], texts[0]]), np.concatenate([images[1], texts[1]]))
    return {"images": images, "texts": texts, "both": both}
