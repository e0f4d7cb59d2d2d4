"""How well an index finds the user's own images by the user's own captions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mmalign.checks import at_least
from mmalign.errors import InputError
from mmalign.metrics import image_text_retrieval, mean_recall
from mmalign.metrics.chance import chance_hit
from mmalign.pairs import read_captioned

from .index import ImageIndex
from .items import positions_of_files

__all__ = ["evaluate_captions", "read_captions"]


def read_captions(path: str | os.PathLike[str]) -> list[tuple[str, list[str]]]:
    """(file, captions) of each image; see `mmalign.pairs.read_captioned` for the form of the file.

    Raises:
        InputError: missing, or a line that is not of that form (numbered).
    """
    return [(image.file, image.captions) for image in read_captioned(path)[0]]


def evaluate_captions(
    index: ImageIndex,
    pairs: Sequence[tuple[str, Sequence[str]]],
    *,
    ks: tuple[int, ...] = (1, 5, 10),
    bootstrap: int | Literal["auto"] = "auto",
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Text-to-image and image-to-text retrieval among the captioned images of an index (exact, unique gallery).

    Args:
        index: holds the images.
        pairs: (file, captions), as from `read_captions`; a file by its path below the indexed folder or by its name.
        ks: depths.
        bootstrap: resamples for the 95 % intervals, 0 for none; "auto" as in `mmalign.metrics.evaluate`.
        batch_size: captions a forward pass.
        seed: of the resampling.
        progress: show a bar.

    Returns:
        `text_to_image` and `image_to_text` (see `mmalign.metrics.evaluate`, with 95 % intervals), `mean_recall`,
        `chance` (hit@k of text queries in a random order), `through_index` (hit@k of text queries against the whole
        index as searched, by both encoders while one is being replaced; all else is by the old one), `images`,
        `captions`, `unmatched` (files that the index does not hold); and what was
        measured: `index` (its folder), `encoder` (`spec` and `fingerprint`), `seed`.

    Raises:
        InputError: none of the files is in the index, or a number is out of range.
    """
    for k in ks:
        at_least("k", k)
    at_least("bootstrap", None if bootstrap == "auto" else bootstrap, 0)
    at_least("seed", seed, 0)
    snapshot, encoder = index.snapshot, index.encoder
    positions = positions_of_files(snapshot.items, [file for file, _ in pairs])
    owners: list[int] = []
    captions: list[str] = []
    rows: list[int] = []
    place_of_row: dict[int, int] = {}
    unmatched = []
    for position, (file, texts) in zip(positions, pairs, strict=True):
        if position is None:
            unmatched.append(file)
            continue
        row = snapshot.items.value("row", position)
        if row not in place_of_row:  # a file may have several lines, and several files one content
            place_of_row[row] = len(rows)
            rows.append(row)
        captions += texts
        owners += [place_of_row[row]] * len(texts)
    if not rows:
        raise InputError(f"none of the {len(pairs)} captioned files is in the index (first: {pairs[0][0]!r})")
    images = snapshot.vectors.gather(np.array(rows))
    queries = encoder.encode_texts(captions, batch_size=batch_size, progress=progress)
    both = image_text_retrieval(images, queries, np.array(owners), ks=ks, bootstrap=bootstrap, seed=seed)
    found = index.find_texts(captions, max(ks), old=queries)
    wanted = np.array(rows)[owners][:, None]
    return {
        **both,
        "mean_recall": mean_recall(*both.values(), ks=ks),
        "chance": {f"hit@{k}": chance_hit(np.ones(1, np.int64), len(rows), k) for k in ks},
        "through_index": {f"hit@{k}": float((found[:, :k] == wanted).any(axis=1).mean()) for k in ks},
        "images": len(rows),
        "captions": len(captions),
        "unmatched": unmatched,
        "index": os.fspath(index.folder),
        "encoder": {"spec": encoder.spec, "fingerprint": encoder.fingerprint},
        "seed": seed,
    }
