"""From folder to index and on: only what changed is read and encoded, nothing is lost, ids stay."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawing import clustered, content, draw, names, ordinary_user, same_content
from PIL import Image
from tiny_encoder import DIM, TinyEncoder, expected_vector

import retrieval.update
from mmalign.errors import EncoderMismatchError, InputError, MMAlignError, UnreadableImageError
from mmalign.imaging import read_file
from retrieval import ImageIndex, UpdateReport
from retrieval.scan import ScanSettings, scan

PHOTOS = Path(__file__).parents[1] / "data" / "photos"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Base names of the files that are opened to be indexed, as they are."""
    log: list[str] = []

    def spy(path: str) -> Any:
        log.append(os.fspath(path).rpartition("/")[2])
        return read_file(path)

    monkeypatch.setattr(retrieval.update, "read_file", spy)
    return log


def counts(report: UpdateReport) -> dict[str, int]:
    """The numbers of a report that are not zero."""
    wanted = ("added", "changed", "moved", "aliases", "removed", "withheld_removals", "unchanged")
    return {name: getattr(report, name) for name in wanted if getattr(report, name)} | (
        {"skipped": len(report.skipped)} if report.skipped else {}
    )


def ids(index: ImageIndex) -> dict[str, int]:
    return {item.name: item.id for item in index}


def rebuilt(index: ImageIndex, tmp_path: Path) -> ImageIndex:
    """An index of the same folders made from nothing, with an encoder of its own."""
    fresh, _ = ImageIndex.build(index.roots[0], tmp_path / "fresh", encoder=TinyEncoder())
    for root in index.roots[1:]:
        fresh.update(root)
    return fresh


# -- building ----------------------------------------------------------------------------------------------------------


def test_build(folder: Path, encoder: TinyEncoder) -> None:
    index, report = ImageIndex.build(folder, encoder=encoder)
    assert counts(report) == {"added": 12}
    assert encoder.encoded == 12
    assert sorted(ids(index)) == [f"{n:02}.png" for n in range(8)] + [f"sub/{n:02}.png" for n in range(8, 12)]
    for item in index:
        assert item.path == folder / item.name
        assert (item.size, item.mtime_ns) == (item.path.stat().st_size, item.path.stat().st_mtime_ns)
        assert item.sha256 == read_file(item.path).sha256
        assert (item.width, item.height, item.format) == (8, 8, "PNG")
        vector = index.vectors.gather(np.array([item.row]))[0]
        np.testing.assert_allclose(vector, expected_vector(item.path), atol=1e-5)
    assert index.verify() == []


def test_real_photographs(tmp_path: Path, encoder: TinyEncoder) -> None:
    for photo in sorted(PHOTOS.glob("*.jpg"))[:10]:
        shutil.copy(photo, tmp_path)
    index, report = ImageIndex.build(tmp_path, encoder=encoder)
    assert report.added == 10
    for item in index:
        with Image.open(item.path) as image:
            assert (item.width, item.height) == image.size
        assert index.search(item.path, k=1)[0].item.id == item.id


def test_second_run_does_nothing_and_opens_nothing(folder: Path, encoder: TinyEncoder, opened: list[str]) -> None:
    index, _ = ImageIndex.build(folder, encoder=encoder)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in index.folder.iterdir())
    opened.clear()
    encoder.encoded = 0
    again, report = ImageIndex.build(folder, encoder=encoder)
    assert counts(report) == {"unchanged": 12}
    assert not opened
    assert not encoder.encoded
    after = {(path.name, path.stat().st_mtime_ns) for path in index.folder.iterdir()}
    assert after <= set(before), "only an old generation may be cleared"
    assert again.manifest["generation"] == index.manifest["generation"]


def test_nothing_is_written_either_when_there_are_bad_files(folder: Path, encoder: TinyEncoder, tmp_path: Path) -> None:
    (folder / "bad.jpg").write_bytes(b"no image")
    (folder / "broken.jpg").symlink_to("nowhere")
    (folder / "denied.jpg").write_bytes(b"")
    index, _ = ImageIndex.build(folder, encoder=encoder)
    other = draw(tmp_path / "other" / "x.png", 77).parent
    (other / "bad.jpg").write_bytes(b"no image")
    index.update(other)
    generation = index.manifest["generation"]
    index.update()
    assert index.manifest["generation"] == generation


def test_build_in_a_folder_without_images_leaves_nothing(tmp_path: Path, encoder: TinyEncoder) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="no file with an image suffix"):
        ImageIndex.build(tmp_path, encoder=encoder)
    with pytest.raises(InputError, match="does not exist"):
        ImageIndex.build(tmp_path / "nowhere", encoder=encoder)
    with pytest.raises(InputError, match="is a file"):
        ImageIndex.build(tmp_path / "notes.txt", encoder=encoder)
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"none of the 1 image files.*a\.jpg"):
        ImageIndex.build(tmp_path, encoder=encoder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "notes.txt"]


# -- changes of files --------------------------------------------------------------------------------------------------


def test_added(index: ImageIndex, folder: Path, encoder: TinyEncoder, opened: list[str], tmp_path: Path) -> None:
    draw(folder / "new.png", 100)
    assert counts(index.update()) == {"added": 1, "unchanged": 12}
    assert opened == ["new.png"]
    assert encoder.encoded == 1
    assert ids(index)["new.png"] == 12
    same_content(index, rebuilt(index, tmp_path))


