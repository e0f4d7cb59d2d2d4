"""A folder of colours with its index, for the tests of upgrades."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from colour_encoder import ColourEncoder

from retrieval import ImageIndex, IndexUpgrade, read_captions
from retrieval.upgrading.bridge import Bridge

IMAGES, SAMPLE = 96, 60
HELD = SAMPLE // 2  # what the support set asks for waits for its turn


class World:
    """A folder of its own for each test."""

    def __init__(self, source: Path, where: Path, name: str) -> None:
        self.photos = where / "photos"
        shutil.copytree(source / name, self.photos)
        shutil.copy2(source / "photos.jsonl", where / "photos.jsonl")
        self.captions = where / "photos.jsonl"
        self.caption_of = {name: texts[0] for name, texts in read_captions(self.captions)}
        self.weak, self.strong = ColourEncoder("weak"), ColourEncoder("strong")

    @property
    def upgrade(self) -> IndexUpgrade:
        """As a new process would have it."""
        return IndexUpgrade(self.photos, self.strong, encoder=self.weak)

    def open(self) -> ImageIndex:
        """Opened anew, with both encoders loaded as by their specs."""
        return ImageIndex.open(self.photos)

    def support_hits(self, depth: int = 10) -> tuple[float, float]:
        """hit@1 and hit@10 of the text queries of the support set, one by one through `search`."""
        index = self.open()
        about = index.manifest["upgrade"]["bridge"]
        wanted = {number for number, _ in Bridge.read(index.folder, about).support["text"].answers}
        found = []
        for item in index:
            if item.id in wanted:
                hits = [hit.item.id for hit in index.search(self.caption_of[item.name], k=depth)]
                found.append((hits[:1] == [item.id], item.id in hits))
        assert len(found) == len(wanted) > 20
        return float(np.mean([first for first, _ in found])), float(np.mean([tenth for _, tenth in found]))


def results(index: ImageIndex) -> list[list[tuple[str, float]]]:
    """What an index says to words, to an image file, to an item and to several terms, with a filter."""
    queries: list[Any] = ["200 40 7", "10 90 160", "a dog", index.roots[0] / "0" / "000.png"]
    found = [index.search(query, k=12) for query in queries]
    found += [index.search("200 40 7", k=5, where="size > 100"), index.similar(5, k=5)]
    return [[(hit.item.name, hit.score) for hit in hits] for hits in found]


def own_parts(index: ImageIndex) -> dict[str, Any]:
    """What the manifest says of everything but an upgrade, names of the files of the item table left out."""
    left_out = {"upgrade", "upgraded", "generation", "written", "files", "items", "skipped", "roots"}
    parts = {name: value for name, value in index.manifest.items() if name not in left_out}
    for name in ("segments", "faiss", "queries"):  # names of files apart, their contents
        entries = parts[name] if name == "segments" else [parts[name]]
        parts[name] = [{**entry, "file": index.manifest["files"][entry["file"]]["sha256"]} for entry in entries]
    return parts
