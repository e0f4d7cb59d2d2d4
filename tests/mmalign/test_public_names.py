"""Names that `mmalign` imports when they are first used: all are there, and type checkers see the same."""

from __future__ import annotations

import ast
from pathlib import Path

import mmalign


def test_names_for_type_checkers_are_the_public_ones() -> None:
    assert len(set(mmalign.__all__)) == len(mmalign.__all__)
    for name in mmalign.__all__:
        getattr(mmalign, name)
    tree = ast.parse(Path(mmalign.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = [name.name for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert sorted([*seen, "__version__"]) == sorted(mmalign.__all__)
