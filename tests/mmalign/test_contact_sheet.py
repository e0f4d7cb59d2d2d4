"""The contact sheet: where pictures land, how large it is, and what happens to unreadable ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmalign.errors import InputError
from mmalign.imaging.contact_sheet import draw_contact_sheet

GAP, HEADING = 12, 40


def plain(color: str, size: tuple[int, int] = (50, 50)) -> Image.Image:
    return Image.new("RGB", size, color)


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_pictures_and_files_in_rows(tmp_path: Path) -> None:
    plain("blue").save(tmp_path / "blue.png")
    rows = [
        ("a red cube", [(plain("red"), "seed 1"), (tmp_path / "blue.png", "seed 2"), (plain("lime"), "seed 3")]),
        ("nothing", []),
        ("wide", [(plain("red", (200, 100)), ("seed 4", "a second line"))]),
    ]
    target = draw_contact_sheet(rows, str(tmp_path / "sheet.png"), columns=2, cell=100)
    assert target == tmp_path / "sheet.png"
    pixels = read(target)
    step = 100 + 40 + GAP  # two lines of caption
    assert pixels.shape == (GAP + 3 * HEADING + 2 * step + HEADING + step, 2 * (100 + GAP) + GAP, 3)
    first = GAP + HEADING
    for left, top, color in ((0, 0, (255, 0, 0)), (1, 0, (0, 0, 255)), (0, 1, (0, 255, 0))):
        x, y = GAP + left * (100 + GAP), first + top * step
        assert (pixels[y : y + 100, x : x + 100] == color).all()
        caption = pixels[y + 100 : y + 120, x : x + 100]
        assert (caption == 255).any()
        assert (caption < 128).any()
    last = first + 2 * step + HEADING + HEADING + HEADING
    cell = pixels[last : last + 100, GAP : GAP + 100]
    assert (cell[25:75] == (255, 0, 0)).all()  # keeps its shape, on white
    assert (cell[:24] == 255).all()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_captions_and_headings_stay_in_their_place(tmp_path: Path) -> None:
    long = "a very long caption that goes on and on\n" * 5
    rows = [(long, [(plain("white"), long), (plain("white"), "")])]
    pixels = read(draw_contact_sheet(rows, tmp_path / "sheet.png", cell=60))
    captions = pixels[GAP + HEADING + 60 :]
    assert (captions[:, : GAP + 60 + 2] < 128).any()
    assert (captions[:, GAP + 60 + GAP :] == 255).all()
    assert (captions[24:] == 255).all()  # one line


def test_columns_by_default(tmp_path: Path) -> None:
    for count, columns in ((1, 1), (5, 5), (11, 8)):
        rows = [("", [(plain("red"), "")] * count)]
        width = read(draw_contact_sheet(rows, tmp_path / "sheet.png", cell=10)).shape[1]
        assert width == columns * (10 + GAP) + GAP


def test_unreadable_file_is_a_gray_cell(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [("", [(tmp_path / "broken.png", "a"), (tmp_path / "gone.png", "b")])]
    pixels = read(draw_contact_sheet(rows, tmp_path / "sheet.png", cell=100))
    for left in (GAP, GAP + 100 + GAP):
        assert tuple(pixels[GAP + HEADING + 2, left + 50]) == (220, 220, 220)


def test_an_earlier_sheet_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = draw_contact_sheet([("", [(plain("red"), "")])], tmp_path / "sheet.png")
    before = target.read_bytes()

    def cut(self: Image.Image, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", cut)
    with pytest.raises(InputError, match="No space left"):
        draw_contact_sheet([("", [(plain("blue"), "")])], target)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("rows", "name", "options", "message"),
    [
        ([], "a.png", {}, "no pictures to draw"),
        ([("", [])], "a.png", {"columns": 0}, "columns is 0; give 1 or more"),
        ([("", [])], "a.png", {"cell": 0}, "cell is 0"),
        ([("", [])], "a.nonsense", {}, "a.nonsense'.*a name that ends in .png"),
    ],
)
def test_refusals(rows: list, name: str, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        draw_contact_sheet(rows, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())
