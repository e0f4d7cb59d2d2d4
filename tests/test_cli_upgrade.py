"""`mmalign upgrade` as a person types it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RETRIEVAL = Path(__file__).parent / "retrieval"
IMAGES = 48


@pytest.fixture(scope="module")
def colours() -> Any:
    """The encoders of the tests of upgrades, known by their specs."""
    sys.path.insert(0, str(RETRIEVAL))
    try:
        import colour_encoder
    finally:
        sys.path.remove(str(RETRIEVAL))
    return colour_encoder


@pytest.fixture(scope="module")
def indexed(colours: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos`, indexed by the weak encoder, and `photos.jsonl`."""
    from retrieval import ImageIndex

    where = tmp_path_factory.mktemp("cli-upgrade")
    colours.paint_folder(where / "photos", IMAGES)
    ImageIndex.build(where / "photos", encoder=colours.ColourEncoder("weak"))
    return where


@pytest.fixture
def photos(indexed: Path, tmp_path: Path) -> Path:
    shutil.copytree(indexed, tmp_path, dirs_exist_ok=True)
    return tmp_path / "photos"


def test_the_whole_way(command_line: Callable[..., Any], photos: Path) -> None:
    captions = photos.parent / "photos.jsonl"
    before = command_line("search", photos, "200 40 7", "--paths").out
    options = ["--to", "colour:strong", "--support", captions, "--sample", "36", "-q"]

    measured = command_line("upgrade", photos, *options, "--measure", "--out", photos.parent / "report")
    assert measured.code == 0
    assert "old queries on old vectors" in measured.out
    assert "advice:" in measured.out
    assert json.loads((photos.parent / "report" / "report.json").read_text())["images"] == IMAGES
    assert (photos.parent / "report" / "report.png").stat().st_size > 10_000
    assert command_line("search", photos, "200 40 7", "--paths").out == before

    status = command_line("upgrade", photos, "--status")
    assert "measured: colour:weak -> colour:strong" in status.out
    assert "36 of 48 images embedded" in status.out

    part = command_line("upgrade", photos, "--limit", "5", "--force", "-q")
    assert part.code == 0
    assert "23 of 48 images embedded" in part.out, "half of the sample is asked for, and waits for its turn"
    assert "goes on" in part.err
    assert "23 of 48" in command_line("info", photos).out
    found = command_line("search", photos, "200 40 7", "--json", "-k", "48").out.splitlines()
    assert any(json.loads(line)["by_new"] for line in found)

    early = command_line("upgrade", photos, "--finish")
    assert early.code == 1
    assert "25 images have not been embedded yet" in early.err

    rest = command_line("upgrade", photos, "-q", "--json")
    assert json.loads(rest.out)["remaining"] == 0
    done = command_line("upgrade", photos, "--finish", "-q")
    assert done.code == 0
    assert "the index is one of colour:strong" in done.err
    assert "colour:strong" in command_line("info", photos).out
    assert command_line("verify", photos).code == 0
    assert "go back with" in command_line("upgrade", photos, "--status").err

    assert command_line("upgrade", photos, "--roll-back").code == 0
    assert command_line("search", photos, "200 40 7", "--paths").out == before


def test_in_one_command(command_line: Callable[..., Any], photos: Path) -> None:
    done = command_line("upgrade", photos, "--to", "colour:strong", "--sample", "36", "--force", "-q")
    assert done.code == 0
    assert "48 of 48 images embedded" in done.out
    assert "--finish` switches" in done.err


def test_what_could_not_be_embedded(command_line: Callable[..., Any], photos: Path) -> None:
    command_line("upgrade", photos, "--to", "colour:strong", "--sample", "20", "--measure", "-q")
    for path in photos.glob("*/*.png"):
        if int(path.stem) % 2:
            path.unlink()
    done = command_line("upgrade", photos, "--force", "-q")
    assert done.code == 4
    listed = command_line("upgrade", photos, "--left-out").out.splitlines()
    assert listed
    assert all(line.startswith("missing: ") for line in listed)
    refused = command_line("upgrade", photos, "--finish", "-q", "--gone", "drop")
    assert refused.code == 1
    assert "is a disk away?" in refused.err
    finished = command_line("upgrade", photos, "--finish", "-q", "--gone", "drop", "--force")
    assert f"{len(listed)} images could not be embedded and were dropped" in finished.err
    assert f"{IMAGES - len(listed)} (" in command_line("info", photos).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the new encoder: mmalign upgrade INDEX --to ENCODER"),
        (["--to", "colour:weak"], "index's own encoder"),
        (["--to", "colour:images"], "has no text tower"),
        (["--to", "nothing:at-all"], "nothing"),
        (["--finish"], "no upgrade of this index is under way"),
        (["--roll-back"], "nothing to roll back"),
        (["--finish", "--status"], "--finish and --status exclude each other"),
        (["--to", "colour:strong", "--delete-old"], "--delete-old has no effect at this stage"),
        (["--status", "--sample", "20"], "--sample has no effect with --status"),
        (["--finish", "--support", "x.jsonl"], "--support has no effect with --finish"),
        (["--to", "colour:strong", "--support", "no.jsonl"], "no.jsonl"),
        (["--to", "colour:strong", "--sample", "20", "--order", "views"], "order is 'views'"),
    ],
)
def test_wrong_input(command_line: Callable[..., Any], photos: Path, arguments: list[str], message: str) -> None:
    found = command_line("upgrade", photos, *arguments, "-q")
    assert found.code == 1
    assert message in found.err
    assert len(found.err.strip().splitlines()) == 1


def test_help_teaches(command_line: Callable[..., Any]) -> None:
    found = command_line("upgrade", "--help")
    for word in ("--measure", "--support", "--roll-back", "Ctrl-C", "mmalign upgrade photos/ --to"):
        assert word in found.out
