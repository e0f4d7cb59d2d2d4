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
def tiny_pipelines_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tiny:sdxl` and the like give a copy of one that was built before: building takes a third of a second."""
    monkeypatch.setattr("generation.pipelines.tiny_pipeline", lambda family: copy.deepcopy(_built(family)))


@functools.cache
def _built(family: str) -> Any:
    from generation import tiny_pipeline

    return tiny_pipeline(family)


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
