"""The folder of golden files and the tests that claim them fit together."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest


def claimed_names() -> set[str]:
    """Names in `@pytest.mark.golden("name")` on the test functions here that take the fixture."""
    names = set()
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or "golden" not in [a.arg for a in node.args.args]:
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.golden":
                    names.add(ast.literal_eval(mark.args[0]))
    return names


def stems(folder: Path, *suffixes: str) -> set[str]:
    return {path.stem for path in folder.iterdir() if path.suffix in suffixes}


def test_every_file_has_a_test(golden_dir: Path) -> None:
    present = stems(golden_dir, ".json", ".npz")
    assert present, f"{golden_dir} holds no golden file"
    unclaimed = present - claimed_names()
    assert not unclaimed, f"no test is marked golden(...) for {', '.join(sorted(unclaimed))}"


def test_every_file_is_a_pair(golden_dir: Path) -> None:
    assert stems(golden_dir, ".json") == stems(golden_dir, ".npz")


@pytest.mark.parametrize(
    ("stated", "dtype", "expected"),
    [
        ("1e-12", "float64", (1e-12, 1e-12)),
        ("1e-12", "float32", None),
        (1e-9, "float64", (1e-9, 1e-9)),
        ("exact", "float64", (0, 0)),
        ("1e-12 absolute", "float64", (0, 1e-12)),
        ("rtol 1e-10 float64", "float64", (1e-10, 0)),
        ("float64 1e-9 relative, float32 1e-4 relative", "float32", (1e-4, 0)),
        ("float64 1e-10 absolute, float32 1e-5 absolute", "float64", (0, 1e-10)),
        ("rtol 1e-9 in float64 with the stored values; rtol 1e-3 in float32", "float32", (1e-3, 0)),
        ({"float64": "rtol 1e-9, atol 1e-12", "float32": "rtol 1e-4, atol 1e-7"}, "float64", (1e-9, 1e-12)),
        ({"float64": "rtol 1e-9, atol 1e-12", "float32": "rtol 1e-4, atol 1e-7"}, "float32", (1e-4, 1e-7)),
        ("float64: rtol 1e-7; float32: rtol 2e-4 on z (1000x amplification)", "float32", (2e-4, 0)),
    ],
)
def test_tolerances_are_read(
    read_tolerance: Callable[..., dict[str, float] | None],
    stated: object,
    dtype: str,
    expected: tuple[float, float] | None,
) -> None:
    wanted = None if expected is None else {"rtol": expected[0], "atol": expected[1]}
    assert read_tolerance(stated, dtype) == wanted
