"""What the tests of the retrieval package share: tiny images, comparisons, clustered vectors, an ordinary user."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from retrieval import Hit, ImageIndex


def draw(path: Path | bytes | str, seed: int, size: tuple[int, int] = (8, 8)) -> Path:
    """A PNG of random blocks, different for every seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    target = Path(os.fsdecode(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(blocks)
    with open(path, "wb") as file:
        (image if size == (8, 8) else image.resize(size, Image.Resampling.NEAREST)).save(file, "PNG")
    return target


def content(index: ImageIndex) -> dict[str, tuple[str, int, np.ndarray]]:
    """What an index holds, by path: hash, size and vector; ids and row numbers left out."""
    return {
        os.fsdecode(item.path): (item.sha256, item.size, index.vectors.gather(np.array([item.row]))[0])
        for item in index
    }


def same_content(one: ImageIndex, other: ImageIndex) -> None:
    """Assert that two indexes hold the same files with the same vectors."""
    left, right = content(one), content(other)
    assert sorted(left) == sorted(right)
    for path in left:
        assert left[path][:2] == right[path][:2], path
        np.testing.assert_allclose(left[path][2], right[path][2], atol=1e-6, err_msg=path)


def names(hits: list[Hit]) -> list[str]:
    return [hit.item.name for hit in hits]


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def clustered(rows: int, dim: int, clusters: int = 200, noise: float = 0.7, seed: int = 0) -> np.ndarray:
    """Unit rows around centres that are the same for every seed; row i belongs to centre i % clusters."""
    centres = unit(np.random.default_rng(99).standard_normal((clusters, dim)))
    random = np.random.default_rng(seed)
    return unit(centres[np.arange(rows) % clusters] + noise * random.standard_normal((rows, dim)) / np.sqrt(dim))


@contextmanager
def ordinary_user() -> Iterator[None]:
    """File permissions hold in here, even if root runs the tests."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