def test_changed_keeps_its_id(index: ImageIndex, folder: Path, encoder: TinyEncoder, tmp_path: Path) -> None:
    before = ids(index)
    draw(folder / "03.png", 100)
    assert counts(index.update()) == {"changed": 1, "unchanged": 11}
    assert encoder.encoded == 1
    assert ids(index) == before
    same_content(index, rebuilt(index, tmp_path))


def test_changed_in_the_same_second_with_the_same_size(index: ImageIndex, folder: Path) -> None:
    path = folder / "03.png"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert counts(index.update()) == {"removed": 1, "unchanged": 11, "skipped": 1}, "a nanosecond is enough"


def test_touched_is_read_but_not_encoded(
    index: ImageIndex, folder: Path, encoder: TinyEncoder, opened: list[str]
) -> None:
    os.utime(folder / "03.png", ns=(5, 5))
    assert counts(index.update()) == {"unchanged": 12}
    assert opened == ["03.png"]
    assert not encoder.encoded
    opened.clear()
    index.update()
    assert not opened, "the new time is recorded"


def test_moved_keeps_id_and_vector(index: ImageIndex, folder: Path, encoder: TinyEncoder, tmp_path: Path) -> None:
    before, rows = ids(index), {item.name: item.row for item in index}
    (folder / "03.png").rename(folder / "sub" / "elsewhere.png")
    assert counts(index.update()) == {"moved": 1, "unchanged": 11}
    assert not encoder.encoded
    assert ids(index)["sub/elsewhere.png"] == before["03.png"]
    assert {item.name: item.row for item in index}["sub/elsewhere.png"] == rows["03.png"]
    assert "03.png" not in ids(index)
    same_content(index, rebuilt(index, tmp_path))


def test_renamed_folder_moves_all_its_files(index: ImageIndex, folder: Path, encoder: TinyEncoder) -> None:
    before = ids(index)
    (folder / "sub").rename(folder / "renamed")
    assert counts(index.update()) == {"moved": 4, "unchanged": 8}
    assert not encoder.encoded
    assert {n: i for n, i in ids(index).items() if "/" in n} == {
        name.replace("sub", "renamed"): number for name, number in before.items() if "/" in name
    }


def test_copied_is_an_alias_with_the_same_row(index: ImageIndex, folder: Path, encoder: TinyEncoder) -> None:
    shutil.copy(folder / "03.png", folder / "copy.png")
    assert counts(index.update()) == {"aliases": 1, "unchanged": 12}
    assert not encoder.encoded
    assert len(index.vectors) == 12
    assert len(index) == 13
    items = {item.name: item for item in index}
    assert items["copy.png"].row == items["03.png"].row
    assert (items["copy.png"].width, items["copy.png"].format) == (8, "PNG")
    hit = index.search(folder / "copy.png", k=1)[0]
    assert hit.item.name == "03.png"
    assert hit.aliases == (folder / "copy.png",)


def test_an_alias_outlives_its_original(index: ImageIndex, folder: Path) -> None:
    shutil.copy(folder / "03.png", folder / "copy.png")
    index.update()
    (folder / "03.png").unlink()
    assert counts(index.update()) == {"removed": 1, "unchanged": 12}
    assert names(index.search(folder / "copy.png", k=1)) == ["copy.png"]


def test_two_equal_new_files_in_one_batch(index: ImageIndex, folder: Path) -> None:
    draw(folder / "x.png", 50)
    draw(folder / "y.png", 50)
    assert counts(index.update()) == {"added": 1, "aliases": 1, "unchanged": 12}
    assert len(index.vectors) == 13
    items = {item.name: item for item in index}
    assert items["x.png"].row == items["y.png"].row == 12
    assert index.verify() == []


def test_removed(index: ImageIndex, folder: Path, tmp_path: Path) -> None:
    (folder / "03.png").unlink()
    assert counts(index.update()) == {"removed": 1, "unchanged": 11}
    assert "03.png" not in ids(index)
    assert len(index.search("anything", k=50)) == 11
    same_content(index, rebuilt(index, tmp_path))


def test_swapped_contents_take_their_properties_along(folder: Path, encoder: TinyEncoder, tmp_path: Path) -> None:
    draw(folder / "wide.png", 60, (32, 8))
    draw(folder / "tall.png", 61, (8, 24))
    index, _ = ImageIndex.build(folder, encoder=encoder)
    encoder.encoded = 0
    (folder / "wide.png").rename(folder / "spare")
    (folder / "tall.png").rename(folder / "wide.png")
    (folder / "spare").rename(folder / "tall.png")
    assert counts(index.update()) == {"changed": 2, "unchanged": 12}
    assert not encoder.encoded
    sizes = {item.name: (item.width, item.height) for item in index}
    assert (sizes["wide.png"], sizes["tall.png"]) == ((8, 24), (32, 8))
    same_content(index, rebuilt(index, tmp_path))


def test_replaced_while_the_old_content_moves_on(index: ImageIndex, folder: Path, encoder: TinyEncoder) -> None:
    draw(folder / "big.png", 62, (40, 40))
    index.update()
    encoder.encoded = 0
    (folder / "big.png").rename(folder / "zz.png")
    draw(folder / "big.png", 63)
    index.update()
    assert encoder.encoded == 1
    assert {item.name: item.width for item in index if item.name in ("zz.png", "big.png")} == {
        "zz.png": 40,
        "big.png": 8,
    }


# -- files that are not to be had --------------------------------------------------------------------------------------


