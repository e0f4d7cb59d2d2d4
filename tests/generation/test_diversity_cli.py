"""`mmalign eval diversity` and `diversity-prompts` as a person meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from PIL import Image

from generation import GeneratedImage
from generation.diversity import compare_prompts, diversity_prompts, measure_diversity
from mmalign import Encoder, cli
from mmalign.metrics import identity_similarity, layout_similarity

Run = Callable[..., Any]


@pytest.fixture
def run(command_line: Run, monkeypatch: pytest.MonkeyPatch, clip_folder: Path, tmp_path: Path) -> Run:
    """Run `mmalign eval diversity` where `base` and `tuned` lie, with a tiny encoder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", None)

    def call(*arguments: str | Path, encoder: bool = True) -> Any:
        given = ["--encoder", f"transformers:{clip_folder}", "--device", "cpu"] if encoder else []
        return command_line("eval", "diversity", *arguments, *given)

    return call


@pytest.fixture
def drawn(photos: Path, tmp_path: Path) -> dict[str, list[Path]]:
    """Four prompts with three images each: in `base` all differ, in `tuned` a prompt's three are the same."""
    pictures = [Image.open(file).convert("RGB").resize((64, 48)) for file in sorted(photos.glob("*.jpg"))[:12]]
    files: dict[str, list[Path]] = {"base": [], "tuned": []}
    for name, paths in files.items():
        for number in range(12):
            chosen = number // 3 * 3 if name == "tuned" else number
            image = GeneratedImage(pictures[chosen], f"prompt {number // 3}", number, {})
            paths.append(image.save(tmp_path / name / f"{number:02d}.png"))
    return files


def value_of(table: str, title: str, name: str) -> float:
    lines = table.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(title))
    line = next(line for line in lines[at:] if f" {name} " in line)
    return float(line.split(f" {name} ")[1].split()[0])


@pytest.mark.parametrize("words", [("eval", "diversity"), ("eval", "diversity-prompts")])
def test_help_says_what_each_option_does(words: tuple[str, ...], run: Run, command_line: Run) -> None:
    command: Any = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]
    assert [p.name for p in command.params if p.name != "help" and not p.help] == []
    shown = command_line(*words, "--help")
    assert shown.code == 0
    assert max(map(len, shown.out.splitlines())) <= 80


