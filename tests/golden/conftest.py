"""Golden vectors: published mathematics as data, in a folder that can be swapped with `--golden-dir`.

A test claims a file by its marker and gets it from the fixture:

    @pytest.mark.golden("method_name")
    def test_method_name(golden):
        golden.assert_close("case/value", ours(golden["case/input"]))

The test is skipped when the folder has no such file. It must read cases, sizes, hyperparameters and
tolerances from `golden.meta` and the arrays, and it fails at its end if it left an array unread
(`golden.ignore` for those that another test of the same file reads). `test_golden_files.py` fails for a file
that no test claims.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DEFAULT_DIR = Path(__file__).parent / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", default=None, help="folder of golden .json/.npz files to test against")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "golden(name): the test reads the golden file NAME.json and NAME.npz")


@pytest.fixture(scope="session")
def golden_dir(pytestconfig: pytest.Config) -> Path:
    # Not registered when pytest starts from another folder and meets this file only while collecting.
    given = pytestconfig.getoption("golden_dir", None)
    folder = (pytestconfig.invocation_params.dir / given) if given else DEFAULT_DIR
    if not folder.is_dir():
        raise pytest.UsageError(f"--golden-dir {folder} is not a folder")
    return folder


@pytest.fixture
def read_tolerance() -> Callable[..., dict[str, float] | None]:
    return parse_tolerance


@pytest.fixture
def golden(request: pytest.FixtureRequest, golden_dir: Path) -> Iterator[Golden]:
    name = request.node.get_closest_marker("golden").args[0]
    if not any((golden_dir / f"{name}{suffix}").exists() for suffix in (".json", ".npz")):
        pytest.skip(f"{golden_dir} has no {name}")
    file = Golden(golden_dir, name)
    yield file
    unread = sorted(set(file.names) - file.read)
    if unread and not getattr(request.node, "golden_failed", False):
        pytest.fail(f"{name}: no assertion read {', '.join(unread)}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.when == "call" and not report.passed:
        item.golden_failed = True  # type: ignore[attr-defined]


class Golden:
    """One golden file: its description `meta`, its arrays by name, and which of them were read."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.meta: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
            self._arrays = {key: arrays[key] for key in arrays.files}
        self.read: set[str] = set()

    @property
    def names(self) -> list[str]:
        return list(self._arrays)

    @property
    def hyper(self) -> dict[str, Any]:
        return next((self.meta[key] for key in ("hyper", "hyperparameters") if key in self.meta), {})

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> np.ndarray:
        self.read.add(name)
        return self._arrays[name]

    def ignore(self, *names: str) -> None:
        self.read.update(names)

    def tolerance(self, dtype: str = "float64", default: float | None = None) -> dict[str, float]:
        """rtol and atol for a dtype from the json; `default` (both alike) where the json states none."""
        stated = next((self.meta[key] for key in ("tolerance", "suggested_tolerance") if key in self.meta), None)
        found = parse_tolerance(stated, dtype) if stated is not None else None
        if found is None:
            assert default is not None, f"{self.name} states no {dtype} tolerance that can be read: {stated!r}"
            found = {"rtol": default, "atol": default}
        return found

    def assert_close(
        self, name: str, actual: Any, dtype: str = "float64", default: float = 1e-12, where: Any = ...
    ) -> None:
        """Compare with the array `name` (its entries `where`) within the stated tolerance for `dtype`."""
        expected = self[name][where]
        if hasattr(actual, "detach"):
            actual = actual.detach().cpu().numpy()
        actual = np.asarray(actual)
        assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
        np.testing.assert_allclose(actual, expected, err_msg=name, **self.tolerance(dtype, default))


def parse_tolerance(stated: str | float | dict[str, Any], dtype: str) -> dict[str, float] | None:
    """Read "rtol 1e-9, atol 1e-12", "float64 1e-10 absolute, float32 1e-5", {"float64": ...} or a number.

    A number without a word is both rtol and atol. None when nothing is stated for `dtype`; a statement that
    names no dtype holds for float64 only.
    """
    if isinstance(stated, dict):
        if dtype not in stated:
            return None
        return parse_tolerance(f"{dtype} {stated[dtype]}", dtype)
    if isinstance(stated, (int, float)):
        stated = str(stated)
    if stated.strip() == "exact":
        return {"rtol": 0.0, "atol": 0.0}
    other = {"float64": "float32", "float32": "float64"}[dtype]
    clauses = re.split(r";|,(?=\s*float(?:32|64))", stated)
    named = [clause for clause in clauses if dtype in clause]
    if not named and dtype == "float64":
        named = [clause for clause in clauses if other not in clause]
    number = r"(?<![\w.])(\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?![\w/])"
    for clause in named:
        out = {"rtol": 0.0, "atol": 0.0}
        words = {"rtol": r"rtol|rel(?:ative)?", "atol": r"atol|abs(?:olute)?"}
        for key, word in words.items():
            match = re.search(rf"(?:\b(?:{word})\s*{number})|(?:{number}\s*(?:{word})\b)", clause)
            if match:
                out[key] = float(match.group(1) or match.group(2))
        if any(out.values()):
            return out
        match = re.search(number, clause)
        if match:
            return {"rtol": float(match.group(1)), "atol": float(match.group(1))}
    return None
