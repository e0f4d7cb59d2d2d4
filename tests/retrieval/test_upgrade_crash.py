"""Killed at any moment of an upgrade, or out of disk, an index answers, and going on ends where it would have ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from colour_encoder import ColourEncoder, paint_folder
from crashing import Run
from drawing import names, same_content
from full_disk import Disk, explained

from mmalign.errors import IndexDamagedError, InputError
from retrieval import ImageIndex, IndexUpgrade, diagnose

IMAGES, SAMPLE = 48, 36


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos`, `photos.jsonl`, an index `before` of the weak encoder and one, `measured`, that has been measured."""
    where = tmp_path_factory.mktemp("crash")
    captions = paint_folder(where / "photos", IMAGES)
    weak, strong = ColourEncoder("weak"), ColourEncoder("strong")
    ImageIndex.build(where / "photos", where / "before", encoder=weak)
    shutil.copytree(where / "before", where / "measured")
    IndexUpgrade(where / "measured", strong, encoder=weak).measure(captions, sample=SAMPLE)
    return where


@pytest.fixture(scope="module")
def wanted(start: Path) -> ImageIndex:
    """Where an undisturbed upgrade ends."""
    shutil.copytree(start / "measured", start / "wanted")
    upgrade = IndexUpgrade(start / "wanted", ColourEncoder("strong"), encoder=ColourEncoder("weak"))
    upgrade.start(force=True)
    upgrade.backfill()
    upgrade.finish()
    index = ImageIndex.open(start / "wanted")
    rebuilt, _ = ImageIndex.build(start / "photos", start / "rebuilt", encoder=ColourEncoder("strong"))
    same_content(index, rebuilt)
    return index


def check_whole(out: Path) -> None:
    """What CURRENT names is complete, and answers with every image once."""
    index = ImageIndex.open(out)
    assert index.verify() == []
    for query in ("200 40 7", index.roots[0] / "0" / "000.png"):
        found = names(index.search(query, k=2 * IMAGES))
        assert len(found) == len(set(found)) == IMAGES
    live = index.snapshot.upgrade
    if live is not None:  # no vector of another image, none of another encoder
        strong = ColourEncoder("strong")
        for item in list(index)[::5]:
            if (stored := live.stored(item.row)) is not None:
                np.testing.assert_allclose(stored, strong.encode_images([item.path]), atol=1e-6)


def check_finished(out: Path, wanted: ImageIndex) -> None:
    index = ImageIndex.open(out)
    assert index.verify() == []
    np.testing.assert_array_equal(index.vectors.gather(np.arange(IMAGES)), wanted.vectors.gather(np.arange(IMAGES)))
    assert index.items.table.equals(wanted.items.table)
    for part in ("encoder", "calibration", "measured", "settings", "rows"):
        assert index.manifest[part] == wanted.manifest[part], part
    assert index.manifest["upgrade"] is None
    assert IndexUpgrade(out).status().stage == "finished"
    assert len(list(out.glob("archive-*"))) == 1
    assert ImageIndex.open(next(out.glob("archive-*"))).verify() == []
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_twenty_random_moments(start: Path, wanted: ImageIndex, run: Run, tmp_path: Path) -> None:
    """Of starting, embedding and switching; some of the runs that go on are killed, too."""
    out, captions = tmp_path / "out", start / "photos.jsonl"

    def reset() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(start / "measured", out)

    for _ in range(2):  # the first waits for the server to come up
        reset()
        begun = time.monotonic()
        assert run("upgrade", captions, out, -1, None)[0] == 0
        whole = time.monotonic() - begun
    check_finished(out, wanted)
    random = np.random.default_rng(0)
    killed = 0
    for number in range(20):
        reset()
        status, _ = run("upgrade", captions, out, -1, float((number + random.random()) / 20 * whole))
        killed += status == -signal.SIGKILL
        check_whole(out)
        if number % 4 == 0:
            run("upgrade", captions, out, -1, float(random.random() * whole))
            check_whole(out)
        assert run("upgrade", captions, out, -1, None)[0] == 0
        check_finished(out, wanted)
    assert killed >= 14


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("begin", "stride"), [("measured", 1), ("before", 6)])
def test_killed_before_durable_actions(
    start: Path, wanted: ImageIndex, run: Run, tmp_path: Path, begin: str, stride: int
) -> None:
    """Every one of starting, embedding and switching, and every sixth where it is measured first, which takes long."""
    out, captions = tmp_path / "out", start / "photos.jsonl"
    step = 0
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(start / begin, out)
        status, actions = run("upgrade", captions, out, step, None)
        check_whole(out)
        if status == 0:
            check_finished(out, wanted)
            break
        assert status == -signal.SIGKILL
        assert run("upgrade", captions, out, -1, None)[0] == 0, step
        check_finished(out, wanted)
        step += stride
    assert actions > 40


