"""The folder itself: damage is named, one writer writes, readers are never disturbed, a full disk loses nothing."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from drawing import clustered, draw, names, ordinary_user, same_content
from full_disk import Disk, explained
from tiny_encoder import DIM, TinyEncoder

from mmalign.errors import IndexDamagedError, IndexLockedError, InputError, MMAlignError
from retrieval import ImageIndex, diagnose, repair
from retrieval.storage import FORMAT_VERSION, KINDS, Store


def files_of(index: ImageIndex) -> list[str]:
    """Names of the files in force, by kind."""
    return sorted(index.manifest["files"])


@pytest.fixture
def rich(folder: Path, encoder: TinyEncoder) -> ImageIndex:
    """An index with a file of every kind."""
    (folder / "metadata.csv").write_text("file,city\n00.png,Rome\n01.png,Oslo\n")
    (folder / "bad.jpg").write_bytes(b"no image")
    index, _ = ImageIndex.build(folder, encoder=encoder)
    assert {name.split("-")[0] for name in files_of(index)} == {kind for kind, _ in KINDS}
    return index


# -- what is written ---------------------------------------------------------------------------------------------------


def test_nothing_needs_pickle_and_every_format_is_open(rich: ImageIndex) -> None:
    import faiss

    found = {path.name for path in rich.folder.iterdir()}
    for name in found:
        path = rich.folder / name
        if path.suffix == ".npy":
            assert np.load(path, allow_pickle=False).dtype == np.float32
        elif path.suffix == ".arrow":
            with pa.memory_map(str(path)) as source:
                assert pa.ipc.open_file(source).read_all().num_rows
        elif path.suffix == ".index":
            assert faiss.read_index(str(path)).ntotal == 12
        elif path.suffix == ".jsonl":
            assert [json.loads(line)["path"] for line in path.read_text().splitlines()] == ["bad.jpg"]
        elif path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert name in ("CURRENT", "LOCK")
            assert path.stat().st_size < 100


def test_manifest_describes_all(rich: ImageIndex) -> None:
    import hashlib

    manifest = rich.manifest
    assert (rich.folder / "CURRENT").read_text() == f"manifest-{manifest['generation']:06d}.json\n"
    for name, about in manifest["files"].items():
        data = (rich.folder / name).read_bytes()
        assert about == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["format"] == FORMAT_VERSION
    assert manifest["encoder"]["fingerprint"] == TinyEncoder().fingerprint
    assert manifest["encoder"]["preprocessing"]["size"] == [8, 8]
    assert (manifest["rows"], manifest["item_count"]) == (12, 12)
    assert 0.9 < manifest["measured"]["recall@10"] <= 1
    assert set(manifest["libraries"]) >= {"mmalign", "torch", "numpy"}


def test_order_of_writing_survives_a_power_cut(rich: ImageIndex, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content reaches the disk before its name does, and all names before CURRENT."""
    log: list[tuple[str, str]] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        log.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        real_fsync(descriptor)

    def replace(source: Any, target: Any) -> None:
        log.append(("name", Path(target).name))
        real_replace(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    old = set(files_of(rich))
    draw(folder / "new.png", 50)
    rich.update()
    manifest = f"manifest-{rich.manifest['generation']:06d}.json"
    current = len(log) - 1 - log[::-1].index(("name", "CURRENT"))
    own = rich.folder.name
    fresh = set(files_of(rich)) - old
    assert fresh
    for name in [*fresh, manifest]:
        synced, named = log.index(("sync", f".tmp-{name}")), log.index(("name", name))
        assert synced < named < current
        assert ("sync", own) in log[named:current], f"the entry of {name} may be lost though CURRENT names it"
    assert ("sync", ".tmp-CURRENT") in log[:current]
    assert ("sync", own) in log[current:]


# -- damage ------------------------------------------------------------------------------------------------------------

NAMES = [kind for kind, _ in KINDS]


def of_kind(index: ImageIndex, kind: str) -> Path:
    return index.folder / next(name for name in files_of(index) if name.startswith(kind))


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("how", ["truncated", "missing", "longer"])
def test_damage_that_shows_at_once(rich: ImageIndex, folder: Path, kind: str, how: str) -> None:
    victim = of_kind(rich, kind)
    data = victim.read_bytes()
    if how == "missing":
        victim.unlink()
    else:
        victim.write_bytes(data[: len(data) // 2] if how == "truncated" else data + b"x")
    with pytest.raises(IndexDamagedError, match=f"{victim.name}.*mmalign verify"):
        ImageIndex.open(folder)
    (problem,) = diagnose(folder)
    assert problem.file == victim.name
    with pytest.raises(IndexDamagedError):
        rich.update()


@pytest.mark.parametrize("kind", NAMES)
def test_a_flipped_bit_is_found_by_verify(rich: ImageIndex, folder: Path, kind: str) -> None:
    victim = of_kind(rich, kind)
    data = bytearray(victim.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    victim.write_bytes(bytes(data))
    (problem,) = diagnose(folder)
    assert str(problem).startswith(f"{victim.name} was altered")


@pytest.mark.parametrize("kind", ["items", "metadata", "skipped"])
def test_a_flipped_bit_does_not_get_a_good_checksum_by_an_update(rich: ImageIndex, folder: Path, kind: str) -> None:
    victim = of_kind(rich, kind)
    data = bytearray(victim.read_bytes())
    data[-len(data) // 3] ^= 4
    victim.write_bytes(bytes(data))
    draw(folder / "new.png", 60)
    with pytest.raises(IndexDamagedError, match=victim.name):
        rich.update()


def test_nor_by_compaction_or_growth(tmp_path: Path) -> None:
    index = ImageIndex.from_vectors(clustered(100, DIM), tmp_path / "idx")
    good = {kind: of_kind(index, kind).read_bytes() for kind in ("vectors", "faiss")}
    flipped = {kind: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:] for kind, data in good.items()}
    of_kind(index, "vectors").write_bytes(flipped["vectors"])
    with pytest.raises(IndexDamagedError, match="vectors"):
        index.remove(range(50))
    of_kind(index, "vectors").write_bytes(good["vectors"])
    of_kind(index, "faiss").write_bytes(flipped["faiss"])
    with pytest.raises(IndexDamagedError, match="faiss"):
        index.add_vectors(clustered(20, DIM, seed=3))
    assert repair(tmp_path / "idx")
    assert diagnose(tmp_path / "idx") == []
    assert len(index.add_vectors(clustered(20, DIM, seed=3))) == 20


def test_flipped_bits_never_kill_the_process(rich: ImageIndex, folder: Path, tmp_path: Path) -> None:
    """Opening checks sizes, not hashes: what it maps must be refused or read as it is, whatever is in it."""
    work = tmp_path / "work"
    script = """
import os, sys, random
from pathlib import Path
import tiny_encoder
from mmalign.errors import MMAlignError
from retrieval import ImageIndex
folder = Path(sys.argv[1])
random.seed(0)
bad = 0
for path in sorted(folder.glob("*.arrow")) + sorted(folder.glob("*.npy")) + sorted(folder.glob("skipped*")):
    good = path.read_bytes()
    for trial in range(30):
        data = bytearray(good)
        position = random.randrange(len(data)) if trial % 2 else len(data) - 1 - random.randrange(min(600, len(data)))
        data[position] ^= 1 << random.randrange(8)
        path.unlink()
        path.write_bytes(bytes(data))
        print(path.name, position, end=" ", flush=True)
        try:
            index = ImageIndex.open(folder)
            [item.name for item in index]
            index.skipped(); index.verify()
        except (MMAlignError, UnicodeDecodeError):
            print()
        except Exception as error:
            print(repr(error), flush=True); bad += 1
    path.write_bytes(good)
sys.exit(bad)
"""
    shutil.copytree(rich.folder, work)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    done = subprocess.run(
        [sys.executable, "-c", script, str(work)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_repair_rebuilds_what_can_be_derived(rich: ImageIndex, folder: Path) -> None:
    of_kind(rich, "faiss").unlink()
    of_kind(rich, "skipped").write_bytes(b"")
    assert repair(folder)
    assert diagnose(folder) == []
    index = ImageIndex.open(folder)
    assert len(index.search("x")) == 10
    assert len(index.update().skipped) == 1
    of_kind(index, "vectors").unlink()
    with pytest.raises(IndexDamagedError, match="vectors-"):
        repair(folder)


def test_altered_manifest(rich: ImageIndex, folder: Path) -> None:
    path = rich.folder / f"manifest-{rich.manifest['generation']:06d}.json"
    text = path.read_text()
    for wrong in (
        text.replace('"rows": 12', '"rows": 11', 1),
        text.replace('"format": 1', '"format": "one"'),
        text[:-40],
        "[]",
        "{}",
        "null",
        "",
        '{"sha256": "", "manifest": {"format": []}}',
    ):
        path.write_text(wrong)
        with pytest.raises(IndexDamagedError, match=path.name):
            ImageIndex.open(folder)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(IndexDamagedError, match=path.name):
        ImageIndex.open(folder)
    path.unlink()
    with pytest.raises(IndexDamagedError, match="is missing"):
        ImageIndex.open(folder)
    path.mkdir()
    with pytest.raises(IndexDamagedError, match=path.name):
        ImageIndex.open(folder)


def test_newer_format(rich: ImageIndex, folder: Path) -> None:
    path = rich.folder / f"manifest-{rich.manifest['generation']:06d}.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    before = sorted(p.name for p in rich.folder.iterdir())
    for use in (lambda: ImageIndex.open(folder), rich.update, lambda: ImageIndex.build(folder, encoder="tiny:0")):
        with pytest.raises(IndexDamagedError, match=r"format 2.*upgrade"):
            use()
    assert sorted(p.name for p in rich.folder.iterdir()) == before


@pytest.mark.parametrize("text", ["", "nonsense", "manifest-999999.json", "../manifest-000001.json", "\udcff\udcfe"])
def test_garbage_in_current(rich: ImageIndex, folder: Path, text: str) -> None:
    (rich.folder / "CURRENT").write_bytes(os.fsencode(text))
    before = sorted(p.name for p in rich.folder.iterdir())
    for use in (lambda: ImageIndex.open(folder), lambda: ImageIndex.build(folder, encoder="tiny:0"), rich.update):
        with pytest.raises(IndexDamagedError):
            use()
    assert sorted(p.name for p in rich.folder.iterdir()) == before, "nothing is cleared in a folder not understood"


def test_no_index_here(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, message in (
        (tmp_path, "is not an index"),
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "file", "not an index"),
    ):
        with pytest.raises(InputError, match=message):
            ImageIndex.open(path)


# -- other people's files ----------------------------------------------------------------------------------------------

FOREIGN = [
    "items-list.jpg",
    "vectors-notes.txt",
    "IMG-0203-1.jpg",
    "items-000001.arrow",
    "manifest.json",
    "CURRENT.bak",
    "faiss-000001-0.index.bak",
    "my vectors-000001-0.npy",
    "vectors-000001-0.NPY",
    ".tmp-notes",
    "metadata-1-0.arrow",
]


def test_foreign_files_in_an_index_survive(rich: ImageIndex, folder: Path) -> None:
    for name in FOREIGN:
        (rich.folder / name).write_text(name)
    for number in range(4):
        draw(folder / f"new{number}.png", 70 + number)
        rich.update()
    rich.rebuild()
    for name in FOREIGN:
        assert (rich.folder / name).read_text() == name
    assert rich.verify() == []


def test_leftovers_of_ours_are_cleared(rich: ImageIndex) -> None:
    leftovers = [".tmp-vectors-000009-0.npy", "items-000000-7.arrow", ".tmp-CURRENT", ".tmp-manifest-000009.json"]
    for name in leftovers:
        (rich.folder / name).write_text("half")
    rich.update()
    assert not set(leftovers) & {path.name for path in rich.folder.iterdir()}


@pytest.mark.parametrize("name", [*FOREIGN, "holiday.jpg"])
def test_a_folder_of_other_things_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / name).write_text(name)
    with pytest.raises(InputError, match="holds other files"):
        ImageIndex.build(folder, out, encoder=TinyEncoder())
    with pytest.raises(InputError, match="holds other files"):
        ImageIndex.from_vectors(clustered(10, DIM), out)
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == name


def test_an_empty_folder_and_one_of_a_dead_writer_are_taken(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".tmp-vectors-000001-0.npy").write_text("half")
    (tmp_path / "out" / "LOCK").touch()
    (tmp_path / "out" / "writer.json").write_text("{")
    index, _ = ImageIndex.build(folder, tmp_path / "out", encoder=TinyEncoder())
    assert index.verify() == []


def test_out_is_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        ImageIndex.build(folder, tmp_path / "out", encoder=TinyEncoder())
    assert (tmp_path / "out").read_text() == "mine"


# -- writers and readers -----------------------------------------------------------------------------------------------


@pytest.fixture
def other_writer(index: ImageIndex) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its input ends."""
    code = (
        "import sys; from pathlib import Path; from retrieval.storage import Store\n"
        "with Store(Path(sys.argv[1])).write(): print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(index.folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=pathlib.Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        assert process.stdin is not None
        process.stdin.close()


def test_two_writers(index: ImageIndex, folder: Path, other_writer: subprocess.Popen[str]) -> None:
    started = time.monotonic()
    for use in (index.update, lambda: index.remove([0]), lambda: ImageIndex.build(folder, encoder="tiny:0")):
        with pytest.raises(IndexLockedError, match=f"process {other_writer.pid} on "):
            use()
    assert time.monotonic() - started < 5, "no waiting"
    assert len(ImageIndex.open(folder).search("words")) == 10, "readers do not mind"
    other_writer.kill()
    other_writer.wait()
    assert index.update().unchanged == 12, "a lock dies with its process"
    assert not (index.folder / "writer.json").exists()


def test_two_writers_in_one_process(index: ImageIndex, folder: Path) -> None:
    with index.store.write(), pytest.raises(IndexLockedError, match=f"process {os.getpid()} "):
        ImageIndex.open(folder).update()
    index.update()


def test_a_reader_keeps_its_state(rich: ImageIndex, folder: Path) -> None:
    untouched, used = ImageIndex.open(folder), ImageIndex.open(folder)
    query = folder / "00.png"
    expected = [(hit.item.name, hit.score, hit.metadata) for hit in used.search(query)]
    for step in range(3):
        draw(folder / f"new{step}.png", 80 + step)
        (folder / "metadata.csv").write_text(f"file,town\n00.png,T{step}\n")
        (folder / "bad.jpg").unlink(missing_ok=True)
        rich.update()
        rich.rebuild()
    assert len(rich) == 15
    assert rich.search(query)[0].metadata["town"] == "T2"
    gone = [name for name in files_of(used) if not (rich.folder / name).exists()]
    assert {name.split("-")[0] for name in gone} == {"faiss", "items", "metadata", "skipped"}, "cleared by now"
    for reader in (used, untouched):
        assert [(hit.item.name, hit.score, hit.metadata) for hit in reader.search(query)] == expected
        assert names(reader.search(query, where="city = 'Rome'")) == ["00.png"]
        assert len(reader) == 12
        with pytest.raises(IndexDamagedError, match="refresh"):
            reader.skipped()
        reader.refresh()
        assert len(reader) == 15
        assert reader.skipped() == []
        assert reader.search(query)[0].metadata["town"] == "T2"


def test_opening_while_a_writer_moves_on(rich: ImageIndex, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two generations are published between any two steps of a reader that opens the index."""
    steps = 0
    writing = False

    def disturb() -> None:
        nonlocal steps, writing
        if writing or steps == 6:
            return
        steps += 1
        writing = True
        with monkeypatch.context() as undisturbed:
            undisturbed.setattr(Store, "_parse", real_parse)
            undisturbed.setattr(Store, "_check_sizes", real_check)
            for _ in range(2):
                draw(folder / f"n{steps}.png", int(time.monotonic_ns() % 2**32))
                rich.update()
                rich.rebuild()
        writing = False

    real_parse, real_check = Store._parse, Store._check_sizes

    def parse(store: Store, name: str) -> Any:
        if steps % 2 == 0:
            disturb()  # the manifest is cleared under the reader's hands
        return real_parse(store, name)

    def check(store: Store, manifest: Any) -> Any:
        problems = list(real_check(store, manifest))
        if steps % 2 == 1:
            disturb()  # the files are there when they are checked, and gone when they are opened
        return iter(problems)

    monkeypatch.setattr(Store, "_parse", parse)
    monkeypatch.setattr(Store, "_check_sizes", check)
    index = ImageIndex.open(folder)
    assert steps == 6
    assert len(index.search("x", k=50)) == len(index) > 12


def test_read_only_folder(public_path: Path) -> None:
    draw(public_path / "photos" / "a.png", 1)
    draw(public_path / "photos" / "b.png", 2)
    ImageIndex.build(public_path / "photos", encoder=TinyEncoder())
    out = public_path / "photos" / ".mmalign"
    out.chmod(0o555)
    before = sorted(path.name for path in out.iterdir())
    try:
        with ordinary_user():
            index = ImageIndex.open(public_path / "photos", encoder=TinyEncoder())
            assert names(index.search(public_path / "photos" / "a.png", k=1)) == ["a.png"]
            assert index.verify() == []
            with pytest.raises(InputError, match=r"cannot write|failed"):
                index.update()
            (public_path / "closed").mkdir(mode=0o555)
            with pytest.raises(InputError, match=r"cannot write.*--out"):
                ImageIndex.build(public_path / "photos", public_path / "closed" / "idx", encoder=TinyEncoder())
    finally:
        out.chmod(0o755)
    assert sorted(path.name for path in out.iterdir()) == before


# -- a full disk -------------------------------------------------------------------------------------------------------


def test_full_disk_at_every_step_of_an_update(rich: ImageIndex, folder: Path, tmp_path: Path) -> None:
    draw(folder / "new.png", 90)
    draw(folder / "00.png", 91)
    (folder / "01.png").unlink()
    (folder / "02.png").write_bytes(b"bad now")
    (folder / "metadata.csv").write_text("file,town\n03.png,Kiel\n")
    start = rich.folder
    kept = tmp_path / "kept"
    start.rename(kept)
    wanted, _ = ImageIndex.build(folder, tmp_path / "wanted", encoder=TinyEncoder())
    for steps in range(200):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept, out)
        index = ImageIndex.open(out, encoder=TinyEncoder())
        old = index.manifest["generation"]
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(out, patch, steps)
            with explained(disk):
                index.update(folder)
        after = ImageIndex.open(out, encoder=TinyEncoder())
        assert after.verify() == []
        assert len(after.search("x", k=50)) == len(after) in (12, 11)
        assert not [path.name for path in out.iterdir() if path.name.startswith(".tmp-")]
        if not disk.hit:
            break
        assert after.manifest["generation"] in (old, old + 1, old + 2)
        after.update(folder)
        same_content(after, wanted)
        assert after.verify() == []
        assert [entry["path"] for entry in after.skipped()] == ["02.png", "bad.jpg"]
    assert 20 < steps < 199


def test_full_disk_at_every_step_of_a_build(folder: Path, tmp_path: Path) -> None:
    wanted, _ = ImageIndex.build(folder, tmp_path / "wanted", encoder=TinyEncoder())
    for steps in range(200):
        out = tmp_path / f"out{steps}"
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(out, patch, steps)
            with explained(disk):
                ImageIndex.build(folder, out, encoder=TinyEncoder(), batch_size=6, checkpoint_seconds=0)
        if not Store(out).exists():
            assert not out.exists() or not list(out.glob("[!L]*"))
        if not disk.hit:
            break
        index, _ = ImageIndex.build(folder, out, encoder=TinyEncoder())
        same_content(index, wanted)
        assert index.verify() == []
    assert 20 < steps < 199


def test_permission_lost_while_writing(index: ImageIndex, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(folder / "new.png", 95)

    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(MMAlignError, match=re.escape("Input/output error")):
        index.update()
    monkeypatch.undo()
    assert len(ImageIndex.open(folder)) == 12
    assert index.update().added == 1


def test_a_file_is_hashed_once_by_a_repair(rich: ImageIndex, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import retrieval.storage as storage

    hashed: list[str] = []
    real = storage.sha256_of
    monkeypatch.setattr(storage, "sha256_of", lambda path: (hashed.append(Path(path).name), real(path))[1])
    repair(folder)
    assert diagnose(folder, contents=False) == []
    assert len(hashed) == len(set(hashed)) > 5
    hashed.clear()
    assert diagnose(folder) == []
    assert sorted(hashed) == files_of(ImageIndex.open(folder))


def test_only_known_kinds_are_written(index: ImageIndex) -> None:
    with index.store.write() as writer, pytest.raises(KeyError):
        writer.add("notes", lambda file: None)


def test_a_failure_leaves_no_file_of_its_own(rich: ImageIndex) -> None:
    before = set(files_of(rich))

    def fail() -> None:
        with rich.store.write() as writer:
            writer.add("items", lambda file: file.write(b"half"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {path.name for path in rich.folder.iterdir() if path.suffix in (".arrow", ".npy", ".index")} <= before