def test_unreadable_subfolder_keeps_its_items(public_path: Path, encoder: TinyEncoder) -> None:
    for number in range(6):
        draw(public_path / "photos" / ("sub" if number % 2 else "listable") / f"{number}.png", number)
    index, _ = ImageIndex.build(public_path / "photos", public_path / "idx", encoder=encoder)
    (public_path / "photos" / "sub").chmod(0)
    (public_path / "photos" / "listable").chmod(0o444)
    if os.geteuid() == 0:
        for path in (public_path / "idx", *(public_path / "idx").iterdir()):
            os.chown(path, 65534, 65534)
    draw(public_path / "photos" / "new.png", 10)
    with ordinary_user():
        report = index.update()
    assert counts(report) == {"added": 1, "skipped": 4}
    assert len(index) == 7
    (public_path / "photos" / "sub").chmod(0o755)
    (public_path / "photos" / "listable").chmod(0o755)
    assert counts(index.update()) == {"unchanged": 7}
    assert index.skipped() == []


def test_failing_subfolder_keeps_its_items(index: ImageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def failing(path: bytes) -> object:
        if path.endswith(b"/sub"):
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(os, "scandir", failing)
    assert counts(index.update()) == {"unchanged": 8, "skipped": 1}
    assert len(index) == 12


@pytest.mark.parametrize("how", ["absent", "empty"])
def test_missing_disk_is_refused_and_changes_nothing(
    folder: Path, encoder: TinyEncoder, tmp_path: Path, how: str
) -> None:
    index, _ = ImageIndex.build(folder, tmp_path / "idx", encoder=encoder)
    shutil.rmtree(folder)
    if how == "empty":
        folder.mkdir()
    before = (tmp_path / "idx" / "CURRENT").read_text()
    with pytest.raises(InputError, match="mounted"):
        index.update()
    assert (tmp_path / "idx" / "CURRENT").read_text() == before
    assert len(ImageIndex.open(tmp_path / "idx")) == 12


def test_most_files_gone_are_kept_unless_allowed(tmp_path: Path, encoder: TinyEncoder) -> None:
    root = tmp_path / "photos"
    for number in range(24):
        draw(root / f"{number:02}.png", number)
    index, _ = ImageIndex.build(root, encoder=encoder)
    for number in range(13):
        (root / f"{number:02}.png").unlink()
    for number in range(100, 120):  # another disk may be mounted in its place: new files excuse nothing
        draw(root / f"{number}.png", number)
    assert counts(index.update()) == {"added": 20, "unchanged": 11, "withheld_removals": 13}
    assert len(index) == 44
    assert counts(index.update(allow_removals=True)) == {"removed": 13, "unchanged": 31}
    assert len(index) == 31


def test_half_of_the_files_may_go(tmp_path: Path, encoder: TinyEncoder) -> None:
    root = tmp_path / "photos"
    for number in range(24):
        draw(root / f"{number:02}.png", number)
    index, _ = ImageIndex.build(root, encoder=encoder)
    for number in range(12):
        (root / f"{number:02}.png").unlink()
    assert counts(index.update()) == {"removed": 12, "unchanged": 12}


def test_bad_image_is_listed_and_not_tried_again_until_it_changes(
    index: ImageIndex, folder: Path, opened: list[str]
) -> None:
    (folder / "bad.jpg").write_bytes(b"not an image at all")
    report = index.update()
    assert counts(report) == {"unchanged": 12, "skipped": 1}
    (entry,) = index.skipped()
    assert (entry["path"], entry["reason"]) == ("bad.jpg", "not_an_image")
    assert "bad.jpg" in entry["message"]
    opened.clear()
    assert counts(index.update()) == {"unchanged": 12, "skipped": 1}, "still reported"
    assert not opened
    draw(folder / "bad.jpg", 70)
    assert counts(index.update()) == {"added": 1, "unchanged": 12}
    assert index.skipped() == []


def test_good_file_that_becomes_bad_is_dropped(index: ImageIndex, folder: Path) -> None:
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:60])
    assert counts(index.update()) == {"removed": 1, "unchanged": 11, "skipped": 1}
    assert "03.png" not in ids(index)
    assert [entry["path"] for entry in index.skipped()] == ["03.png"]


def test_good_file_that_becomes_an_undecodable_kind_is_dropped(index: ImageIndex, folder: Path) -> None:
    (folder / "03.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    index.update()
    assert [entry["path"] for entry in index.skipped()] == ["03.png"]
    assert "03.png" not in ids(index)


def test_refused_files_are_tried_again_with_other_settings(folder: Path, encoder: TinyEncoder) -> None:
    draw(folder / "large.png", 80, (64, 64))
    Image.open(folder / "00.png").save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-20])
    index, report = ImageIndex.build(folder, encoder=encoder, max_pixels=1000)
    assert {entry["path"]: entry["reason"] for entry in report.skipped} == {
        "large.png": "too_large",
        "cut.jpg": "truncated",
    }
    assert counts(index.update(max_pixels=10_000)) == {"added": 1, "unchanged": 12, "skipped": 1}
    assert counts(index.update(max_pixels=None, tolerate_truncation=True)) == {"added": 1, "unchanged": 13}
    assert {item.name: item.flags for item in index}["cut.jpg"] == ("truncated",)


def test_settings_stay_even_if_no_file_changed(index: ImageIndex) -> None:
    index.update(fast_decode=True)
    assert index.info()["decode"]["fast_decode"] is True
    index.update()
    assert ImageIndex.open(index.folder).info()["decode"]["fast_decode"] is True