def test_full_disk_at_any_step(start: Path, wanted: ImageIndex, tmp_path: Path) -> None:
    """Of starting, embedding and switching; every fifth step, one more each round."""
    weak, strong = ColourEncoder("weak"), ColourEncoder("strong")
    steps = 0
    while True:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(start / "measured", out)
        upgrade = IndexUpgrade(out, strong, encoder=weak)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(out, patch, steps)
            with explained(disk):
                upgrade.start(force=True)
                upgrade.backfill(batch_size=4, checkpoint_seconds=0)
                upgrade.finish()
        check_whole(out)
        if not disk.hit:
            break
        status = upgrade.status()
        if status.stage == "measured":
            upgrade.start(force=True)
        if status.stage != "finished":
            upgrade.backfill()
            upgrade.finish()
        check_finished(out, wanted)
        steps += 5
    assert steps > 40


@pytest.mark.parametrize("kind", ["rows", "bridge", "vectors", "left_out"])
def test_damaged_files_of_an_upgrade(start: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(start / "photos", tmp_path / "photos")
    index, _ = ImageIndex.build(tmp_path / "photos", out, encoder=ColourEncoder("weak"))
    before = [(hit.item.name, hit.score) for hit in index.search("200 40 7", k=IMAGES)]
    upgrade = IndexUpgrade(out, ColourEncoder("strong"), encoder=ColourEncoder("weak"))
    upgrade.measure(start / "photos.jsonl", sample=SAMPLE)
    upgrade.start(force=True)
    (tmp_path / "photos" / "0" / "000.png").unlink()
    (tmp_path / "photos" / "1" / "001.png").unlink()
    upgrade.backfill()
    about = ImageIndex.open(out).manifest["upgrade"]
    name = {
        "rows": about["places"],
        "bridge": about["bridge"]["file"],
        "vectors": about["segments"][0]["file"],
        "left_out": about["left_out"],
    }[kind]
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 0xFF
    (out / name).write_bytes(bytes(data))
    problems = [str(problem) for problem in diagnose(out)]
    assert len(problems) == 1
    assert name in problems[0]
    assert "--roll-back" in problems[0]
    with pytest.raises((IndexDamagedError, InputError)):
        upgrade.finish()
    (out / name).write_bytes(b"")
    with pytest.raises(IndexDamagedError, match=name):
        ImageIndex.open(out)
    upgrade.roll_back()
    again = ImageIndex.open(out)
    assert again.verify() == []
    assert [(hit.item.name, hit.score) for hit in again.search("200 40 7", k=IMAGES)] == before


def test_the_derived_files_of_an_upgrade_are_rebuilt(start: Path, tmp_path: Path) -> None:
    from retrieval import repair

    out = tmp_path / "out"
    shutil.copytree(start / "measured", out)
    upgrade = IndexUpgrade(out, ColourEncoder("strong"), encoder=ColourEncoder("weak"))
    upgrade.start(force=True)
    before = names(ImageIndex.open(out).search("200 40 7", k=20))
    file = out / ImageIndex.open(out).manifest["upgrade"]["faiss"]["file"]
    file.write_bytes(file.read_bytes()[:-9])
    assert "--repair" in str(diagnose(out)[0])
    repair(out)
    assert diagnose(out) == []
    assert names(ImageIndex.open(out).search("200 40 7", k=20)) == before
    upgrade.backfill()
    upgrade.finish()
    assert ImageIndex.open(out).verify() == []


@pytest.mark.slow
def test_searched_by_two_processes_while_a_third_upgrades(start: Path, run: Run, tmp_path: Path) -> None:
    out, captions = tmp_path / "out", start / "photos.jsonl"
    shutil.copytree(start / "measured", out)
    search = (
        "import sys, colour_encoder; from retrieval import ImageIndex\n"
        "for _ in range(40): assert len(ImageIndex.open(sys.argv[1]).search('200 40 7', k=99)) == 48\n"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    searching = subprocess.Popen([sys.executable, "-c", search, str(out)], env=environment)
    with ThreadPoolExecutor(1) as pool:
        upgrading = pool.submit(run, "upgrade", captions, out, -1, None)
        while not upgrading.done():
            assert len(ImageIndex.open(out).search("200 40 7", k=99)) == IMAGES
    assert upgrading.result()[0] == 0
    assert searching.wait(120) == 0
    assert IndexUpgrade(out).status().stage == "finished"
