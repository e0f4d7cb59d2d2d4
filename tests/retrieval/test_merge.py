"""Shards on many machines end in one index."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mmalign import Encoder
from mmalign.errors import EncoderMismatchError, InputError
from retrieval import ImageIndex, merge_indexes


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("merge") / "pics"
    target.mkdir()
    for path in sorted(photos.glob("*.jpg"))[:13]:
        shutil.copy(path, target)
    shutil.copy(target / "000000012280.jpg", target / "zz-copy.jpg")
    (target / "bad.jpg").write_text("no picture")
    lines = ["file_name,number", *(f"{path.name},{n}" for n, path in enumerate(sorted(target.glob("*.jpg"))))]
    (target / "metadata.csv").write_text("\n".join(lines))
    return target


@pytest.fixture(scope="module")
def parts(folder: Path, bundled: Encoder) -> list[Path]:
    made = []
    for number in range(3):
        index, _ = ImageIndex.build(folder, folder.parent / f"part-{number}", encoder=bundled, shard=(number, 3))
        made.append(index.store.folder)
    return made


def test_merged_shards_equal_one_build(folder: Path, parts: list[Path], bundled: Encoder, tmp_path: Path) -> None:
    assert all(len(ImageIndex.open(part)) < 14 for part in parts)
    whole, _ = ImageIndex.build(folder, tmp_path / "whole", encoder=bundled)
    merged = merge_indexes(tmp_path / "merged", parts)
    assert sorted(item.path for item in merged) == sorted(item.path for item in whole)
    assert merged.verify() == []
    assert merged.snapshot.alive_count == 13, "the copy shares its vector although another shard held it"
    assert [entry["reason"] for entry in merged.skipped()] == ["not_an_image"]
    reopened = ImageIndex.open(merged.store.folder, encoder=bundled)
    for query in ("a plane", "food"):
        one, other = whole.search(query, 14), reopened.search(query, 14)
        assert [hit.score for hit in one] == pytest.approx([hit.score for hit in other], abs=1e-5)
        assert {hit.item.name: hit.metadata for hit in one} == {hit.item.name: hit.metadata for hit in other}
    assert reopened.update().unchanged == 14


def test_merging_the_same_index_twice_takes_each_file_once(parts: list[Path], tmp_path: Path) -> None:
    merged = merge_indexes(tmp_path / "merged", [*parts, parts[0]])
    assert len(merged) == 14


def test_parts_of_other_encoders_are_refused(parts: list[Path], tmp_path: Path) -> None:
    rows = np.eye(384, dtype=np.float32)[:9]
    other = ImageIndex.from_vectors(tmp_path / "other", rows)
    with pytest.raises(EncoderMismatchError, match="bundled"):
        merge_indexes(tmp_path / "merged", [parts[0], other.store.folder])
    assert not (tmp_path / "merged").exists()


def test_an_existing_index_is_not_overwritten(parts: list[Path]) -> None:
    with pytest.raises(InputError, match="holds an index"):
        merge_indexes(parts[0], parts[1:])
