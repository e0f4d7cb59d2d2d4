"""Files and folders that are whole or not there, and checks of arguments."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mmalign.checks import at_least, in_range, one_of
from mmalign.errors import InputError, reason_of
from mmalign.files import save_tensors, sha256_of, whole_file, whole_folder
from mmalign.provenance import libraries


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_appears_at_the_end(tmp_path: Path, durable: bool) -> None:
    target = tmp_path / "new" / "a.txt"
    with whole_file(target, durable=durable) as fresh:
        fresh.write_text("first")
        assert fresh.suffix == ".txt"
        assert not target.exists()
    assert target.read_text() == "first"
    with whole_file(target, durable=durable) as fresh:
        fresh.write_text("second")
        assert target.read_text() == "first"
    assert target.read_text() == "second"
    assert names(target.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failure_leaves_the_earlier_file(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with whole_file(tmp_path / "a.txt") as fresh:
            fresh.write_text("half")
            raise error

    (tmp_path / "a.txt").write_text("before")
    with pytest.raises(error):
        fail()
    assert (tmp_path / "a.txt").read_text() == "before"
    assert names(tmp_path) == ["a.txt"]


def test_the_system_s_errors_are_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"file/a\.txt' cannot be written \(.*\); choose another place"),
        whole_file(tmp_path / "file" / "a.txt") as fresh,
    ):
        fresh.write_text("")
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\); buy a disk"):  # noqa: SIM117
        with whole_file(tmp_path / "a.txt", remedy="buy a disk"):
            raise OSError(28, os.strerror(28))


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    for round_ in ("first", "second"):
        with whole_folder(target) as fresh:
            (fresh / round_).write_text("")
    assert names(target) == ["second"]

    def fail() -> None:
        with whole_folder(target) as fresh:
            (fresh / "third").write_text("")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(target) == ["second"]
    assert names(target.parent) == ["folder"]


def test_tensors_that_others_may_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weight = torch.arange(6.0).view(2, 3).t().requires_grad_()  # neither contiguous nor without a graph
    save_tensors({"weight": weight}, path, {"made_by": "test"})
    torch.testing.assert_close(load_file(path)["weight"], weight.detach())
    assert path.stat().st_mode & 0o777 == 0o644
    notes = {f"note {number}": "ü" * number for number in range(12)}
    written = set()
    for _ in range(6):
        save_tensors({"weight": weight, "other": weight + 1}, path, notes)
        written.add(path.read_bytes())
    assert len(written) == 1, "not in an order of chance"
    with safe_open(path, "pt") as file:
        assert file.metadata() == notes
    torch.testing.assert_close(load_file(path)["other"], weight.detach() + 1)
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_whole_numbers() -> None:
    for fine in (None, 1, 7, np.int64(3), True):
        at_least("n", fine)
    at_least("n", 0, 0)
    for bad, wording in ((0, "n is 0; give 1 or more"), (-2, "n is -2"), (1.5, "whole number"), ("4", "whole number")):
        with pytest.raises(InputError, match=wording):
            at_least("n", bad)  # type: ignore[arg-type]


def test_ranges_and_choices() -> None:
    for fine in (None, 0, 1.0, 0.5):
        in_range("share", fine, 0, 1)
    for bad in (-0.1, 1.1, math.nan, math.inf, "0.5"):
        with pytest.raises(InputError, match="share is"):
            in_range("share", bad, 0, 1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"rate is -1; give 0 or more"):
        in_range("rate", -1, 0)
    one_of("kind", "pairs", ("pairs", "images"))
    with pytest.raises(InputError, match="kind is 'pair'; give one of pairs, images"):
        one_of("kind", "pair", ("pairs", "images"))


def test_reasons_fit_a_message() -> None:
    assert reason_of(RuntimeError("a\n  b\tc")) == "a b c"
    assert reason_of(RuntimeError()) == "RuntimeError"
    assert reason_of(FileNotFoundError(2, "No such file", "x")) == "No such file"
    assert reason_of(ValueError("x\x1b[31m")) == "x\\x1b[31m"
    assert len(reason_of(ValueError("x" * 999))) == 160


def test_versions_of_what_is_installed() -> None:
    found = libraries("numpy", "no-such-distribution")
    assert list(found) == ["mmalign", "torch", "numpy"]
    assert found["numpy"] == np.__version__
