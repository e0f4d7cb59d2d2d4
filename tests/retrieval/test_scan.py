"""Walking a folder: what counts, what is reported, and that every file is somebody's."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from drawing import ordinary_user

from mmalign.errors import InputError
from retrieval.scan import FoundFile, ScanSettings, parse_shard, scan


def touch(path: Path | bytes, data: bytes = b"x") -> None:
    Path(os.fsdecode(path)).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def paths(root: Path, **options: object) -> list[bytes]:
    return [file.path for file in scan(root, ScanSettings(**options)).files]  # type: ignore[arg-type]


def test_finds_images_at_any_depth_in_order_of_their_bytes(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/z.PNG", "a/b/c.webp", "Z.jpeg", "note.txt", "noext"):
        touch(tmp_path / name)
    touch(tmp_path / "b.jpg", b"four")
    os.utime(tmp_path / "b.jpg", ns=(1, 1234567891))
    found = scan(tmp_path)
    assert [f.path for f in found.files] == [b"Z.jpeg", b"a/b/c.webp", b"a/z.PNG", b"b.jpg"]
    assert found.files[-1] == FoundFile(b"b.jpg", 4, 1234567891)
    assert not found.problems
    assert paths(tmp_path, all_files=True) == sorted(
        [b"Z.jpeg", b"a/b/c.webp", b"a/z.PNG", b"b.jpg", b"note.txt", b"noext"]
    )


def test_hidden_files_only_on_request(tmp_path: Path) -> None:
    for name in (".thumbs/a.jpg", "._a.jpg", "a.jpg"):
        touch(tmp_path / name)
    assert paths(tmp_path) == [b"a.jpg"]
    assert paths(tmp_path, hidden=True) == [b"._a.jpg", b".thumbs/a.jpg", b"a.jpg"]


def test_an_index_of_ours_is_not_looked_into(tmp_path: Path) -> None:
    for name in ("idx/CURRENT", "idx/manifest-000001.json", "idx/x.jpg", "other/CURRENT", "other/y.jpg"):
        touch(tmp_path / name)
    assert paths(tmp_path) == [b"other/y.jpg"]


@pytest.mark.parametrize(
    "name", [b"new\nline.jpg", b"\xff\xfe.jpg", "\U0001f600\u200d.jpg".encode(), b"a" * 251 + b".jpg"]
)
def test_odd_names(tmp_path: Path, name: bytes) -> None:
    touch(os.fsencode(tmp_path) + b"/" + name)
    assert paths(tmp_path) == [name]


def test_folders_and_fifos_named_like_images(tmp_path: Path) -> None:
    touch(tmp_path / "folder.jpg/inside.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")
    found = scan(tmp_path)
    assert [f.path for f in found.files] == [b"folder.jpg/inside.jpg"]
    assert [(path, reason) for path, reason, _ in found.problems] == [(b"fifo.jpg", "not_a_file")]


def test_links(tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(root / "a.jpg")
    touch(tmp_path / "outside" / "o.jpg")
    (root / "to_file.jpg").symlink_to("a.jpg")
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "out").symlink_to(tmp_path / "outside", target_is_directory=True)
    (root / "out.jpg").symlink_to(tmp_path / "outside", target_is_directory=True)
    (root / "broken.jpg").symlink_to("nowhere")
    (root / "self.jpg").symlink_to("self.jpg")
    found = scan(root)
    assert [f.path for f in found.files] == [b"a.jpg", b"to_file.jpg"]
    assert sorted((path, reason) for path, reason, _ in found.problems) == [
        (b"broken.jpg", "missing"),
        (b"self.jpg", "missing"),
    ]
    assert not found.closed_files
    followed = paths(root, follow_links=True)
    assert followed[:2] == [b"a.jpg", b"out.jpg/o.jpg"] or followed[:2] == [b"a.jpg", b"out/o.jpg"]
    assert len(followed) == 3, "each real folder once, no loop"


def test_unreadable_folder_is_reported_and_the_rest_found(public_path: Path) -> None:
    for name in ("a.jpg", "closed/b.jpg", "listable/c.jpg"):
        touch(public_path / name)
    (public_path / "closed").chmod(0)
    (public_path / "listable").chmod(0o444)  # names can be read, nothing else
    with ordinary_user():
        found = scan(public_path)
    assert [f.path for f in found.files] == [b"a.jpg"]
    assert found.closed_folders == [b"closed"]
    assert found.closed_files == {b"listable/c.jpg"}
    assert sorted((path, reason) for path, reason, _ in found.problems) == [
        (b"closed", "permission"),
        (b"listable/c.jpg", "permission"),
    ]


def test_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "sub" / "a.jpg")
    real = os.scandir

    def failing(path: bytes) -> object:
        if path.endswith(b"sub"):
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(os, "scandir", failing)
    found = scan(tmp_path)
    assert found.closed_folders == [b"sub"]
    assert "Input/output error" in found.problems[0][2]


def test_root_must_be_a_readable_folder(tmp_path: Path, public_path: Path) -> None:
    touch(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="does not exist"):
        scan(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a file"):
        scan(tmp_path / "a.jpg")
    (public_path / "closed").mkdir(mode=0)
    with ordinary_user(), pytest.raises(InputError, match="may not be read"):
        scan(public_path / "closed")


def test_shards_share_out_every_file_once(tmp_path: Path) -> None:
    for number in range(200):
        touch(tmp_path / f"{number}.jpg")
    parts = [paths(tmp_path, shard=(part, 3)) for part in range(3)]
    assert sorted(path for part in parts for path in part) == paths(tmp_path)
    assert sum(map(len, parts)) == 200
    assert min(map(len, parts)) > 40
    touch(tmp_path / "another.jpg")
    again = [paths(tmp_path, shard=(part, 3)) for part in range(3)]
    assert all(set(old) <= set(new) for old, new in zip(parts, again, strict=True)), "files stay with their part"


def test_parse_shard() -> None:
    assert parse_shard("0/4") == (0, 4)
    assert parse_shard("3/4") == (3, 4)
    for text in ("4/4", "0/0", "1", "a/b", "-1/2", "1/2/3", ""):
        with pytest.raises(InputError, match="I/N"):
            parse_shard(text)