def test_two_folders_side_by_side(run: Run, drawn: dict[str, list[Path]], tiny_clip: Encoder) -> None:
    result = run("tuned", "--against", "base", "--plot", "plots/p.png")
    assert result.code == 0, result.err
    reports = {
        name: measure_diversity(files, [f"prompt {i // 3}" for i in range(12)], encoder=tiny_clip)
        for name, files in drawn.items()
    }
    assert "tuned: 12 images of 4 prompts" in result.out
    titles = {
        "similarity within prompts": "within_prompt_similarity",
        "similarity between prompts": "between_prompt_similarity",
        "tonal variation (PVS)": "tonal_variation",
        "- of contrast": "contrast_variation",
    }
    for title, figure in titles.items():
        line = next(line for line in result.out.splitlines() if line.startswith(title))
        assert line[len(title) :].split()[0] == ("lower" if "similarity" in figure else "higher")
        for name, report in reports.items():
            assert value_of(result.out, title, name) == pytest.approx(report.values[figure], abs=6e-4)
    assert reports["tuned"].values["within_prompt_similarity"] > reports["base"].values["within_prompt_similarity"]
    difference = compare_prompts(reports["tuned"], reports["base"])
    assert difference is not None
    last = result.out.splitlines()[-1]
    assert f"within prompt similarity of tuned minus base: {difference.value:+.3f} [" in last
    assert last.endswith("over 4 prompts of both, less diverse")
    assert result.err.count("4 prompts are few") == 1
    assert "picture: plots/p.png" in result.err
    with Image.open("plots/p.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or []}
    assert {(31, 119, 180), (255, 127, 14)} <= colours, "points of both sets"


def test_json_boxes_faces_and_references(run: Run, drawn: dict[str, list[Path]], photos: Path, tmp_path: Path) -> None:
    layouts = {str(file.relative_to(tmp_path)): [[i % 5, 0, i % 5 + 4, 4]] for i, file in enumerate(drawn["base"])}
    lines = [{"file": name, "boxes": boxes} for name, boxes in layouts.items()]
    Path("boxes.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    faces = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32)
    for number, rows in enumerate(faces):
        np.save(f"{number}.npy", rows)
    result = run("base", "tuned", "--boxes", "boxes.jsonl", "--faces", "0.npy", "--faces", "1.npy", "--reference",
                 photos, "--json", "-q")  # fmt: skip
    assert result.code == 0, result.err
    about = json.loads(result.out)
    assert about["differences"] == []
    base, tuned = about["sets"]["base"], about["sets"]["tuned"]
    for number, report in enumerate((base, tuned)):
        assert report["figures"]["identity_similarity"]["value"] == pytest.approx(identity_similarity(faces[number]))
        assert report["coverage"]["test"]["learned"] > 0
    assert base["coverage"]["test"] == tuned["coverage"]["test"], "the same references for both"
    boxes = list(layouts.values())[:3]
    pairs = [layout_similarity(boxes[i], boxes[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert base["per_prompt"]["spatial_diversity"]["prompt 0"] == pytest.approx(1 - sum(pairs) / 3)
    assert "spatial_diversity" not in tuned["figures"]
    assert "12 of 12 images have no detections" in result.err


def test_unreadable_images_are_listed(run: Run, drawn: dict[str, list[Path]]) -> None:
    drawn["tuned"][3].write_bytes(drawn["tuned"][3].read_bytes()[:900])
    drawn["tuned"][7].write_bytes(b"")
    result = run("tuned", "--encoder", "none", encoder=False)
    assert result.code == cli.PARTIAL
    assert "tuned: 10 images" in result.out
    assert "similarity" not in result.out
    assert "2 images could not be read" in result.err
    for reason, name in (("truncated", "03.png"), ("empty", "07.png")):
        assert any(line.startswith(f"{reason}: ") and name in line for line in result.err.splitlines())
    assert "reading prompts" in result.err
    report = json.loads(run("tuned", "-e", "none", "--json", "-q", encoder=False).out)
    assert [entry["reason"] for entry in report["skipped"]] == ["truncated", "empty"]


def test_images_named_one_by_one_and_folders_of_classes(run: Run, drawn: dict[str, list[Path]], tmp_path: Path) -> None:
    result = run(*drawn["base"][:4], "-q")
    assert "images: 4 images of 2 prompts" in result.out
    assert "1 of 2 prompts have one image" in result.err
    for number, file in enumerate(drawn["base"]):
        place = tmp_path / "plain" / f"class {number % 3}" / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).convert("RGB").save(place)
    about = json.loads(run("plain", "--json", "-q").out)["sets"]["plain"]
    assert about["prompts"] == {f"class {i}": 4 for i in range(3)}
    result = run("plain", "--against", "base", "-q")
    assert "the sets differ in prompts" in result.err
    assert "minus" not in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "'none' does not exist; give a folder of images"),
        (["base", "--against", "base"], "'base' is given twice"),
        (["base", "--against", "none"], "'none' is not a folder"),
        (["base", "--faces", "a.npy", "--faces", "b.npy"], "--faces are 2 for 1 sets"),
        (["base", "--faces", "a.npy"], "faces 'a.npy' cannot be read"),
        (["base", "--boxes", "a.jsonl"], "detections 'a.jsonl' cannot be read"),
        (["base", "--boxes", "other.jsonl"], "--boxes name none of the images"),
        (["base", "--reference-test", "base"], "--reference-test is given without --reference"),
        (["base", "--plot", "p.pdf"], "--plot p.pdf ends in .pdf"),
        (["base", "--plot", "base"], "ends in nothing"),
        (["base", "--encoder", "none", "--plot", "p.png"], "--plot draws similarities"),
        (["base", "--encoder", "none", "--reference", "base"], "--reference needs an encoder"),
        (["base", "--encoder", "nonsense"], "encoder 'nonsense' is neither"),
    ],
)
def test_what_is_refused_in_one_line(
    arguments: list[str], message: str, run: Run, drawn: dict[str, list[Path]]
) -> None:
    Path("other.jsonl").write_text('{"file": "elsewhere.png", "boxes": []}\n')
    result = run(*arguments, "-q", encoder="--encoder" not in arguments)
    assert result.code == 1
    (line,) = result.err.splitlines()
    assert message in line


def test_prompts_are_printed_one_a_line(command_line: Run, tmp_path: Path) -> None:
    result = command_line("eval", "diversity-prompts", "layout", "-n", "7", "--seed", "5")
    wanted = diversity_prompts("layout", 7, seed=5)
    assert result.out.splitlines() == [prompt.text for prompt in wanted]
    assert len(command_line("eval", "diversity-prompts", "style").out.splitlines()) == 800

    (tmp_path / "words.json").write_text('{"style": ["Op Art", "Cubism"]}')
    (tmp_path / "scenes.txt").write_text("a hen\n\na barn\n")
    words = ("--keywords", tmp_path / "words.json", "--base-prompts", tmp_path / "scenes.txt")
    result = command_line("eval", "diversity-prompts", "style", "-n", "4", *words, "--json")
    found = [json.loads(line) for line in result.out.splitlines()]
    assert {(row["keywords"]["style"], row["keywords"]["scene"]) for row in found} == {
        (style, scene) for style in ("Op Art", "Cubism") for scene in ("a hen", "a barn")
    }
    assert all(row["prompt"].startswith("a painting in the style of ") for row in found)

    for text, message in (("[1]", "no lists by axis"), ('{"age": "x"}', "no lists by axis"), ("{", "cannot be read")):
        (tmp_path / "words.json").write_text(text)
        result = command_line("eval", "diversity-prompts", "style", *words)
        assert (result.code, message in result.err) == (1, True)
    assert command_line("eval", "diversity-prompts", "faces").code == 2
