"""Pictures: what they say, and that the same numbers give the same file."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mmalign.plotting import name_axes, name_rows, new_figure, save_figure, share_axes


def drawn(path: Path, names: list[str]) -> list[str]:
    figure, (left, right) = new_figure(2, 2.0, 3.0)
    left.plot([0.2, 0.7], range(2), "o")
    share_axes(left, 2)
    name_rows(left, names)
    name_axes(right, "fit", "step")
    save_figure(figure, path)
    assert left.get_ylim() == (1.5, -0.5), "the first is on top"
    return [label.get_text() for label in left.get_yticklabels()]


def test_the_same_numbers_give_the_same_file(tmp_path: Path) -> None:
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    assert drawn(first, ["chance", "$mine"]) == drawn(second, ["chance", "$mine"]) == ["chance", "$mine"]
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as picture:
        assert picture.size == (660, 220)


def test_long_names_keep_their_ends(tmp_path: Path) -> None:
    shown = drawn(tmp_path / "a.png", ["x" * 40, f"{'x' * 40}/mine"])
    assert shown == ["x" * 40, f"…{'x' * 34}/mine"]
