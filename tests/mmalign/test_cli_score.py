"""`mmalign score` as a person meets it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from generation import GeneratedImage
from generation.rewards import CosineReward, JPEGSize
from mmalign import Encoder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, command_line: Run, tmp_path: Path) -> Run:
    """Run `mmalign score` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: command_line("score", *arguments)


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """A folder of four pictures that carry their prompts, ever brighter, one of them in a folder below."""
    folder = tmp_path / "generated"
    for number, prompt in enumerate(["black", "dark gray", "a light gray wall", "white"]):
        image = Image.new("RGB", (24, 16 + number), (80 * number,) * 3)
        place = folder / "more" if number == 3 else folder
        GeneratedImage(image, prompt, number, {}).save(place / f"{number}.png")
    (tmp_path / "own_scores.py").write_text(
        "def words(images, prompts):\n    return [len(p.split()) for p in prompts]\n\n"
        "def light(images, prompts):\n    return [i.mean() for i in images]\n\n"
        "light.uses_text = False\n"
    )
    return folder


def rows(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_right_captions_score_above_shuffled_ones(
    run: Run, photos: Path, captions: list[dict[str, Any]], bundled: Encoder, tmp_path: Path
) -> None:
    chosen = captions[::5]
    means = {}
    for name, shift in (("right", 0), ("shuffled", 1)):
        lines = [
            {"file": str(photos / row["file"]), "captions": chosen[(number + shift) % len(chosen)]["captions"]}
            for number, row in enumerate(chosen)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        code, out, err = run("--prompts", f"{name}.jsonl", "--reward", "cosine:bundled", "--json", "--device", "cpu")
        assert code == 0, err
        found = rows(out)
        assert [row["rank"] for row in found] == [*range(1, len(chosen) + 1)]
        scores = [row["scores"]["cosine"] for row in found]
        assert scores == sorted(scores, reverse=True)
        means[name] = np.mean(scores)
        if name == "right":
            first = found[:4]
            paths, prompts = [row["path"] for row in first], [row["prompt"] for row in first]
            np.testing.assert_allclose(CosineReward(bundled)(paths, prompts), scores[:4], atol=1e-4)
            of_file = {str(photos / row["file"]): row["captions"][0] for row in chosen}
            assert all(of_file[row["path"]] == row["prompt"] for row in found)
            assert f"on average cosine {means['right']:.4g}" in err
    assert means["right"] > means["shuffled"] + 0.1


def test_drawn_images_carry_their_prompts(run: Run, drawn: Path) -> None:
    code, out, err = run(drawn, "-r", "own_scores:words", "-r", "own_scores:light", "--quiet")
    assert code == 0, err
    assert [line.split() for line in out.splitlines()] == [
        ["rank", "words", "light", "image"],
        ["1", "4.0000", "0.6275", str(drawn / "2.png")],
        ["2", "2.0000", "0.3137", str(drawn / "1.png")],
        ["3", "1.0000", "0.0000", str(drawn / "0.png")],
        ["4", "1.0000", "0.9412", str(drawn / "more/3.png")],
    ]
    assert err == "4 images scored; on average words 2, light 0.4706\n"

    code, out, err = run(drawn, drawn / "1.png", "--prompt", "one two three", "-r", "own_scores:words", "--json")
    assert code == 0
    assert [(row["prompt"], row["scores"]) for row in rows(out)] == [("one two three", {"words": 3})] * 4
    assert "scoring" in err


def test_tables_pictures_and_the_best(run: Run, drawn: Path, tmp_path: Path) -> None:
    wanted = ["more/3.png", "2.png", "1.png", "0.png"]
    options = ("-r", "own_scores:light", "-r", "own_scores:words", "--quiet")
    for suffix in ("csv", "jsonl", "parquet"):
        code, out, err = run(drawn, *options, "--out", f"tables/table.{suffix}")
        assert (code, out) == (0, "")
        assert f"table: tables/table.{suffix}" in err
    with open("tables/table.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [*table[0]] == ["rank", "light", "words", "path", "prompt"]
    assert [row["path"] for row in table] == [str(drawn / name) for name in wanted]
    lines = rows(Path("tables/table.jsonl").read_text(encoding="utf-8"))
    assert [row["prompt"] for row in lines] == ["white", "a light gray wall", "dark gray", "black"]
    parquet = pyarrow.parquet.read_table("tables/table.parquet").to_pylist()
    for one, other, third in zip(table, lines, parquet, strict=True):
        assert float(one["light"]) == pytest.approx(other["scores"]["light"]) == pytest.approx(third["light"])
        assert one["path"] == other["path"] == third["path"]

    code, out, err = run(drawn, *options, "--top", "2", "--out", "all.csv", "--grid", "best.png")
    assert code == 0
    assert [line.split()[-1] for line in out.splitlines()[1:]] == [str(drawn / name) for name in wanted[:2]]
    assert len(Path("all.csv").read_text(encoding="utf-8").splitlines()) == 5
    assert Image.open("best.png").width == 2 * (224 + 12) + 12
    assert "picture: best.png" in err
    code, out, _ = run(drawn, *options, "--top", "1", "--json")
    assert [row["path"] for row in rows(out)] == [str(drawn / "more/3.png")]


def test_a_prompt_for_each_image(run: Run, drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("file,caption\ngenerated/0.png,a b c\ngenerated/2.png,a b\n", encoding="utf-8")
    code, out, _ = run("--prompts", "own.csv", "-r", "own_scores:words", "--json")
    assert code == 0
    assert [(Path(row["path"]).name, row["prompt"]) for row in rows(out)] == [("0.png", "a b c"), ("2.png", "a b")]
    # The prompt that an image carries stands in where the file names none.
    code, out, _ = run("generated", "--prompts", "own.csv", "-r", "own_scores:words", "--json")
    assert code == 0
    assert {Path(row["path"]).name: row["prompt"] for row in rows(out)} == {
        "0.png": "a b c",
        "2.png": "a b",
        "1.png": "dark gray",
        "3.png": "white",
    }


def test_what_cannot_be_scored_is_listed(run: Run, drawn: Path, photos: Path) -> None:
    (drawn / "broken.png").write_bytes(b"no image")
    photo = sorted(photos.glob("*.jpg"))[0]
    code, out, err = run(drawn, "absent.jpg", photo, "-r", "own_scores:words", "--quiet")
    assert code == 4
    assert len(out.splitlines()) == 5
    left = [line for line in err.splitlines() if line.startswith("left out")]
    assert len(left) == 3
    for line, reason, name in zip(
        left, ("not_an_image", "missing", "no_prompt"), ("broken.png", "absent.jpg", photo.name), strict=True
    ):
        assert line.startswith(f"left out ({reason}): ")
        assert line.count(name) == 1
    # No prompt is needed where no reward looks at one.
    code, out, _ = run(photo, "-r", "jpeg-compressibility", "--json")
    assert code == 0
    assert rows(out)[0]["scores"]["jpeg-compressibility"] == pytest.approx(float(JPEGSize()([photo], "")[0]))
    assert rows(out)[0]["prompt"] == ""


def test_two_rewards_of_one_name(run: Run, drawn: Path) -> None:
    code, out, _ = run(
        drawn, "-r", "own_scores:light", "-r", "own_scores.py:light", "-r", "own_scores:light=2", "--json"
    )
    assert code == 0
    for row in rows(out):
        assert [*row["scores"]] == ["own_scores:light", "own_scores.py:light", "2 light"]
        assert row["scores"]["2 light"] == pytest.approx(2 * row["scores"]["own_scores:light"])


def test_rewards_are_listed_and_explained(run: Run) -> None:
    code, out, _ = run("--list")
    assert code == 0
    for name in (
        "cosine:ENCODER",
        "clipscore",
        "pickscore",
        "hps-v2.1",
        "aesthetic-v2",
        "f-clipscore",
        "MODULE:FUNCTION",
    ):
        assert name in out
    code, out, _ = run("--help")
    assert code == 0
    for word in ("mmalign score generated/", "cosine:bundled", "--prompts", "Exit code 4"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there are no images; give files or folders"),
        (("generated",), "open_clip:ViT-B-32/openai' cannot be found"),
        (("generated",), "`--reward cosine:bundled` (needs"),
        (("generated", "-r", "cosin"), "'cosin' is not known (did you mean cosine"),
        (("generated", "-r", "own_scores:absent"), "has no attribute 'absent'"),
        (("absent.png", "--prompt", "x", "-r", "own_scores:light"), "none of the 1 images could be scored; see above"),
        (
            ("photo.jpg", "-r", "own_scores:words"),
            "none of the 1 images has a prompt; give --prompt TEXT, or --prompts",
        ),
        (("generated", "--prompt", "x", "--prompts", "y.csv"), "--prompt and --prompts exclude each other"),
        (("generated", "--prompt", " "), "--prompt is blank"),
        (("generated", "--prompts", "absent.csv"), "'absent.csv' cannot be read"),
        (("generated", "-o", "table.xlsx"), "'table.xlsx' ends in .xlsx; give a name in .csv, .jsonl, .parquet"),
        (("generated", "-o", "generated/0.png/table.csv", "-r", "own_scores:light"), "cannot be written"),
        (("generated", "--grid", "grid.txt"), "--grid grid.txt ends in .txt"),
        (("empty",), "there are no images"),
    ],
)
def test_errors_are_one_line(run: Run, drawn: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    (tmp_path / "empty").mkdir()
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert message in line


def test_what_is_read_is_not_written_over(run: Run, drawn: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.jsonl"
    captions.write_text('{"file": "generated/0.png", "caption": "black"}\n', encoding="utf-8")
    for option, target in (("--out", captions), ("--grid", drawn / "0.png")):
        before = target.read_bytes()
        code, _, err = run(drawn / "0.png", "-r", "redness", "--prompts", captions, option, target, "-q")
        assert code == 1
        assert "is one of the inputs" in err
        assert target.read_bytes() == before


def test_a_reward_named_like_a_column_of_the_table_goes_by_its_spec(run: Run, drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text("def rank(images, prompts):\n    return [i.mean() for i in images]\n")
    code, _, err = run(drawn, "-r", "odd:rank", "--out", "table.csv", "-q")
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    assert all(float(row["odd:rank"]) <= 1 for row in rows)
