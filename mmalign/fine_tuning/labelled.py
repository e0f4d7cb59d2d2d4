"""Labelled images: one subfolder a class, or a JSON-lines, CSV or TSV file with `file` and `label`."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import InputError, reason_of
from ..pairs import CaptionedImage

__all__ = ["read_labelled"]

_FILE = ("file", "file_name", "image", "path")


def read_labelled(source: str | os.PathLike[str]) -> tuple[list[CaptionedImage], Path]:
    """Images with `label`, and the folder that their files are relative to.

    Args:
        source: a folder whose subfolders are the classes, images at any depth below; or a JSON-lines, CSV or TSV file
            (UTF-8) whose lines have a file (`file`, `file_name`, `image` or `path`) and `label`, and may have `split`
            (train, validation, test) and `group` (images of one stay on one side of a split). Whatever else a line
            has, captions among it, is not looked at; lines of one file agree.

    Raises:
        InputError: missing, a line that is not of that form (numbered), or fewer than two classes.
    """
    path = Path(source)
    images, root = (_class_folders(path), path) if path.is_dir() else (_labelled_lines(path), path.parent)
    classes = len({image.label for image in images})
    if classes < 2:
        wanted = "a folder with a subfolder of images for each class, or a file with `file` and `label` on each line"
        raise InputError(f"{str(path)!r} has {classes} classes of images; give {wanted}")
    return images, root


def _class_folders(root: Path) -> list[CaptionedImage]:
    known = Image.registered_extensions()
    return [
        CaptionedImage(str(path.relative_to(root)), label=place.name)
        for place in sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
        for path in sorted(place.rglob("*"))
        if path.suffix.lower() in known and path.is_file()
    ]


def _labelled_lines(path: Path) -> list[CaptionedImage]:
    images: dict[str, CaptionedImage] = {}
    for number, entry in _entries(path):
        names = entry if isinstance(entry, dict) else {}
        file = next((names[name] for name in _FILE if isinstance(names.get(name), str) and names[name]), None)
        label, split, group = (None if names.get(k) in (None, "") else str(names[k]) for k in
                               ("label", "split", "group"))  # fmt: skip
        if file is None or label is None:
            raise InputError(f"line {number} of {str(path)!r} has no `file` with `label`; mend it")
        image = CaptionedImage(file, split=split, group=group, label=label)
        if images.setdefault(file, image) != image:
            raise InputError(
                f"line {number} of {str(path)!r} gives {file!r} another label, split or group than a line before; make "
                "them agree"
            )
    return list(images.values())


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"labels {str(path)!r} cannot be read ({reason_of(error)}); check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{str(path)!r} is not UTF-8; give a .jsonl, .csv or .tsv file that is") from None
    if path.suffix.lower() in (".csv", ".tsv"):
        header = text.partition("\n")[0]
        separators = "\t,;" if path.suffix.lower() == ".tsv" else ",;\t"
        separator = next((mark for mark in separators if mark in header), ",")
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or ()]
        try:
            yield from ((rows.line_num, row) for row in rows)
        except csv.Error as error:
            raise InputError(f"line {rows.line_num + 1} of {str(path)!r} is no row ({error}); mend it") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                raise InputError(
                    f"line {number} of {str(path)!r} is not JSON; give one object a line, or a table named .csv or .tsv"
                ) from None
