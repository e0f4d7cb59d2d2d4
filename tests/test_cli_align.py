"""`mmalign align` and `mmalign eval` as a person meets them; what they make is indexed and searched with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
from PIL import Image

from mmalign import cli, load_encoder
from mmalign.alignment import AlignmentRun
from retrieval import ImageIndex

Run = Callable[..., Any]


@pytest.fixture
def run(command_line: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", None)  # read from the environment once a process
    return command_line


@pytest.fixture
def pairs(captions: list[dict[str, Any]], photos: Path, tmp_path: Path) -> Path:
    rows = [{"file": str(photos / row["file"]), "captions": row["captions"][:2]} for row in captions[:24]]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def align(run: Run, clip_folder: Path, bert_folder: Path) -> Run:
    """With tiny towers and few steps."""

    def call(*arguments: str | Path) -> Any:
        towers = ("--image-encoder", f"transformers:{clip_folder}", "--text-encoder", f"transformers:{bert_folder}")
        return run("align", *arguments, *towers, "--device", "cpu")

    return call


FEW = ("--method", "clip", "--dim", "8", "--steps", "3", "--layers", "output", "--test", "0.3")


@pytest.fixture
def aligned(align: Run, pairs: Path, tmp_path: Path) -> Path:
    result = align(pairs, "--out", tmp_path / "mine", *FEW, "-q")
    assert result.code == 0, result.err
    return tmp_path / "mine"


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("align",), ("eval", "captions"), ("eval", "zero-shot")])
def test_help_says_what_each_option_does(words: tuple[str, ...], run: Run) -> None:
    command: Any = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]
    silent = [parameter.name for parameter in command.params if parameter.name != "help" and not parameter.help]
    assert silent == []
    shown = run(*words, "--help")
    assert shown.code == 0
    assert max(map(len, shown.out.splitlines())) <= 80
    if words == ("align",):
        for phrase in ("mmalign index photos/ --encoder mine", "captions.jsonl", "Exit code 4", "report.png"):
            assert phrase in " ".join(shown.out.split())


# -- align -------------------------------------------------------------------------------------------------------------


def test_a_table_a_folder_and_what_to_do_next(align: Run, pairs: Path, tmp_path: Path) -> None:
    result = align(pairs, "--out", tmp_path / "mine", *FEW)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    for name in ("chance", "ridge", "cca", "clip"):
        assert any(line.startswith(name) for line in lines)
    assert f"mmalign index FOLDER --encoder {tmp_path / 'mine'}" in result.err
    for bar in ("hashing images", "extracting features", "fitting"):
        assert bar in result.err
    assert {"encoder.json", "report.json", "report.png"} <= {path.name for path in (tmp_path / "mine").iterdir()}
    assert (tmp_path / "mmalign-features").is_dir()


def test_one_json_object_and_no_bars(align: Run, pairs: Path, tmp_path: Path) -> None:
    result = align(pairs, "-o", tmp_path / "mine", *FEW, "--json", "-q")
    assert result.code == 0, result.err
    report = json.loads(result.out, parse_constant=pytest.fail)
    assert report["folder"] == str(tmp_path / "mine")
    assert report["pairs"]["images"] == 24
    assert [line for line in result.err.splitlines() if not line.startswith("note: ")] == []


def test_options_by_name(align: Run, pairs: Path, tmp_path: Path) -> None:
    more = ("--set", "learn-temperature=False", "--set", "betas=[0.8, 0.9]", "--set", "tcm_margins=null",
            "--set", "learning_rate=2e-3", "--set", "select_by=last")  # fmt: skip
    report = json.loads(align(pairs, "-o", tmp_path / "mine", *FEW, *more, "--json", "-q").out)
    options = report["fit"]["options"]
    assert options["learn_temperature"] is False
    assert options["betas"] == [0.8, 0.9]
    assert options["tcm_margins"] is None
    assert (options["learning_rate"], options["select_by"], options["steps"]) == (2e-3, "last", 3)


def test_layers_by_number(align: Run, pairs: Path, tmp_path: Path) -> None:
    arguments = [word if word != "output" else "0,-1" for word in FEW]
    result = align(pairs, "-o", tmp_path / "mine", *arguments, "--pooling", "mean", "--json", "-q")
    sources = json.loads(result.out)["sources"]
    assert (sources["image"]["layer"], sources["image"]["pooling"], sources["text"]["layer"]) == (0, "mean", 2)


def test_images_left_out_have_an_exit_code(align: Run, pairs: Path, tmp_path: Path) -> None:
    with pairs.open("a") as file:
        file.write(json.dumps({"file": "missing.jpg", "caption": "nothing"}) + "\n")
        file.write(json.dumps({"file": "bare.jpg", "caption": " "}) + "\n")
    result = align(pairs, "-o", tmp_path / "mine", *FEW, "-q")
    assert result.code == cli.PARTIAL
    assert "1 images could not be read" in result.err
    assert "does not exist" in result.err
    assert "1 images have no caption and are left out" in result.err
    assert "missing.jpg" in result.err
    assert (tmp_path / "mine" / "encoder.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--layers", "9,x"], "layers is '9,x'; give select, last, output, or IMAGE,TEXT"),
        (["--layers", "9"], "such as 9,-1 or output,6"),
        (["--layers", "9,0"], "layer is 9; the image tower of"),
        (["--set", "depth=2"], "names no option of clip; give name=value of loss, head"),
        (["--set", "levels"], "has no value; give levels=VALUE"),
        (["--set", "steps=many"], "'steps=many' has no value for steps"),
        (["--set", "steps=null"], "'steps=null' has no value for steps"),
        (["--set", "learn_temperature=perhaps"], "has no value for learn_temperature"),
        (["--set", "betas=0.9"], "has no value for betas"),
        (["--set", "loss=l2"], "should be 'clip' or 'siglip'"),
        (["--method", "ridge"], "method 'ridge' has no option 'dim'; it has regularisation"),
        (["--set", "steps=9"], "steps is given twice; give it once"),
        (["--set", "rank=1", "--set", "rank=2"], "rank is given twice; give it once"),
        (["--method", "procrustes", "--set", "rank=1"], "procrustes has no options; leave it out"),
        (["--templates", "fancy"], "templates are 'fancy'; give simple or imagenet, or a file"),
        (["--against", "clip"], "encoder 'clip' is neither a folder nor"),
        (["--dtype", "int3"], "int3"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(
    changes: list[str], message: str, align: Run, pairs: Path, tmp_path: Path
) -> None:
    result = align(pairs, "--out", tmp_path / "mine", *FEW, *changes, "-q")
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert len(result.err.splitlines()) == 1
    assert message in result.err
    assert not (tmp_path / "mine").exists()


def test_mistakes_in_what_is_given(
    run: Run, align: Run, pairs: Path, clip_folder: Path, bert_folder: Path, tmp_path: Path
) -> None:
    clip, bert = f"transformers:{clip_folder}", f"transformers:{bert_folder}"
    empty, holiday = tmp_path / "empty.jsonl", tmp_path / "holiday"
    empty.write_text('{"file": "a.jpg", "caption": " "}\n')
    holiday.mkdir()
    no_tower = run("align", pairs, "-o", tmp_path / "x", "--image-encoder", bert, "--text-encoder", clip)
    for result, message in (
        (no_tower, "it has no image tower"),
        (align(empty, "-o", tmp_path / "x"), "holds no caption"),
        (align(tmp_path / "none.jsonl", "-o", tmp_path / "x"), "cannot be read"),
        (align(holiday, "-o", tmp_path / "x"), "holds none of captions.jsonl"),
        (align(pairs, "-o", holiday), "exists and is not an encoder folder"),
    ):
        assert result.code == 1
        assert message in result.err.splitlines()[-1]
    unknown = align(pairs, "-o", tmp_path / "x", "--method", "magic")
    assert unknown.code == 2
    assert "structure" in unknown.err
    assert list(holiday.iterdir()) == []


def test_ctrl_c_has_its_exit_code(align: Run, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmalign.features.extraction._encode", stop)
    result = align(pairs, "-o", tmp_path / "mine", *FEW, "-q")
    assert result.code == cli.INTERRUPTED
    assert "the same command goes on" in result.err
    assert not (tmp_path / "mine").exists()


# -- eval --------------------------------------------------------------------------------------------------------------


def test_eval_captions_of_several_encoders(
    run: Run, aligned: Path, clip_folder: Path, captions: list[dict[str, Any]], photos: Path, tmp_path: Path
) -> None:
    data = tmp_path / "others.csv"
    rows = [(row["file"], text, ("test", "train")[at % 3 == 0]) for at, row in enumerate(captions[24:48])
            for text in row["captions"][:2]]  # fmt: skip
    quoted = [f'{photos / file},"{text.strip().replace(chr(34), "")}",{split}' for file, text, split in rows]
    data.write_text("\n".join(["file,caption,split", *quoted]) + "\n")
    clip = f"transformers:{clip_folder}"
    out = tmp_path / "out"
    result = run("eval", "captions", data, "-e", aligned, "-e", clip, "--split", "test", "--out", out, "--json", "-q")
    assert result.code == 0, result.err
    about = json.loads(result.out)
    names = ["chance", *(f"{aligned}: {kind}" for kind in ("ridge", "cca", "clip")), clip]
    assert list(about["retrieval"]["figures"]) == names
    assert (about["retrieval"]["images"], about["retrieval"]["captions"]) == (16, 32)
    assert about["encoders"][clip] == load_encoder(clip, device="cpu").fingerprint
    assert json.loads((out / "report.json").read_text()) == about
    with Image.open(out / "report.png") as picture:
        assert picture.size[0] > 400
    alone = run("eval", "captions", data, "-e", clip)
    assert alone.code == 0
    assert [line.split()[0] for line in alone.out.splitlines()[2:]] == ["chance", clip]
    wrong = run("eval", "captions", data, "-e", clip, "--split", "dev")
    assert wrong.code == 1
    assert "there is test, train; leave split out for all" in wrong.err


def test_eval_captions_says_what_flatters(run: Run, aligned: Path, pairs: Path) -> None:
    result = run("eval", "captions", pairs, "-e", aligned, "-q")
    assert result.code == 0
    assert "was fitted on 17 of these 24 images" in result.err


def test_eval_does_not_write_into_an_encoder(run: Run, aligned: Path, pairs: Path) -> None:
    before = (aligned / "report.json").read_bytes()
    for words in (("captions", pairs), ("zero-shot", pairs.parent)):
        result = run("eval", *words, "-e", aligned, "--out", aligned)
        assert result.code == 1
        assert "is an encoder with a report of its own; choose another folder" in result.err
        assert len(result.err.splitlines()) == 1
    assert (aligned / "report.json").read_bytes() == before
    heads = pairs.parent / "heads"
    heads.mkdir()
    (heads / "alignment.json").write_text("{}")
    assert "is an alignment with" in run("eval", "captions", pairs, "-e", aligned, "--out", heads).err
    assert "is a file" in run("eval", "captions", pairs, "-e", aligned, "--out", pairs).err


def test_eval_zero_shot(run: Run, aligned: Path, captions: list[dict[str, Any]], photos: Path, tmp_path: Path) -> None:
    count = 0
    for name in ("elephant", "traffic light"):
        folder = tmp_path / "classes" / name.replace(" ", "_")
        folder.mkdir(parents=True)
        for row in captions:
            if any(thing["category"] == name for thing in row["objects"]):
                shutil.copy(photos / row["file"], folder)
                count += 1
    own = tmp_path / "texts.txt"
    own.write_text("a photo of a {}\n\n{} outdoors\n")
    for templates, texts in (("simple", 7), ("imagenet", 80), (str(own), 2)):
        result = run("eval", "zero-shot", tmp_path / "classes", "-e", aligned, "--templates", templates, "--json", "-q")
        assert result.code == 0, result.err
        about = json.loads(result.out)
        assert len(about["templates"]) == texts
        assert about["classes"] == ["elephant", "traffic light"]
        assert about["images"] == count
        assert about["figures"]["chance"]["top1_micro"] == 0.5
    saved = run("eval", "zero-shot", tmp_path / "classes", "-e", aligned, "-o", tmp_path / "out", "--json", "-q")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(saved.out)
    with Image.open(tmp_path / "out" / "report.png") as picture:
        assert min(picture.size) > 200
    shown = run("eval", "zero-shot", tmp_path / "classes", "-e", aligned, "-q")
    assert shown.out.startswith(f"{count} images of 2 classes, 7 texts a class")
    nowhere = run("eval", "zero-shot", tmp_path / "nowhere", "-e", aligned)
    assert nowhere.code == 1
    assert "nowhere' is not a folder; give one" in nowhere.err
    own.write_text("a photo\n")
    wrong = run("eval", "zero-shot", tmp_path / "classes", "-e", aligned, "--templates", own)
    assert wrong.code == 1
    assert "has no {} for the class name" in wrong.err


# -- what is made is used ----------------------------------------------------------------------------------------------


def test_index_and_search_with_it(
    run: Run, aligned_photos: AlignmentRun, captions: list[dict[str, Any]], photos: Path, tmp_path: Path
) -> None:
    """Photographs that the heads were fitted on are found; the index is brought up to date after it is loaded again."""
    encoder = aligned_photos.folder
    assert encoder is not None
    elephants = [row["file"] for row in captions if any(thing["category"] == "elephant" for thing in row["objects"])]
    others = [row["file"] for row in captions if row["file"] not in elephants][:10]
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in (*elephants, *others):
        shutil.copy(photos / name, folder)
    made = run("index", folder, "--encoder", encoder, "--device", "cpu", "-q")
    assert made.code == 0, made.err
    found = run("search", folder, "an elephant", "-k", "1", "--paths")
    assert Path(found.out.strip()).name in elephants
    assert str(encoder) in run("info", folder).out
    shutil.copy(photos / captions[40]["file"], folder / "another.jpg")
    index = ImageIndex.open(folder, device="cpu")
    assert index.update().added == 1
    assert len(index) == len(elephants) + 11
    hits = index.search(folder / "another.jpg", k=1)
    assert Path(hits[0].path).name == "another.jpg"
