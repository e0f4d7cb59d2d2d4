"""`mmalign align --method kernel`, as a person types it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmalign import Encoder, load_encoder
from mmalign.fine_tuning.kernel import report as reporting


@pytest.fixture
def kernel(
    command_line: Callable[..., Any], photos: Path, tiny_clip: Encoder, tiny_timm: Encoder, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:  # fmt: skip
    monkeypatch.setattr(reporting, "_draw", lambda *_: None)
    data = tmp_path / "data.jsonl"
    lines = (photos / "captions.jsonl").read_text(encoding="utf-8").splitlines()[:14]
    rows = [{**json.loads(line), "file": str(photos / json.loads(line)["file"])} for line in lines]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    student, teacher = tiny_clip.save(tmp_path / "student"), tiny_timm.save(tmp_path / "teacher")

    def call(*arguments: str | Path) -> Any:
        return command_line(
            "align", data, "--out", tmp_path / "out", "--method", "kernel", "--image-encoder", student, "--teacher",
            teacher, "--steps", "2", "--batch-size", "6", "--test", "0.3", "--device", "cpu", "--workers", "1",
            *arguments,
        )  # fmt: skip

    return call


def test_what_is_printed_and_made(
    kernel: Callable[..., Any], tiny_clip: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    done = kernel("--set", "adaptation=lora", "--set", "rank=2", "--set", "learning_rate=0.001")
    assert done.code == 0
    assert "kernel error, all pairs" in done.out
    for name in ("same texts", "align", "reg"):
        assert re.search(rf"{name} \d", done.err), name
    assert "text to image" in done.out
    assert f"mmalign index FOLDER --encoder {tmp_path / 'out'}" in done.err
    made = load_encoder(tmp_path / "out", device="cpu")
    assert made.fingerprint != tiny_clip.fingerprint
    again = kernel("--set", "adaptation=lora", "--set", "rank=2", "--set", "learning_rate=0.001", "--json", "--quiet")
    found = json.loads(again.out)
    assert found["settings"]["rank"] == 2
    assert found["settings"]["learning_rate"] == 0.001
    assert found["settings"]["steps"] == 2
    assert found["counts"]["training"] + found["counts"]["test"] == 14


def test_images_that_cannot_be_read_are_told(kernel: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with (tmp_path / "data.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"file": "broken.jpg"}) + "\n")
    done = kernel("--quiet")
    assert done.code == 4
    assert re.search(r"note: 1 images could not be read and are left out \(first: '.*broken.jpg'\)", done.err)
    assert (tmp_path / "out" / "encoder.json").is_file()


def test_what_is_refused(kernel: Callable[..., Any], command_line: Callable[..., Any], tmp_path: Path) -> None:
    for arguments, message in (
        (["--text-encoder", "bundled:text", "--dim", "3"], "--text-encoder, --dim: of no effect with --method kernel"),
        (["--set", "alpha=3"], "names no option of kernel; give name=value of kernel, degree, offset"),
        (["--set", "precision=float16"], "has no value for precision"),
        (["--set", "teacher_view=none"], "has no value for teacher_view"),
        (["--set", "steps=3"], "steps is given twice"),
        (["--set", "weight=0"], "weight is 0"),
    ):
        done = kernel(*arguments)
        assert done.code == 1
        assert message in done.err
    done = command_line("align", tmp_path, "--out", tmp_path / "x", "--method", "kernel")
    assert done.code == 1
    assert "give DATA (a folder of images) and --image-encoder" in done.err
    done = command_line("align", tmp_path, "--out", tmp_path / "x", "--teacher", "bundled:image")
    assert done.code == 1
    assert "--teacher is for --method kernel" in done.err
    done = command_line("align", tmp_path, "--out", tmp_path / "x", "--method", "kernel", "--image-encoder", "bundled")
    assert done.code == 1  # the default teacher's weights are not on this machine
    assert "dinov2" in done.err
