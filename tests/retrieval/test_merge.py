"""Shards on many machines end in one index."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mmalign import Encoder
from mmalign.errors import EncoderMismatchError, InputError
from retrieval import ImageIndex, merge_indexes
from retrieval.storage import Store


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
        made.append(index.folder)
    return made


def test_merged_shards_equal_one_build(folder: Path, parts: list[Path], bundled: Encoder, tmp_path: Path) -> None:
    assert all(len(ImageIndex.open(part)) < 14 for part in parts)
    whole, _ = ImageIndex.build(folder, tmp_path / "whole", encoder=bundled)
    merged = merge_indexes(parts, tmp_path / "merged")
    assert sorted(item.path for item in merged) == sorted(item.path for item in whole)
    assert merged.verify() == []
    assert merged.snapshot.alive_count == 13, "the copy shares its vector although another shard held it"
    assert [entry["reason"] for entry in merged.skipped()] == ["not_an_image"]
    reopened = ImageIndex.open(merged.folder, encoder=bundled)
    for query in ("a plane", "food"):
        one, other = whole.search(query, 14), reopened.search(query, 14)
        assert [hit.score for hit in one] == pytest.approx([hit.score for hit in other], abs=1e-5)
        assert {hit.item.name: hit.metadata for hit in one} == {hit.item.name: hit.metadata for hit in other}
    assert reopened.update().unchanged == 14


def test_merging_the_same_index_twice_takes_each_file_once(parts: list[Path], tmp_path: Path) -> None:
    merged = merge_indexes([*parts, parts[0]], tmp_path / "merged")
    assert len(merged) == 14


def test_parts_of_other_encoders_are_refused(parts: list[Path], tmp_path: Path) -> None:
    rows = np.eye(384, dtype=np.float32)[:9]
    other = ImageIndex.from_vectors(rows, tmp_path / "other")
    with pytest.raises(EncoderMismatchError, match="bundled"):
        merge_indexes([parts[0], other.folder], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_existing_index_is_not_overwritten(parts: list[Path]) -> None:
    with pytest.raises(InputError, match="holds an index"):
        merge_indexes(parts[1:], parts[0])


def test_an_index_that_appears_meanwhile_is_not_overwritten(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes an index between the first look and the lock."""
    rows = np.eye(8, dtype=np.float32)
    real = Store.write

    def late(store: Store) -> object:
        monkeypatch.undo()
        ImageIndex.from_vectors(rows, store.folder)
        return real(store)

    for use in (
        lambda out: merge_indexes(parts, out),
        lambda out: ImageIndex.from_vectors(rows[:3], out),
        lambda out: ImageIndex.build(parts[0].parent / "pics", out, encoder="bundled"),
    ):
        monkeypatch.setattr(Store, "write", late)
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(InputError, match="holds an index"):
            use(out)
        assert len(ImageIndex.open(out)) == 8