def test_file_that_vanishes_between_scan_and_read(
    index: ImageIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(folder / "fleeting.png", 90)
    os.utime(folder / "03.png", ns=(5, 5))

    def vanish(path: str) -> Any:
        Path(path).unlink(missing_ok=True)
        return read_file(path)

    monkeypatch.setattr(retrieval.update, "read_file", vanish)
    report = index.update()
    assert sorted(entry["reason"] for entry in report.skipped) == ["missing", "missing"]
    monkeypatch.undo()
    assert counts(index.update()) == {"removed": 1, "unchanged": 11}
    assert index.skipped() == []


def test_vectors_that_are_not_finite_are_not_taken(index: ImageIndex, folder: Path, encoder: TinyEncoder) -> None:
    real = encoder.image_features
    encoder.image_features = lambda pixels: real(pixels) * np.nan  # type: ignore[method-assign]
    draw(folder / "new.png", 95)
    report = index.update()
    assert [(entry["path"], entry["reason"]) for entry in report.skipped] == [("new.png", "no_vector")]
    assert index.verify() == []
    encoder.image_features = real  # type: ignore[method-assign]
    assert counts(index.update()) == {"added": 1, "unchanged": 12}


ODD_NAMES = [
    b"new\nline.png",
    b"not utf-8 \xff\xfe.png",
    "\U0001f468\u200d\U0001f469.png".encode(),
    b"quote'\".png",
    b"\\udcff.png",
]


def test_odd_names(tmp_path: Path, encoder: TinyEncoder) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for number, name in enumerate(ODD_NAMES):
        draw(os.fsencode(root) + b"/" + name, number)
    (Path(os.fsdecode(os.fsencode(root) + b"/bad \xff\n.png"))).write_bytes(b"no image")
    index, report = ImageIndex.build(root, encoder=encoder)
    assert counts(report) == {"added": 5, "skipped": 1}
    assert report.skipped == index.skipped()
    json.dumps(report.skipped).encode()
    assert "\n" not in report.skipped[0]["message"]
    assert sorted(os.fsencode(item.path.name) for item in index) == sorted(ODD_NAMES)
    for item in index:
        item.name.encode()
        assert "\n" not in item.name
        hit = index.search(item.path, k=1)[0]
        assert hit.item.id == item.id
        json.dumps(hit.to_dict()).encode()
        assert [found.item.id for found in index.similar(item.path, k=3)][:1] != [item.id]
    assert counts(index.update()) == {"unchanged": 5, "skipped": 1}


def test_symlink_loop(index: ImageIndex, folder: Path) -> None:
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    assert counts(index.update(follow_links=True)) == {"unchanged": 12}


# -- several folders, shards, single files, vectors --------------------------------------------------------------------


def test_two_roots(index: ImageIndex, folder: Path, tmp_path: Path, encoder: TinyEncoder) -> None:
    second = tmp_path / "second"
    draw(second / "00.png", 200)  # the same name as in the first
    shutil.copy(folder / "05.png", second / "same.png")
    assert counts(index.update(second)) == {"added": 1, "aliases": 1}
    assert index.roots == [folder, second]
    assert encoder.encoded == 1
    draw(second / "01.png", 201)
    draw(folder / "99.png", 299)
    assert counts(index.update()) == {"added": 2, "unchanged": 14}
    assert {os.fspath(item.path) for item in index} == {
        os.fspath(path) for root in (folder, second) for path in root.rglob("*.png")
    }
    (second / "00.png").unlink()
    assert counts(index.update(folder)) == {"unchanged": 13}, "another root is not looked at"
    assert counts(index.update(second)) == {"removed": 1, "unchanged": 2}
    same_content(index, rebuilt(index, tmp_path))


def test_overlapping_roots_are_refused(index: ImageIndex, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    for other in (folder / "sub", tmp_path):
        with pytest.raises(InputError, match="overlap"):
            index.update(other)
    assert counts(index.update(tmp_path / "link")) == {"unchanged": 12}, "the same folder by another name"


def test_a_second_writer_may_have_added_a_folder(index: ImageIndex, tmp_path: Path, encoder: TinyEncoder) -> None:
    draw(tmp_path / "second" / "a.png", 300)
    draw(tmp_path / "third" / "b.png", 301)
    ImageIndex.open(index.folder, encoder=encoder).update(tmp_path / "second")
    index.update(tmp_path / "third")
    assert [root.name for root in index.roots] == ["photos", "second", "third"]
    assert {item.path.parent.name for item in index} == {"photos", "sub", "second", "third"}


def test_index_and_folder_move_together(tmp_path: Path, encoder: TinyEncoder) -> None:
    draw(tmp_path / "old" / "photos" / "a.png", 1)
    ImageIndex.build(tmp_path / "old" / "photos", encoder=encoder)
    (tmp_path / "old").rename(tmp_path / "new")
    index = ImageIndex.open(tmp_path / "new" / "photos", encoder=encoder)
    assert [item.path for item in index] == [tmp_path / "new" / "photos" / "a.png"]
    assert counts(index.update()) == {"unchanged": 1}


def test_shards_cover_each_file_once(folder: Path, tmp_path: Path) -> None:
    found = []
    for part in range(3):
        index, _ = ImageIndex.build(folder, tmp_path / f"part{part}", encoder=TinyEncoder(), shard=(part, 3))
        found += list(ids(index))
    assert sorted(found) == [f"{n:02}.png" for n in range(8)] + [f"sub/{n:02}.png" for n in range(8, 12)]


def test_shard_without_files(folder: Path, tmp_path: Path) -> None:
    empty = next(part for part in range(40) if not scan(folder, ScanSettings(shard=(part, 40))).files)
    index, report = ImageIndex.build(folder, tmp_path / "idx", encoder=TinyEncoder(), shard=(empty, 40))
    assert counts(report) == {}
    assert len(index) == 0
    assert index.search("anything") == []


def test_add_single_files(index: ImageIndex, folder: Path, tmp_path: Path, encoder: TinyEncoder) -> None:
    outside = draw(tmp_path / "outside" / "o.png", 400)
    inside = draw(folder / "inside.png", 401)
    numbers = index.add([outside, folder / "03.png", inside, outside])
    known = {item.path: item.id for item in index}
    assert numbers == [known[outside], known[folder / "03.png"], known[inside], known[outside]]
    assert encoder.encoded == 2
    assert counts(index.update()) == {"unchanged": 13}, "what lies in the folder is known, the other is left alone"
    assert len(index) == 14
    assert names(index.search(outside, k=1)) == [os.fspath(outside)]


def test_add_enters_nothing_if_one_file_is_bad(index: ImageIndex, folder: Path, tmp_path: Path) -> None:
    good = draw(tmp_path / "o.png", 400)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"x")
    generation = index.manifest["generation"]
    with pytest.raises(UnreadableImageError, match=r"bad\.png"):
        index.add([good, bad])
    assert ImageIndex.open(folder).manifest["generation"] == generation
    assert len(ImageIndex.open(folder)) == 12


def test_add_vectors(index: ImageIndex, encoder: TinyEncoder) -> None:
    rows = 3 * clustered(3, DIM, seed=5)
    numbers = index.add_vectors(
        rows, paths=["x", "y", "z"], metadata=pa.table({"id": ["i", "j", "k"], "city": [1, 2, 3]})
    )
    assert numbers == [12, 13, 14]
    hits = index.search(rows[1], k=1)
    assert (hits[0].item.id, hits[0].score) == (13, pytest.approx(1, abs=1e-6))
    assert hits[0].metadata == {"metadata_id": "j", "city": 2}
    assert index.update().unchanged == 12
    assert len(index) == 15
    index.add_vectors(rows, metadata=pa.table({"city": ["Rome", "Oslo", None]}))
    assert index.search(rows[1], k=1, where="city = 'Oslo'")[0].item.id == 16, "columns of another type become text"
    assert index.search(rows[1], k=1, where="city = '2'")[0].item.id == 13


def test_bad_vectors_are_named(index: ImageIndex, tmp_path: Path) -> None:
    rows = np.tile(clustered(1, DIM), (70_000, 1))
    rows[[3, 66_000]] = np.nan
    rows[5] = 0
    with pytest.raises(InputError, match=r"rows 3, 5\)"):
        index.add_vectors(rows)
    rows[[3, 5]] = rows[0]
    rows[66_001, 2] = np.inf
    with pytest.raises(InputError, match=r"rows 66000, 66001\)"):
        ImageIndex.from_vectors(rows, tmp_path / "idx")
    assert not (tmp_path / "idx").exists()
    with pytest.raises(InputError, match="8 columns, the index has 16"):
        index.add_vectors(clustered(2, 8))
    with pytest.raises(InputError, match="2 paths for 3 vectors"):
        index.add_vectors(clustered(3, DIM), paths=["a", "b"])
    assert len(index) == 12


def test_remove_by_id(index: ImageIndex, folder: Path) -> None:
    gone = ids(index)["03.png"]
    index.remove([gone])
    assert gone not in ids(index).values()
    assert len(index.search("anything", k=50)) == 11
    with pytest.raises(InputError, match=f"no items with ids \\[{gone}\\]"):
        index.remove([gone, 1])
    assert len(index) == 11
    assert counts(index.update()) == {"added": 1, "unchanged": 11}
    assert ids(index)["03.png"] == 12, "an id is never used twice"


def test_remove_all(index: ImageIndex) -> None:
    index.remove(range(12))
    assert len(index) == 0
    assert index.search("anything") == []
    assert index.verify() == []
    assert index.update().added == 12
    assert len(index.search("anything")) == 10


# -- encoders ----------------------------------------------------------------------------------------------------------


def test_another_encoder_is_refused_by_name(index: ImageIndex, folder: Path) -> None:
    for use in (
        lambda: ImageIndex.build(folder, encoder=TinyEncoder(1)),
        lambda: ImageIndex.build(folder, encoder="tiny:1"),
        lambda: ImageIndex.open(folder, encoder=TinyEncoder(1)),
    ):
        with pytest.raises(EncoderMismatchError, match=r"'tiny:0'.*'tiny:1'"):
            use()
    assert ImageIndex.open(folder).encoder.spec == "tiny:0"


def test_encoder_whose_weights_have_changed_is_refused(
    index: ImageIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mmalign.encoders.registry as registry

    monkeypatch.setitem(registry.SOURCES, "tiny", registry.Source(lambda rest: TinyEncoder(7)))
    with pytest.raises(EncoderMismatchError, match="tiny:0"):
        ImageIndex.open(folder).search("words")


# -- interruption ------------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_was_done(folder: Path, encoder: TinyEncoder) -> None:
    for number in range(12, 40):
        draw(folder / f"{number}.png", number)
    calls = 0

    def press() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    encoder.before_batch = press
    with pytest.raises(KeyboardInterrupt):
        ImageIndex.build(folder, encoder=encoder, batch_size=5)
    index = ImageIndex.open(folder)
    assert len(index) == 15
    assert index.verify() == []
    assert len(index.search(folder / "00.png")) == 10
    encoder.before_batch = lambda: None
    encoder.encoded = 0
    _, report = ImageIndex.build(folder, encoder=encoder, batch_size=5)
    assert counts(report) == {"added": 25, "unchanged": 15}
    assert encoder.encoded == 25


def test_ctrl_c_before_anything_was_done_leaves_nothing(folder: Path, encoder: TinyEncoder) -> None:
    def press() -> None:
        raise KeyboardInterrupt

    encoder.before_batch = press
    with pytest.raises(KeyboardInterrupt):
        ImageIndex.build(folder, encoder=encoder)
    assert not (folder / ".mmalign").exists()


def test_bad_file_of_an_interrupted_update_is_dropped_by_the_next(
    index: ImageIndex, folder: Path, encoder: TinyEncoder
) -> None:
    (folder / "00.png").write_bytes(b"no image any more")
    for number in range(20, 30):
        draw(folder / f"{number}.png", number)

    def press() -> None:
        if encoder.encoded:
            raise KeyboardInterrupt

    encoder.before_batch = press
    with pytest.raises(KeyboardInterrupt):
        index.update(batch_size=4)
    encoder.before_batch = lambda: None
    index.update()
    assert "00.png" not in ids(index)
    assert [entry["path"] for entry in index.skipped()] == ["00.png"]


def test_failing_encoder_loses_at_most_a_checkpoint(folder: Path, encoder: TinyEncoder) -> None:
    def fail() -> None:
        if encoder.encoded == 8:
            raise RuntimeError("out of memory")

    encoder.before_batch = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        ImageIndex.build(folder, encoder=encoder, batch_size=4, checkpoint_seconds=0)
    assert len(ImageIndex.open(folder)) >= 4


def test_wrong_factory_is_found_before_anything_is_encoded(folder: Path, encoder: TinyEncoder) -> None:
    with pytest.raises(InputError, match="IVFx,Nonsense"):
        ImageIndex.build(folder, encoder=encoder, factory="IVFx,Nonsense")
    assert not encoder.encoded
    assert not (folder / ".mmalign").exists()
    with pytest.raises(InputError, match="4096 lists for 12 vectors"):
        ImageIndex.build(folder, encoder=encoder, factory="IVF4096,Flat")
    assert counts(ImageIndex.build(folder, encoder=encoder)[1]) == {"unchanged": 12}, "no image is encoded twice"


# -- growth and compaction ---------------------------------------------------------------------------------------------


def test_new_rows_are_found_before_they_are_in_faiss_and_merged_later(tmp_path: Path) -> None:
    rows = clustered(1100, DIM)
    index = ImageIndex.from_vectors(rows[:1000], tmp_path / "idx", factory="IVF16,Flat")
    first = index.manifest["faiss"]["file"]
    index.add_vectors(rows[1000:1050])
    assert index.manifest["faiss"]["rows"] == 1000
    assert index.manifest["faiss"]["file"] == first
    for row in (3, 1000, 1049):
        scores, found = index.search_vectors(rows[row : row + 1], 5)
        truth = rows[:1050] @ rows[row]
        assert found[0, 0] == row
        np.testing.assert_allclose(scores[0], np.sort(truth)[::-1][:5], atol=1e-6)
    index.add_vectors(rows[1050:1060])  # 60 of 1060 rows
    assert index.manifest["faiss"]["rows"] == 1060
    assert index.manifest["faiss"]["file"] != first
    assert index.snapshot.partition.faiss.ntotal == 1060
    assert index.search_vectors(rows[1055:1056], 1)[1][0, 0] == 1055
    assert index.verify() == []


@pytest.mark.parametrize("factory", ["HNSW16,SQ8", "PQ8x4fs", "IVF8,RaBitQfs", "PCA8,IVF8,PQ8x4fs"])
def test_every_type_of_index_grows(tmp_path: Path, factory: str) -> None:
    rows = clustered(1200, DIM)
    index = ImageIndex.from_vectors(rows[:1000], tmp_path / "idx", factory=factory)
    index.add_vectors(rows[1000:])
    assert index.manifest["faiss"]["rows"] == 1200
    scores, found = index.search_vectors(rows[1000:], 1)
    assert (found[:, 0] == np.arange(1000, 1200)).mean() > 0.9
    exact = np.einsum("nd,nd->n", rows[1000:], rows[found[:, 0]])
    np.testing.assert_allclose(scores[:, 0], exact, atol=1e-6)


def test_compaction_keeps_ids_and_results(tmp_path: Path) -> None:
    rows = clustered(1000, DIM)
    index = ImageIndex.from_vectors(rows, tmp_path / "idx", paths=[f"p{n}" for n in range(1000)])
    queries = clustered(20, DIM, seed=9)
    index.remove(range(190))
    assert len(index.vectors) == 1000, "19 % dead rows stay"
    before = [[(h.item.id, h.item.name, round(h.score, 5)) for h in index.search(q, exact=True)] for q in queries]
    index.remove(range(990, 999))
    assert len(index.vectors) == 1000
    index.remove([989, 988])
    assert len(index.vectors) == 799 == len(index)
    assert index.manifest["faiss"]["rows"] == 799
    kept = {item.id: item for item in index}
    assert set(kept) == {*range(190, 988), 999}
    for number, item in kept.items():
        assert item.name == f"p{number}"
        np.testing.assert_array_equal(index.vectors.gather(np.array([item.row]))[0], rows[number])
    for query, old in zip(queries, before, strict=True):
        new = [(h.item.id, h.item.name, round(h.score, 5)) for h in index.search(query, k=20)]
        assert [hit for hit in old if hit[0] in kept] == new[: len([hit for hit in old if hit[0] in kept])]
    assert index.add_vectors(rows[:1]) == [1000]


def test_compaction_when_all_of_a_segment_is_dead(tmp_path: Path) -> None:
    rows = clustered(150, DIM)
    index = ImageIndex.from_vectors(rows[:100], tmp_path / "idx")
    index.add_vectors(rows[100:])
    index.remove(range(100))
    assert [item.id for item in index] == list(range(100, 150))
    np.testing.assert_array_equal(index.vectors.gather(np.arange(50)), rows[100:])


def test_many_small_updates_do_not_pile_up_segments(tmp_path: Path) -> None:
    rows = clustered(400, DIM)
    index = ImageIndex.from_vectors(rows[:300], tmp_path / "idx")
    for start in range(300, 400, 5):
        index.add_vectors(rows[start : start + 5])
    assert len(index.manifest["segments"]) <= 9
    np.testing.assert_array_equal(index.vectors.gather(np.arange(400)), rows)
    assert len(list((tmp_path / "idx").iterdir())) < 30, "old generations are cleared"


def test_index_that_shrinks_below_its_lists_can_still_be_changed(tmp_path: Path) -> None:
    rows = clustered(500, DIM)
    index = ImageIndex.from_vectors(rows, tmp_path / "idx", factory="IVF64,Flat")
    index.remove(range(480))
    assert len(index.search(rows[490], k=50)) == 20
    index.add_vectors(rows)
    assert index.manifest["faiss"]["factory"] == "IVF64,Flat", "back to what was asked for"


# -- metadata ----------------------------------------------------------------------------------------------------------


def rows_of(index: ImageIndex) -> dict[str, dict[str, Any]]:
    hits = index.search("x", k=1000)
    return {hit.item.name: hit.metadata for hit in hits if hit.metadata}


ROWS = [
    {"file_name": "00.png", "city": "Rome", "year": 1999},
    {"file_name": "./01.png", "city": "Oslo", "year": 2001},
    {"file_name": "08.png", "city": "Kiel", "year": 2008},  # by its bare name; it is in `sub`
    {"file_name": "nowhere.png", "city": "-", "year": 0},
]
EXPECTED = {"00.png": ("Rome", 1999), "01.png": ("Oslo", 2001), "sub/08.png": ("Kiel", 2008)}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("automatic", [True, False])
def test_metadata_formats(folder: Path, encoder: TinyEncoder, tmp_path: Path, kind: str, automatic: bool) -> None:
    path = (folder if automatic else tmp_path) / f"metadata.{kind}"
    if kind == "csv":
        lines = [",".join(ROWS[0])] + [",".join(map(str, row.values())) for row in ROWS]
        path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    index, report = ImageIndex.build(folder, encoder=encoder, **({} if automatic else {"metadata": path}))
    assert report.metadata_unmatched == 1
    assert {name: (row["city"], row["year"]) for name, row in rows_of(index).items()} == EXPECTED
    assert names(index.search("x", where="city=Oslo")) == ["01.png"]
    assert names(index.search("x", where="year > 2000 AND city LIKE 'K%'")) == ["sub/08.png"]
    generation = index.manifest["generation"]
    index.update()
    assert index.manifest["generation"] == generation


def test_metadata_follow_their_file_and_their_table(folder: Path, encoder: TinyEncoder, tmp_path: Path) -> None:
    table = tmp_path / "about.csv"
    table.write_text("path,city\n00.png,Rome\nsub/08.png,Kiel\n")
    index, _ = ImageIndex.build(folder, encoder=encoder, metadata=table)
    (folder / "00.png").rename(folder / "sub" / "other.png")
    (folder / "sub").rename(folder / "renamed")
    index.update()
    moved = {
        "renamed/other.png": {"path": "00.png", "city": "Rome"},
        "renamed/08.png": {"path": "sub/08.png", "city": "Kiel"},
    }
    assert rows_of(index) == moved
    table.write_text("path,city\nrenamed/08.png,Bonn\n")
    index.update()
    assert rows_of(index)["renamed/08.png"]["city"] == "Bonn", "the file given once is read again"
    assert rows_of(index)["renamed/other.png"]["city"] == "Rome"
    (folder / "renamed" / "08.png").unlink()
    index.update()
    assert list(rows_of(index)) == ["renamed/other.png"]
    table.unlink()
    index.update()
    assert list(rows_of(index)) == ["renamed/other.png"]


def test_names_that_occur_twice(folder: Path, encoder: TinyEncoder) -> None:
    draw(folder / "sub" / "00.png", 500)
    (folder / "metadata.csv").write_text("file,n\nsub/00.png,1\n00.png,2\n01.png,3\n01.png,4\n09.png,5\n")
    index, report = ImageIndex.build(folder, encoder=encoder)
    found = {name: row["n"] for name, row in rows_of(index).items()}
    assert found == {"sub/00.png": 1, "00.png": 2, "01.png": 4, "sub/09.png": 5}
    assert report.metadata_unmatched == 0
    draw(folder / "other" / "09.png", 501)
    (folder / "metadata.csv").write_text("file,n\n09.png,7\n00.png,8\n")
    index.update()
    assert rows_of(index)["sub/09.png"]["n"] == 5, "a bare name that two files have is nobody's"


def test_metadata_of_two_folders(index: ImageIndex, folder: Path, tmp_path: Path) -> None:
    (folder / "metadata.csv").write_text("file,city\n00.png,Rome\n")
    draw(tmp_path / "second" / "a.png", 600)
    (tmp_path / "second" / "metadata.csv").write_text("file,City,year\na.png,Oslo,2000\n")
    index.update()
    index.update(tmp_path / "second")
    assert {name: row["city"] for name, row in rows_of(index).items()} == {"00.png": "Rome", "a.png": "Oslo"}
    generation = index.manifest["generation"]
    index.update()
    assert {name: row["city"] for name, row in rows_of(index).items()} == {"00.png": "Rome", "a.png": "Oslo"}
    assert index.manifest["generation"] == generation
    given = tmp_path / "given.csv"
    given.write_text("file,city\n00.png,Bonn\n")
    index.update(folder, metadata=given)
    index.update()
    assert {name: row["city"] for name, row in rows_of(index).items()} == {"00.png": "Bonn", "a.png": "Oslo"}


def test_metadata_that_cannot_be_used(folder: Path, encoder: TinyEncoder, tmp_path: Path) -> None:
    bad = {
        "columns.csv": ("a,b\n1,2\n", "no file column"),
        "twice.csv": ("file,City,city\n00.png,1,2\n", "same name"),
        "other.csv": ("file,n\nnowhere.png,1\n", "names an indexed file"),
        "broken.jsonl": ("{", "cannot be read"),
        "kind.xlsx": ("x", "not .csv"),
    }
    for name, (text, message) in bad.items():
        (tmp_path / name).write_text(text)
        encoder.encoded = 0
        with pytest.raises(InputError, match=message):
            ImageIndex.build(folder, tmp_path / "idx", encoder=encoder, metadata=tmp_path / name)
        assert name == "other.csv" or not encoder.encoded, "found out before the work begins"
    with pytest.raises(InputError, match="does not exist"):
        ImageIndex.build(folder, tmp_path / "idx2", encoder=encoder, metadata=tmp_path / "nowhere.csv")
    # A file of that name that was never meant for us does not stop anybody, but is named.
    for name, (text, message) in list(bad.items())[:3]:
        (folder / "metadata.csv").write_text(text)
        _, report = ImageIndex.build(folder, tmp_path / f"idx-{name}", encoder=encoder)
        assert report.added == 12
        (entry,) = report.skipped
        assert entry["reason"] == "metadata"
        assert message in entry["message"]


def test_metadata_in_latin_1(folder: Path, encoder: TinyEncoder) -> None:
    draw(os.fsencode(folder) + b"/caf\xe9.png", 700)
    (folder / "metadata.csv").write_bytes(b"file,city\ncaf\xe9.png,K\xf6ln\n00.png,Bonn\n")
    index, report = ImageIndex.build(folder, encoder=encoder)
    assert report.metadata_unmatched == 0
    assert sorted(rows_of(index)) == ["00.png", "caf\\udce9.png"]
    assert [hit.item.name for hit in index.search("red", where="city=Köln")] == ["caf\\udce9.png"]


def test_every_error_is_ours(index: ImageIndex, folder: Path) -> None:
    for call in (
        lambda: index.update(shard=(5, 3)),
        lambda: index.update(metadata=folder),
        lambda: index.add([folder]),
    ):
        with pytest.raises(MMAlignError):
            call()
    assert len(content(ImageIndex.open(folder))) == 12


# -- settings hold until they are changed ------------------------------------------------------------------------------


def test_what_was_chosen_once_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    draw(folder / "seen.png", 1)
    draw(folder / ".hidden.png", 2)
    (folder / "nameless").write_bytes(draw(folder / "other.png", 3).read_bytes() + b"")
    index, _ = ImageIndex.build(folder, tmp_path / "index", encoder=TinyEncoder(), hidden=True)
    assert len(index) == 3
    assert index.update().removed == 0, "an update looks where the first run looked"
    assert index.update(hidden=False).removed == 1
    assert len(index) == 2


def test_a_shard_stays_a_shard(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for number in range(12):
        draw(folder / f"{number}.png", number)
    index, first = ImageIndex.build(folder, tmp_path / "index", encoder=TinyEncoder(), shard=(0, 3))
    assert 0 < first.added < 12
    again = index.update()
    assert (again.added, again.removed, again.unchanged) == (0, 0, first.added)


def test_an_emptied_folder_can_be_cleared_on_purpose(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    path = draw(folder / "one.png", 1)
    index, _ = ImageIndex.build(folder, tmp_path / "index", encoder=TinyEncoder())
    path.unlink()
    with pytest.raises(InputError, match="allow-removals"):
        index.update()
    assert len(index) == 1
    assert index.update(allow_removals=True).removed == 1
    assert len(index) == 0
    assert index.search("anything") == []
    assert ImageIndex.open(tmp_path / "index").verify() == []


def test_reports_of_several_folders_add_up(tmp_path: Path) -> None:
    for number in range(5):
        draw(tmp_path / ("one" if number < 3 else "two") / f"{number}.png", number)
    index, _ = ImageIndex.build(tmp_path / "one", tmp_path / "index", encoder=TinyEncoder())
    index.update(tmp_path / "two")
    draw(tmp_path / "one" / "new.png", 10)
    draw(tmp_path / "two" / "new.png", 11)
    report = index.update()
    assert (report.added, report.unchanged, report.encoded) == (2, 5, 2)
    assert report.encoded_per_second == report.encoded / report.encoding_seconds
