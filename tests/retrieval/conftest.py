"""The tiny encoder, and a folder of tiny images with its index."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from colour_encoder import ColourEncoder, paint_folder
from crashing import Run, serve
from drawing import draw
from tiny_encoder import TinyEncoder
from upgrade_world import IMAGES, SAMPLE, World

from retrieval import ImageIndex, IndexUpgrade


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Work in a child process that is killed on the way."""
    yield from serve()


@pytest.fixture
def encoder() -> TinyEncoder:
    return TinyEncoder()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images, `00.png` to `11.png` with seeds 0 to 11, the last four in `sub`."""
    root = tmp_path / "photos"
    for number in range(12):
        draw(root / ("sub" if number >= 8 else ".") / f"{number:02}.png", number)
    return root


@pytest.fixture
def index(folder: Path, encoder: TinyEncoder) -> ImageIndex:
    """The index of `folder`; its encoder has been set back to zero."""
    made, _ = ImageIndex.build(folder, encoder=encoder)
    encoder.encoded = 0
    return made


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A temporary folder that `ordinary_user` can reach and owns."""
    path = Path(tempfile.mkdtemp(prefix="mmalign-", dir="/tmp"))
    path.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def measured_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos` with an index of the weak encoder and an upgrade to the strong one measured; `photos.jsonl` beside."""
    where = tmp_path_factory.mktemp("upgrade")
    captions = paint_folder(where / "photos", IMAGES)
    weak, strong = ColourEncoder("weak"), ColourEncoder("strong")
    ImageIndex.build(where / "photos", encoder=weak)
    shutil.copytree(where / "photos", where / "before")
    IndexUpgrade(where / "photos", strong, encoder=weak).measure(captions, sample=SAMPLE)
    return where


@pytest.fixture
def world(measured_once: Path, tmp_path: Path) -> World:
    """Measured."""
    return World(measured_once, tmp_path, "photos")


@pytest.fixture
def fresh(measured_once: Path, tmp_path: Path) -> World:
    """Indexed by the weak encoder, nothing more."""
    return World(measured_once, tmp_path, "before")
