"""`mmalign train` as a person meets it."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from generation.methods import METHODS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, command_line: Run, tmp_path: Path) -> Run:
    """Run `mmalign train` in an empty folder and a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    return functools.partial(command_line, "train")


def refused(result: tuple[int, str, str]) -> str:
    """The one line of an error."""
    code, out, err = result
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("error: ")
    return err


def test_help_names_every_method(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"{method} " in out for method in METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_help_of_a_method_names_every_setting_and_its_default(run: Run, method: str) -> None:
    code, out, err = run(method, "--help")
    assert code == 0
    assert err == ""
    fields = dataclasses.fields(METHODS[method].config_class)
    names = {field.name for field in fields}
    flags = {word.strip("│ ,") for line in out.splitlines() for word in line.replace("/", " ").split()}
    assert {f"--{name.replace('_', '-')}" for name in names - {"data", "output", "progress"}} <= flags
    assert {"data", "output", "--config", "--quiet", "--dry-run"} <= flags
    assert "(default: )" not in out
    assert "(default: None)" not in out
    for field in fields:
        about: object = field.default
        default = about.get_default(call_default_factory=True)  # type: ignore[attr-defined]
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            (line,) = [line for line in out.splitlines() if f" --{field.name.replace('_', '-')} " in line]
            assert f"(default: {default})" in line


def test_help_says_what_the_method_and_its_options_take(run: Run) -> None:
    assert "captioned images with a column `reward` in [0, 1]" in run("rwl", "--help")[1]
    (line,) = [line for line in run("mapo", "--help")[1].splitlines() if " --validation-prompts " in line]
    assert "may repeat" in line


def test_help_fits_a_narrow_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, "80")
    for _ in range(2):  # asking for help leaves the command as it was
        out = run("mapo", "--help")[1]
        assert "…" not in out
        assert "--gradient-checkpointing " in out
        assert run("mapo", "--no-cache")[2].startswith("error: no training data given; say mmalign train mapo DATA")


def test_mistakes_are_told_in_one_line(run: Run, photo_pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("learning_rte: 1e-4\n")
    said = refused(run("mapo", photo_pairs, "out", "--config", "run.yaml"))
    assert "'learning_rte'" in said
    assert "did you mean learning_rate?" in said
    assert "rank is 0" in refused(run("mapo", photo_pairs, "out", "--rank", "0"))
    assert "'cosine'" in refused(run("mapo", photo_pairs, "out", "--lr-schedule", "step"))
    assert "none.yaml" in refused(run("sft", photo_pairs, "out", "-c", "none.yaml"))
    assert "no training data given" in refused(run("mapo"))
    assert "no run folder given" in refused(run("mapo", photo_pairs))
    assert "'nowhere' does not exist" in refused(run("mapo", "nowhere", "out", "--quiet"))
    assert "12gb" in refused(run("mapo", photo_pairs, "out", "--preset", "12gb"))
    assert "pretraining_data" in refused(run("rwl", photo_pairs, "out", "--model", "tiny:sdxl", "-q"))


@pytest.mark.parametrize("arguments", [["mapo", "--rank", "many"], ["mapo", "--no-such-option"], ["ppo"]])
def test_wrong_usage_is_code_2(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert arguments[1 if len(arguments) > 1 else 0] in err


def test_bad_rows_can_be_refused_before_a_model_is_loaded(run: Run, photo_pairs: Path, tmp_path: Path) -> None:
    folder = with_a_bad_row(photo_pairs, tmp_path)
    code, out, err = run("mapo", folder, "out", "--bad-rows", "refuse", "--model", "no/such-model", "--quiet")
    *listed, last = err.splitlines()
    assert code == 1
    assert out == ""
    assert [line for line in listed if "metadata.jsonl line 9" in line and "gone.png" in line]
    assert last.startswith("error: 1 row of ")
    assert "bad_rows" in last
    # Without it, the model is what is missing.
    assert "no/such-model" in run("mapo", folder, "out", "--model", "no/such-model", "--quiet")[2].splitlines()[-1]


def test_a_dry_run_leaves_loras_and_every_setting(run: Run, photo_pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("beta: 0.3\nlearning_rate: 1e-3\nbatch_size: 2\naccumulation: 1\n")
    code, out, err = run(
        "mapo", photo_pairs, "out", "-c", "run.yaml", "--learning-rate", "2e-3", "--dry-run", "--quiet",
        "--device", "cpu", "--adam-betas", "0.8", "0.9", "--targets", "to_q", "--targets", "to_v", "--probe-size", "2",
    )  # fmt: skip
    assert code == 0, err
    exported = [Path(line) for line in out.splitlines()]
    assert len(exported) == 2
    assert all(path.is_relative_to("out/dry-run") for path in exported)
    for path in exported:
        weights = load_file(path)
        assert any(value.any() for name, value in weights.items() if "up" in name or "lora_B" in name)
        assert {part for name in weights for part in ("to_q", "to_k", "to_v", "to_out") if part in name} == {
            "to_q",
            "to_v",
        }
    echoed = yaml.safe_load((tmp_path / "out/dry-run/config.yaml").read_text())
    names = {field.name for field in dataclasses.fields(METHODS["mapo"].config_class)}
    assert set(echoed) == {"method", *names}
    assert (echoed["beta"], echoed["learning_rate"], echoed["adam_betas"]) == (0.3, 2e-3, [0.8, 0.9])
    steps = [json.loads(line) for line in (tmp_path / "out/dry-run/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps] == [0, 1, 2, 3, 4]
    assert "4 steps" in err


def test_a_bad_row_is_left_out_named_and_counted(run: Run, photo_pairs: Path, tmp_path: Path) -> None:
    folder = with_a_bad_row(photo_pairs, tmp_path)
    code, out, err = run(
        "sft", folder, "out", "--dry-run", "-q", "--device", "cpu", "--batch-size", "1", "--accumulation", "1",
        "--probe-size", "0", "--targets", "to_q", "--no-cache",
    )  # fmt: skip
    assert code == 4, err
    assert len(out.splitlines()) == 2
    assert [line for line in err.splitlines() if "left out" in line and "metadata.jsonl line 9" in line]
    assert "1 row was left out" in err
    (entry,) = map(json.loads, (tmp_path / "out/dry-run/left_out_rows.jsonl").read_text().splitlines())
    assert entry["name"] == "metadata.jsonl line 9"
    assert "gone.png" in entry["message"]


def with_a_bad_row(photo_pairs: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    shutil.copytree(photo_pairs, folder)
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"winner": "gone.png", "loser": "0-0.png", "caption": "a lost one"}) + "\n")
    return folder
