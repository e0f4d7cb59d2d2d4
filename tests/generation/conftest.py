"""Tiny pipelines, shared by the session: treat them as read-only."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from generation.data import CheckedData
    from generation.training.encoding import LatentEncoder, PromptEncoder


@pytest.fixture(autouse=True)
def tiny_pipelines_built_once(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """`tiny:sdxl` and the like give a copy of one that was built before: building takes a third of a second.

    So do the tests' own calls, except for those in the tests of `tiny_pipeline` itself.
    """
    monkeypatch.setattr("generation.pipelines.tiny_pipeline", _copied)
    if hasattr(request.module, "tiny_pipeline") and not request.module.__name__.endswith("test_tiny"):
        monkeypatch.setattr(request.module, "tiny_pipeline", _copied)


def _copied(family: str = "sdxl", **options: Any) -> Any:
    return copy.deepcopy(_built(family, **options))


@functools.cache
def _built(family: str, **options: Any) -> Any:
    from generation import tiny_pipeline

    return tiny_pipeline(family, **options)


@pytest.fixture
def curves() -> None:
    """Ask for this to have the test's runs draw their curves."""


@pytest.fixture(autouse=True)
def curves_only_where_asked_for(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Drawing takes as long as a tiny run of a few steps."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr("generation.training.trainer.draw_curves", lambda metrics, path, panels: path)


@pytest.fixture(scope="session")
def tiny_sdxl() -> Any:
    from generation import tiny_pipeline

    return tiny_pipeline("sdxl")


@pytest.fixture(scope="session")
def tiny_sd15() -> Any:
    from generation import tiny_pipeline

    return tiny_pipeline("sd15")


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tiny_sdxl: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pipeline as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("tiny-sdxl")
    tiny_sdxl.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checked_pairs(photo_pairs: Path) -> CheckedData:
    """`photo_pairs`, checked."""
    from generation.data import check_data

    return check_data(photo_pairs, progress=False)


@pytest.fixture(scope="session")
def latent_encoder(tiny_sdxl: Any) -> LatentEncoder:
    import torch

    from generation.training.encoding import LatentEncoder

    return LatentEncoder(tiny_sdxl.vae, torch.device("cpu"))


@pytest.fixture(scope="session")
def prompt_encoder(tiny_sdxl: Any) -> PromptEncoder:
    import torch

    from generation.training.encoding import PromptEncoder

    return PromptEncoder(tiny_sdxl, torch.device("cpu"))
