"""Webdataset tars as training data: what makes a row, what is wrong with one, and that it trains like a folder."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from generation.data import check_data, open_source
from mmalign.errors import InputError


def encoded(photos: Path, number: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    with Image.open(sorted(photos.glob("*.jpg"))[number]) as image:
        image.convert("RGB").resize((96, 80)).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_texts_and_json_are_captions_and_shards_are_one_source(tmp_path: Path, photos: Path) -> None:
    jpeg, png, webp = (encoded(photos, n, kind) for n, kind in enumerate(("JPEG", "PNG", "WEBP")))
    about = {"caption": "einen größeren Hund", "reward": 0.5}
    first = [("a/000.jpg", jpeg), ("a/000.txt", b"a caf\xc3\xa9\n"), ("a/000.cls", b"7"),
             ("b/000.json", json.dumps(about).encode()), ("b/000.txt", b"not this"), ("b/000.PNG", png)]  # fmt: skip
    write(tmp_path / "tars" / "one.tar", first)
    write(tmp_path / "tars" / "deep" / "two.tar", [("x.webp", webp), ("x.txt", b"the third")])
    source = open_source(tmp_path / "tars")
    rows = list(source.rows())
    assert [row.caption for row in rows] == ["the third", "a café", "einen größeren Hund"]
    assert [row.images for row in rows] == [(webp,), (jpeg,), (png,)]
    assert [row.name for row in rows] == ["deep/two.tar x", "one.tar a/000", "one.tar b/000"]
    assert rows[2].rewards == (0.5,)
    assert rows[1].rewards is None
    assert [source.row(index) for index in (2, 0, 1)] == [rows[2], rows[0], rows[1]]
    assert list(source.rows(start=2)) == rows[2:]
    assert (len(source), source.kind) == (3, "images")
    before = source.state()
    write(tmp_path / "tars" / "one.tar", first[:3])
    assert open_source(tmp_path / "tars").state() != before


def test_equal_content_has_the_fingerprint_of_a_folder(tmp_path: Path, photos: Path) -> None:
    images = [encoded(photos, n) for n in range(3)]
    tar = write(tmp_path / "t.tar", [m for n, i in enumerate(images)
                                     for m in ((f"{n}.jpg", i), (f"{n}.txt", f"photo {n}".encode()))])  # fmt: skip
    folder = tmp_path / "folder"
    folder.mkdir()
    for n, image in enumerate(images):
        (folder / f"{n}.jpg").write_bytes(image)
    lines = [json.dumps({"file_name": f"{n}.jpg", "caption": f"photo {n}"}) for n in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert check_data(tar).fingerprint == check_data(folder).fingerprint


def test_rows_that_cannot_be_used_are_named(tmp_path: Path, photos: Path) -> None:
    image = encoded(photos, 0)
    members = [
        ("fine.jpg", image), ("fine.txt", b"a photo"),
        ("bare.jpg", image),
        ("twice.jpg", image), ("twice.png", image), ("twice.txt", b"which"),
        ("broken.jpg", image), ("broken.json", b"{"),
        ("nothing.json", b"{}"), ("nothing.jpg", image),
        ("alone.txt", b"no image"),
        ("cut.jpg", image[:200]), ("cut.txt", b"half a photo"),
        ("blank.jpg", image), ("blank.txt", b" \n"),
        ("latin.jpg", encoded(photos, 1)), ("latin.txt", b"caf\xe9"),
    ]  # fmt: skip
    checked = check_data(write(tmp_path / "t.tar", members))
    assert [example.name for example in checked.examples] == ["t.tar fine"]
    found = {problem.name.split()[1]: problem.reason for problem in checked.problems if problem.fatal}
    assert found == {
        "bare": "missing_column", "twice": "ambiguous", "broken": "bad_json", "nothing": "missing_column",
        "alone": "missing", "cut": "truncated", "blank": "empty_caption", "latin": "empty_caption",
    }  # fmt: skip


def test_what_is_no_tar_of_images_is_refused(tmp_path: Path, photos: Path) -> None:
    whole = write(tmp_path / "whole.tar", [("a.jpg", encoded(photos, 0)), ("a.txt", b"a")])
    for name, content in (("cut.tar", whole.read_bytes()[:1500]), ("not.tar", b"something else" * 99)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="is not a whole, uncompressed tar"):
            open_source(tmp_path / name)
    packed = write(tmp_path / "packed.tar", [("a.jpg", b"1")], "w:gz")
    with pytest.raises(InputError, match=r"unpack \.gz"):
        open_source(packed)
    with pytest.raises(InputError, match=r"no image named KEY\.jpg.*found txt"):
        open_source(write(tmp_path / "texts.tar", [("a.txt", b"1")]))
    with pytest.raises(InputError, match="has no splits"):
        open_source(whole, split="train")


def test_headers_that_lie_are_refused_and_files_with_holes_are_left_out(tmp_path: Path, photos: Path) -> None:
    def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
        member = tarfile.TarInfo(name)
        member.size, member.type = size, kind
        return member.tobuf(tarfile.GNU_FORMAT)

    def padded(content: bytes) -> bytes:
        return content + bytes(-len(content) % 512)

    jpeg, end = encoded(photos, 0), bytes(1024)
    for name, size in (("negative", -5), ("huge", 2**45)):
        whole = header("a.txt", 1) + padded(b"x") + header("a.jpg", size) + padded(jpeg) + end
        (tmp_path / f"{name}.tar").write_bytes(whole)
        with pytest.raises(InputError, match="not a whole, uncompressed tar"):
            open_source(tmp_path / f"{name}.tar")
    holes = header("a.jpg", len(jpeg), tarfile.GNUTYPE_SPARSE) + padded(jpeg) + header("a.txt", 1) + padded(b"x")
    good = header("b.jpg", len(jpeg)) + padded(jpeg) + header("b.txt", 1) + padded(b"y")
    (tmp_path / "holes.tar").write_bytes(holes + good + end)
    rows = list(open_source(tmp_path / "holes.tar").rows())
    assert [(row.caption, row.images) for row in rows] == [("x", (None,)), ("y", (jpeg,))]
