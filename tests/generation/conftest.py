"""Tiny pipelines, shared by the session: treat them as read-only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from generation.data import CheckedData
    from generation.training.encoding import LatentEncoder, PromptEncoder


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
def photo_pairs(photos: Path, captions: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of eight pairs of photographs of at most 160 px with `metadata.jsonl`; copy it before changing it.

    Wide, tall and square ones; in pairs 1, 3, 5, 7 image 1 wins, and its shape is another than image 0's.
    """
    from PIL import Image

    folder = tmp_path_factory.mktemp("photo-pairs")
    sizes = [(160, 120), (96, 144), (128, 128), (160, 80)]
    lines = []
    for pair in range(8):
        names = [f"{pair}-0.png", f"{pair}-1.png"]
        for side, name in enumerate(names):
            with Image.open(photos / captions[pair + 8 * side]["file"]) as image:
                image.convert("RGB").resize(sizes[(pair + side) % 4], Image.Resampling.BICUBIC).save(folder / name)
        caption = captions[pair]["captions"][0]
        lines.append({"jpg_0": names[0], "jpg_1": names[1], "label_0": 1 - pair % 2, "caption": caption})
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
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
