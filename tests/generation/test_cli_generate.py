"""`mmalign generate` as a person meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, command_line: Run, tmp_path: Path) -> Run:
    """Run `mmalign generate` in an empty folder, with the tiny SDXL for two steps unless said otherwise."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path, tiny: bool = True) -> tuple[int, str, str]:
        quick = ["--model", "tiny:sdxl", "--steps", "2", "--device", "cpu"] if tiny else []
        return command_line("generate", *arguments, *quick)

    return call


def test_images_are_saved_and_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n\n  a cat \n", encoding="utf-8")
    code, out, err = run("a red bicycle", "--prompts-file", "prompts.txt", "-k", "2", "--seed", "7", "--grid", "g.png")
    assert code == 0, err
    assert out.splitlines() == [
        f"generated/{name}.png"
        for name in (
            "0000-7-a-red-bicycle",
            "0001-8-a-red-bicycle",
            "0002-9-a-dog",
            "0003-10-a-dog",
            "0004-11-a-cat",
            "0005-12-a-cat",
        )
    ]
    assert all(Image.open(line).size == (64, 64) for line in out.splitlines())
    assert "picture: g.png" in err
    assert Image.open(tmp_path / "g.png").height > 3 * 224

    assert run("x", "--out", "new", "--grid", "new/sheets/g.png")[0] == 0
    assert Image.open("new/sheets/g.png").height > 224

    code, out, err = run("--settings", "generated/0003-10-a-dog.png", tiny=False)
    settings = json.loads(out)
    assert (settings["prompt"], settings["seed"], settings["model"]) == ("a dog", 10, "tiny:sdxl")
    assert settings["steps"] == 2


def test_options_reach_the_pipeline(run: Run) -> None:
    code, out, err = run(
        *(
            "x",
            "--out",
            "there",
            "--negative-prompt",
            "dull",
            "--guidance-scale",
            "3",
            "--height",
            "48",
            "--width",
            "72",
        ),
        *("--dtype", "bfloat16", "--batch-size", "1", "--quiet"),
    )
    assert (code, err) == (0, "")
    settings = json.loads(run("--settings", out.strip(), tiny=False)[1])
    wanted = {"negative_prompt": "dull", "guidance_scale": 3.0, "height": 48, "width": 72, "dtype": "bfloat16"}
    assert {name: settings[name] for name in wanted} == wanted


def test_images_as_json(run: Run) -> None:
    code, out, err = run("a dog", "a cat", "--images-per-prompt", "2", "--seed", "3", "--json", "--quiet")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == [
        ("a dog", 3),
        ("a dog", 4),
        ("a cat", 5),
        ("a cat", 6),
    ]
    for line in lines:
        saved = json.loads(run("--settings", line["path"], tiny=False)[1])
        assert saved == {"prompt": line["prompt"], "seed": line["seed"], **line["settings"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no prompt"),
        (("x", "--prompts-file", "absent.txt"), "absent.txt cannot be read"),
        (("x", "--adapter", "absent.safetensors"), "adapter 'absent.safetensors' does not exist"),
        (("x", "--adapter", "a/b", "--adapter-weight", "1", "--adapter-weight", "2"), "2 adapter weights for 1"),
        (("x", "--height", "3"), "height 3 is not a multiple of 8"),
        (("x", "--adapter-weight", "2"), "--adapter-weight is given without an --adapter"),
        (("x", "--grid", "all.txt"), "--grid all.txt ends in .txt"),
        (("x", "--grid", "."), "no picture's"),
        (("--settings", "absent.png"), "absent.png does not exist"),
    ],
)
def test_errors_are_one_line(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert message in line
    assert not list(tmp_path.iterdir())
