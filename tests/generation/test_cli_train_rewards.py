"""`mmalign train` on rewards: a dry run from the command line, what it says, and mistakes in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from generation.prompts import read_prompts
from mmalign.errors import InputError


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red dog\n\n  a blue boat  \na small cup\n", encoding="utf-8")
    return file


def test_a_dry_run_needs_no_weights_and_tells_what_became_of_rewards(
    command_line: Callable[..., Any], prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    code, out, err = command_line(
        "train", "refl", prompts, output, "--reward", "hps-v2.1", "--device", "cpu", "--dry-run"
    )
    assert code == 0, err
    assert out.splitlines() == [str(output / "dry-run" / "export" / name) for name in FILES]
    assert "reward ['redness'] instead of ['hps-v2.1']" in err
    for name in ("reward", "jpeg-incompressibility", "tonal variation"):
        assert f"probe: {name} " in err
    saved = yaml.safe_load((output / "dry-run" / "config.yaml").read_text(encoding="utf-8"))
    assert (saved["gradient_steps"], saved["reward_input"], saved["guidance"]) == ("one", "estimate", 1.0)
    assert list((output / "dry-run" / "samples").glob("probe-*.png"))


FILES = ("pytorch_lora_weights.safetensors", "dry-run.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no reward given; set reward (--reward)"),
        (["--reward", "hsp-v2.1"], "did you mean"),
        (["--reward", "jpeg-compressibility", "--held-out-reward", "redness"], "has no gradient"),
        (["--reward", "redness", "--held-out-reward", "redness"], "the one that is trained on"),
        (["--reward", "redness", "--held-out-reward", "clipscore"], "cosine:bundled"),
        (["--reward", "redness", "--gradient-steps", "last:99"], "needs 99 steps and a run has 50"),
    ],
)
def test_mistakes_are_told_in_one_line(
    command_line: Callable[..., Any], prompts: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    code, out, err = command_line(
        "train", "alignprop", prompts, tmp_path / "run", "--model", "tiny:sdxl", "--device", "cpu", "-q", *options
    )
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_prompts_that_are_not_there(command_line: Callable[..., Any], tmp_path: Path) -> None:
    code, _, err = command_line("train", "draft", tmp_path / "none.txt", tmp_path / "run", "--reward", "redness", "-q")
    assert code == 1
    assert "none.txt cannot be read" in err


def test_prompts_are_read_from_lines_and_from_json(prompts: Path, tmp_path: Path) -> None:
    assert read_prompts(prompts) == ["a red dog", "a blue boat", "a small cup"]
    prompts.write_bytes("a red\u2028dog\r\na\x0bboat\n".encode())
    assert read_prompts(prompts) == ["a red\u2028dog", "a\x0bboat"]
    prompts.write_bytes(b"")
    assert read_prompts(prompts) == []
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"prompt": "a"}\n\n{"caption": " b "}\n{"captions": ["c", "d"]}\n', encoding="utf-8")
    assert read_prompts(lines) == ["a", "b", "c"]
    lines.write_bytes('{"captions": "a dog"}\r\n{"prompt": "a\u2028b\u0085c"}\r\n'.encode())
    assert read_prompts(lines) == ["a dog", "a\u2028b\u0085c"]
    for text, message in (
        ('{"prompt": "a"}\n{"text": 1}', "line 2 has no text"),
        ('{"captions": 5}', "line 1 has no text"),
        ('{"captions": []}', "line 1 has no text"),
        ('{"captions": {"en": "a"}}', "line 1 has no text"),
        ("a", "line 1 is not JSON"),
    ):
        lines.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_prompts(lines)
    prompts.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_prompts(prompts)
