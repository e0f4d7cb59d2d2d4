"""Tiny pipelines, shared by the session: treat them as read-only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


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
