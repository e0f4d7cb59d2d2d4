"""Folders of images as sets of prompts, and detections to them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from mmalign.errors import InputError, reason_of
from mmalign.prefetch import prefetch
from mmalign.progress import progress_bar

from ..data.folder import parse_line
from ..images import read_settings

__all__ = ["ImageSet", "find_images", "read_boxes", "read_faces"]


@dataclass(frozen=True)
class ImageSet:
    """Image files, the prompt (or what stands for it) of each, and what a person should know of how it was found."""

    files: list[Path]
    groups: list[str]
    notes: list[str] = field(default_factory=list)


def find_images(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    workers: int | None = None,
    progress: bool = False,
) -> ImageSet:
    """The images of a folder, at any depth and without hidden ones, or those named; grouped for `measure_diversity`.

    An image that `GeneratedImage.save` wrote belongs to its prompt, another one to the first subfolder on its way, and
    the others are one group.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    if isinstance(source, (str, os.PathLike)):
        root = Path(source)
        if not root.is_dir():
            raise InputError(f"{str(root)!r} is not a folder; give one with images")
        known = Image.registered_extensions()
        relative = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.suffix.lower() in known]
        relative = [path for path in relative if not any(part[0] == "." for part in path.parts)]
        files = [root / path for path in relative if (root / path).is_file()]
        folders = [file.relative_to(root).parts[0] if file.parent != root else "" for file in files]
        if not files:
            raise InputError(f"{str(root)!r} holds no image; give a folder with images")
    else:
        files = [Path(path) for path in source]
        folders = [""] * len(files)
        if not files:
            raise InputError("there are no images; give a folder, or the paths of images")
    prompts: list[str | None] = []
    with progress_bar("reading prompts", len(files), enabled=progress) as advance:
        for _, prompt in prefetch(files, _prompt, ahead=64, workers=workers):
            prompts.append(prompt if isinstance(prompt, str) else None)
            advance()
    notes = []
    without = prompts.count(None)
    if 0 < without < len(files):
        notes.append(
            f"{without:,} of {len(files):,} images carry no prompt, and are grouped by subfolder (first: "
            f"{str(files[prompts.index(None)])!r})"
        )
    groups = [folder if prompt is None else prompt for prompt, folder in zip(prompts, folders, strict=True)]
    return ImageSet(files, groups, notes)


def _prompt(path: Path) -> str | None:
    if path.suffix.lower() != ".png":  # all that `GeneratedImage.save` writes
        return None
    try:
        prompt = read_settings(path).get("prompt")
    except (InputError, AttributeError):  # AttributeError: another program's text under our key
        return None
    return prompt if isinstance(prompt, str) else None


def read_boxes(path: str | os.PathLike[str]) -> dict[str, Float[np.ndarray, "k 4"]]:
    """Detections by absolute path of the image: JSON lines `{"file": ..., "boxes": [[x0, y0, x1, y1], ...]}`.

    `file` is absolute, or relative to the folder of the lines; an empty list says that nothing was found.

    Raises:
        InputError: it cannot be read, or a line (numbered) is not of that form or names a file again.
    """
    source = Path(path)
    found: dict[str, np.ndarray] = {}
    try:
        lines = source.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"detections {str(source)!r} cannot be read ({reason_of(error)}); check the path") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entry = parse_line(line)
        if isinstance(entry, str):
            raise InputError(f"line {number} of {str(source)!r} {entry}; mend it")
        file, boxes = entry.get("file"), entry.get("boxes")
        rows = _rows_of_four(boxes)
        if not isinstance(file, str) or not file or rows is None:
            raise InputError(
                f"line {number} of {str(source)!r} has no file with boxes; give "
                '{"file": "a.png", "boxes": [[x0, y0, x1, y1]]}'
            )
        name = os.path.abspath(source.parent / file)
        if name in found:
            raise InputError(f"line {number} of {str(source)!r} names {file!r} again; put its boxes in one line")
        found[name] = rows
    return found


def read_faces(path: str | os.PathLike[str]) -> Float[np.ndarray, "face dim"]:
    """A `.npy` matrix of face embeddings.

    Raises:
        InputError: it cannot be read as one.
    """
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"faces {os.fspath(path)!r} cannot be read ({reason_of(error)}); give a .npy file with one row a face"
        ) from None
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.kind != "f":
        raise InputError(f"faces {os.fspath(path)!r} are no float matrix; give a .npy file with one row a face")
    return rows


def _rows_of_four(boxes: Any) -> Float[np.ndarray, "k 4"] | None:
    if not isinstance(boxes, list):
        return None
    try:
        rows = np.array(boxes, np.float64).reshape(-1, 4) if not boxes else np.array(boxes, np.float64)
    except (TypeError, ValueError):
        return None
    return rows if rows.ndim == 2 and rows.shape[1] == 4 else None
