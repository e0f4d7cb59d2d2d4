"""`mmalign best` as a person meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from generation import generate, read_settings

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, command_line: Run, tmp_path: Path) -> Run:
    """Run `mmalign best` in an empty folder, with the tiny SDXL for five steps, by a reward without weights."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        quick = ["--model", "tiny:sdxl", "--steps", "5", "--device", "cpu", "--quiet"]
        reward = [] if "--reward" in arguments else ["--reward", "jpeg-incompressibility"]
        return command_line("best", *arguments, *quick, *reward)

    return call


def test_kept_images_are_saved_and_named_with_scores(run: Run) -> None:
    code, out, err = run("a red bicycle", "-n", "16", "--keep", "2", "--seed", "7", "--grid", "sheets/best.png")
    assert code == 0, err
    header, *lines = out.splitlines()
    assert header.split() == ["rank", "jpeg-incompressibility", "image"]
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows] == ["1", "2"]
    assert float(rows[0][1]) >= float(rows[1][1]) > 0
    for rank, (_, _, path) in enumerate(rows):
        settings = read_settings(path)
        assert path == f"best/000{rank}-{settings['seed']}-a-red-bicycle.png"
        (same,) = generate("a red bicycle", model="tiny:sdxl", device="cpu", steps=5, seed=settings["seed"])
        np.testing.assert_allclose(np.asarray(Image.open(path), int), np.asarray(same.image, int), atol=1)
    assert err.splitlines() == [
        "picture: sheets/best.png",
        "88 denoiser calls instead of 160: 45% saved",
    ]
    assert Image.open("sheets/best.png").width > 2 * 224


def test_as_json_with_everything_finished(run: Run) -> None:
    options = ("-n", "4", "--seed", "7", "--json", "--out", "there")
    code, out, err = run("a dog", *options, "--plain", "--guidance-scale", "1")
    assert code == 0, err
    found = json.loads(out)
    assert found["calls"] == found["plain_calls"] == 4 * 5
    assert [one["seed"] for one in found["candidates"]] == [7, 8, 9, 10]
    assert found["images"][0]["score"] == max(one["score"] for one in found["candidates"])
    assert Path(found["images"][0]["path"]).parent == Path("there")

    code, out, err = run("a dog", *options, "--check-at", "0.2", "--check-at", "0.6", "--survivors", "3", "--survivors",
                         "2", "--preview-scale", "2", "--height", "48", "--batch-size", "2")  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["checks"] == [1, 3]
    assert found["calls"] == 2 * (4 * 1 + 3 * 2 + 2 * 2)
    assert found["images"][0]["settings"]["height"] == 48


def test_rounds_by_a_reward_that_reads(run: Run, bundled: object) -> None:
    code, _, err = run("a red fox in snow", "-n", "2", "--rounds", "2", "--reward", "cosine:bundled", "--seed", "1")
    assert code == 0, err
    again = next(line for line in err.splitlines() if line.startswith("drawn again as: "))
    assert again.endswith(": a red fox in snow")
    assert "denoiser calls instead of 40" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "--keep", "3", "-n", "2"), "keep is 3 of n 2"),
        (("x", "--check-at", "2"), "check_at is 2.0; give a share of the steps"),
        (("x", "--plain", "--check-at", "0.2"), "--plain and --check-at exclude each other"),
        (("x", "--plain", "--survivors", "2"), "check_at is None"),
        (("x", "--adapter-weight", "2"), "--adapter-weight is given without an --adapter"),
        (("x", "--grid", "all.txt"), "--grid all.txt ends in .txt"),
        (("x", "--scorer", "absent.safetensors"), "scorer 'absent.safetensors' cannot be read"),
        (("x", "--reward", "beauty"), "reward 'beauty' is not known"),
    ],
)
def test_errors_are_one_line(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert message in line
    assert not list(tmp_path.iterdir())
