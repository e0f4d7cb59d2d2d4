"""Killed at any moment, an index is whole, and the next run ends where an undisturbed one does."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from crashing import Run
from drawing import draw, same_content
from tiny_encoder import TinyEncoder

from retrieval import ImageIndex
from retrieval.storage import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def make_folder(root: Path, count: int) -> Path:
    for number in range(count):
        draw(root / f"{number % 5}" / f"{number:03}.png", number)
    (root / "0" / "bad.jpg").write_bytes(b"no image")
    (root / "metadata.csv").write_text("file,n\n" + "\n".join(f"{n:03}.png,{n}" for n in range(0, count, 3)))
    return root


def change_folder(root: Path, count: int) -> None:
    """A sixth each changed, removed, moved, copied, gone bad; a third new."""
    for number in range(0, count, 6):
        draw(root / f"{number % 5}" / f"{number:03}.png", 1000 + number)
    for number in range(1, count, 6):
        (root / f"{number % 5}" / f"{number:03}.png").unlink()
    for number in range(2, count, 6):
        (root / "moved").mkdir(exist_ok=True)
        (root / f"{number % 5}" / f"{number:03}.png").rename(root / "moved" / f"{number:03}.png")
    for number in range(3, count, 6):
        shutil.copy(root / f"{number % 5}" / f"{number:03}.png", root / f"copy{number:03}.png")
    for number in range(4, count, 6):
        (root / f"{number % 5}" / f"{number:03}.png").write_bytes(b"bad now")
    for number in range(count, count + count // 3):
        draw(root / "new" / f"{number:03}.png", number)
    (root / "0" / "bad.jpg").unlink()


def check_whole(out: Path) -> None:
    """After a crash: what CURRENT names is complete and consistent."""
    if not Store(out).exists():
        return
    index = ImageIndex.open(out, encoder=TinyEncoder())
    assert index.verify() == []
    assert len({item.id for item in index}) == len(index)
    assert len({item.path for item in index}) == len(index)
    for item in list(index)[:: max(1, len(index) // 7)]:
        if (
            item.path.exists()
            and item.size == item.path.stat().st_size
            and item.mtime_ns == item.path.stat().st_mtime_ns
        ):
            hit = index.search(item.path, k=1)[0]
            assert hit.item.row == item.row
            assert hit.score > 0.99999


def check_finished(out: Path, wanted: ImageIndex) -> None:
    index = ImageIndex.open(out, encoder=TinyEncoder())
    assert index.verify() == []
    same_content(index, wanted)
    assert [(e["path"], e["reason"]) for e in index.skipped()] == [(e["path"], e["reason"]) for e in wanted.skipped()]
    assert not [path.name for path in out.iterdir() if path.name.startswith(".tmp-")]
    for query in ("red", "a dog in the snow", np.ones(16)):
        ours, theirs = index.search(query, k=20), wanted.search(query, k=20)
        assert [h.score for h in ours] == pytest.approx([h.score for h in theirs], abs=1e-5)
        assert [(h.item.sha256, h.metadata) for h in ours] == [(h.item.sha256, h.metadata) for h in theirs]
    generation = index.manifest["generation"]
    index.update()
    assert index.manifest["generation"] == generation, "nothing was left to do"


class Case:
    """A folder to be indexed from nothing, or one that has changed since it was."""

    def __init__(self, where: Path, count: int, run: Run, *, update: bool) -> None:
        self.run, self.out = run, where / "out"
        self.folder = make_folder(where / "photos", count)
        self.start: Path | None = None
        if update:
            self.start = where / "start"
            assert run("index", self.folder, self.start, -1, None)[0] == 0
            change_folder(self.folder, count)
        self.reset()
        started = time.monotonic()
        status, self.actions = run("index", self.folder, self.out, -1, None)
        self.seconds = time.monotonic() - started
        assert status == 0
        assert self.actions > 20
        wanted = where / "wanted"
        self.out.rename(wanted)
        self.wanted = ImageIndex.open(wanted, encoder=TinyEncoder())
        if update:  # an update ends where a build of the same folder does
            fresh, _ = ImageIndex.build(self.folder, where / "fresh", encoder=TinyEncoder())
            same_content(self.wanted, fresh)

    def reset(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        if self.start is not None:
            shutil.copytree(self.start, self.out)

    def kill_and_finish(self, step: int = -1, seconds: float | None = None, again: float | None = None) -> bool:
        """Whether the kill came in time; then everything was checked."""
        self.reset()
        status, _ = self.run("index", self.folder, self.out, step, seconds)
        check_whole(self.out)
        if again is not None:  # the run that should mend it is killed, too
            self.run("index", self.folder, self.out, -1, again)
            check_whole(self.out)
        assert self.run("index", self.folder, self.out, -1, None)[0] == 0
        check_finished(self.out, self.wanted)
        return status == -signal.SIGKILL


@pytest.mark.parametrize("update", [False, True], ids=["build", "update"])
def test_killed_before_every_durable_action(tmp_path: Path, run: Run, update: bool) -> None:
    case = Case(tmp_path, 12, run, update=update)
    for step in range(case.actions):
        assert case.kill_and_finish(step), f"action {step} of {case.actions}"


@pytest.mark.parametrize("update", [False, True], ids=["build", "update"])
def test_killed_at_random_moments(tmp_path: Path, run: Run, update: bool) -> None:
    case = Case(tmp_path, 120, run, update=update)
    random = np.random.default_rng(update)
    moments = (np.arange(15) + random.random(15)) / 15 * case.seconds
    killed = [
        case.kill_and_finish(
            seconds=float(moment), again=float(random.random() * case.seconds) if number % 3 == 0 else None
        )
        for number, moment in enumerate(moments)
    ]
    assert sum(killed) >= 10
