"""A drawn image with everything needed to draw it again, and its PNG."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from mmalign.errors import InputError, reason_of
from mmalign.files import whole_file

__all__ = ["GeneratedImage", "read_settings", "refuse_folder", "saved_or_free"]

_KEY = "mmalign"


@dataclass(frozen=True)
class GeneratedImage:
    """An image and what it was made from.

    Attributes:
        image: RGB.
        prompt: what was asked for.
        seed: of its noise.
        settings: model, unet (if another), fingerprints of their weights and of the scheduler's settings, adapters,
            negative_prompt, steps, guidance_scale, width, height, scheduler, dtype and versions of the libraries; only
            values that JSON has. `generation.generate_again` draws by them.
        path: where it was saved, if it was.
    """

    image: Image.Image
    prompt: str
    seed: int
    settings: dict[str, Any]
    path: Path | None = None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a PNG that carries prompt, seed and settings (see `read_settings`); whole or not at all.

        Raises:
            InputError: the name does not end in .png, or the place cannot be written to.
        """
        target = Path(path)
        if target.suffix.lower() != ".png":
            raise InputError(f"{target} should end in .png, which can carry the settings")
        text = PngImagePlugin.PngInfo()
        text.add_itxt(_KEY, json.dumps({"prompt": self.prompt, "seed": self.seed, **self.settings}, ensure_ascii=False))
        with whole_file(target) as path:
            self.image.save(path, pnginfo=text)
        return target

    def to_dict(self) -> dict[str, Any]:
        """Path, prompt, seed and settings, for JSON."""
        path = None if self.path is None else os.fspath(self.path)
        return {"path": path, "prompt": self.prompt, "seed": self.seed, "settings": self.settings}


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Prompt, seed and settings of an image that `GeneratedImage.save` wrote.

    Raises:
        InputError: the file is missing, no image, or carries no settings.
    """
    try:
        with Image.open(path) as image:
            image.load()  # text may follow the pixels
            text = getattr(image, "text", {}).get(_KEY)
        return json.loads(text) if text is not None else _refuse(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give an image that mmalign saved") from None
    except (OSError, SyntaxError, UnidentifiedImageError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as an image with settings ({reason_of(error)}); give one that mmalign saved"
        ) from None


def saved_or_free(folder: Path, number: int, prompt: str, seed: int, settings: Mapping[str, Any]) -> tuple[Path, bool]:
    """The file for an image, and whether it is there already, whole and with equal settings.

    A file of the same name with other settings is someone's picture: the next free name is taken.
    """
    words = re.sub(r"[^\w]+", "-", unicodedata.normalize("NFC", prompt).lower()).strip("-")
    stem = f"{number:04d}-{seed}-{words[:40].strip('-') or 'blank'}"
    wanted = {"prompt": prompt, "seed": seed, **settings}
    copy = 1
    while True:
        path = folder / (f"{stem}.png" if copy == 1 else f"{stem}-{copy}.png")
        if not os.path.lexists(path):
            return path, False
        try:
            if read_settings(path) == wanted:
                return path, True
        except InputError:
            pass
        copy += 1


def refuse_folder(folder: Path) -> None:
    """Find before anything is drawn that images cannot be saved in a folder, which need not exist yet.

    Raises:
        InputError: it is a file, below a file, or not to be written to.
    """
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{folder} cannot be a folder, as {place} is a file; choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written to (no permission in {place}); choose another place")


def _refuse(path: str | os.PathLike[str]) -> dict[str, Any]:
    raise InputError(f"{path} carries no settings; only images saved by mmalign do")
