"""Captioned and labelled images: files of lines or tables, and folders of classes, read and checked once."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import InputError, reason_of

__all__ = ["CaptionedImage", "class_folders", "read_captioned", "read_images", "read_labelled"]

_FILE = ("file", "file_name", "image", "path")
_CAPTION, _LABEL = ("captions", "caption"), ("label",)
_ABOUT = ("split", "group", "label")
_NAMES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv", "captions.tsv", "metadata.tsv")


@dataclass(frozen=True)
class CaptionedImage:
    """One image with its texts.

    Attributes:
        file: as the line names it, relative to the folder of the lines unless absolute.
        captions: those that are not blank; there may be none.
        split: "train", "validation" or "test", where the line says so.
        group: images of one group stay on one side of a split.
        label: name of its class.
        wrong_captions: texts that are known not to fit it.
        wrong_words: of each of those the part that is wrong; "" where that is not said.
    """

    file: str
    captions: list[str] = field(default_factory=list)
    split: str | None = None
    group: str | None = None
    label: str | None = None
    wrong_captions: list[str] = field(default_factory=list)
    wrong_words: list[str] = field(default_factory=list)


def read_captioned(source: str | os.PathLike[str]) -> tuple[list[CaptionedImage], Path]:
    """Captioned images, and the folder that their files are relative to.

    Args:
        source: a JSON-lines, CSV or TSV file, or a folder that holds one named captions or metadata. A line has a
            file (`file`, `file_name`, `image` or `path`) and `captions` (a list; JSON only) or `caption`, and may have
            `split`, `group` and `label`, and `wrong_captions` with `wrong_words` (lists, or one text each). Lines of
            one file are put together. UTF-8; a table has its columns named in the first line, in any case, and commas,
            semicolons or tabs between them.

    Raises:
        InputError: missing, or a line that is not of that form (numbered), or no caption at all.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in _NAMES if (path / name).is_file()]
        if not found:
            raise InputError(f"folder {str(path)!r} holds none of {', '.join(_NAMES)}; give the file with the captions")
        path = found[0]
    images = _images(path, _CAPTION)
    if not any(image.captions for image in images):
        raise InputError(f"{str(path)!r} holds no caption")
    return images, path.parent


def read_images(source: str | os.PathLike[str]) -> tuple[list[CaptionedImage], Path]:
    """Images with or without captions, and the folder that their files are relative to.

    Args:
        source: as for `read_captioned`, but lines need no captions; or a folder without such a file, of which all
            images are taken, at any depth. Hidden files are passed over, and folders of saved encoders.

    Raises:
        InputError: missing, a line that is not of that form (numbered), or no image.
    """
    path = Path(source)
    if path.is_dir():
        path = next((path / name for name in _NAMES if (path / name).is_file()), path)
    if not path.is_dir():
        return _images(path, _CAPTION, required=False), path.parent
    found = [CaptionedImage(str(file.relative_to(path))) for file in _image_files(path)]
    if not found:
        raise InputError(f"folder {str(path)!r} holds no images; check the path")
    return found, path


def read_labelled(source: str | os.PathLike[str]) -> tuple[list[CaptionedImage], Path]:
    """Images with `label`, and the folder that their files are relative to.

    Args:
        source: a folder whose subfolders are the classes, see `class_folders`; or a file as for `read_captioned`, with
            `label` on each line. Captions are not looked at; lines of one file agree.

    Raises:
        InputError: missing, a line that is not of that form (numbered), or fewer than two classes.
    """
    path = Path(source)
    images, root = (class_folders(path), path) if path.is_dir() else (_images(path, _LABEL), path.parent)
    classes = len({image.label for image in images})
    if classes < 2:
        wanted = "a folder with a subfolder of images for each class, or a file with `file` and `label` on each line"
        raise InputError(f"{str(path)!r} has {classes} classes of images; give {wanted}")
    return images, root


def class_folders(root: Path) -> list[CaptionedImage]:
    """Images at any depth in the subfolders of a folder, labelled by the subfolder's name; hidden ones are no classes.

    Raises:
        InputError: it is not a folder.
    """
    if not root.is_dir():
        raise InputError(f"{str(root)!r} is not a folder; give one with a subfolder of images for each class")
    return [
        CaptionedImage(str(path.relative_to(root)), label=place.name)
        for place in sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
        for path in _image_files(place)
    ]


def _image_files(folder: Path) -> list[Path]:
    """At any depth, in order, by their suffix; not what is hidden, nor the pictures in a saved encoder."""
    known = Image.registered_extensions()
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not (entry / "encoder.json").is_file():
            found += _image_files(entry)
        elif entry.suffix.lower() in known and entry.is_file():
            found.append(entry)
    return found


def _images(path: Path, wanted: Sequence[str], *, required: bool = True) -> list[CaptionedImage]:
    """One for each file that lines name, of which all have, if required, what is wanted: `_CAPTION` or `_LABEL`."""
    images: dict[str, CaptionedImage] = {}
    for number, entry in _entries(path, wanted, required):
        image = _image(entry, wanted, required)
        if image is None:
            names = f" with {' or '.join(f'`{name}`' for name in wanted)}" if required else ""
            raise InputError(f"line {number} of {str(path)!r} has no `file`{names}; mend it")
        for text in (*image.wrong_captions, *image.wrong_words):
            if not isinstance(text, str):
                raise InputError(
                    f"line {number} of {str(path)!r} has {text!r} among its wrong captions and wrong words; give texts"
                )
        if len(image.wrong_captions) != len(image.wrong_words) or not all(map(str.strip, image.wrong_captions)):
            raise InputError(
                f"line {number} of {str(path)!r} has {len(image.wrong_captions)} wrong captions and "
                f"{len(image.wrong_words)} wrong words; give texts, none blank, and one word each or none at all"
            )
        try:
            "".join([*image.captions, *image.wrong_captions, *image.wrong_words, image.label or ""]).encode()
        except UnicodeEncodeError:
            raise InputError(f"line {number} of {str(path)!r} has half a character (a lone \\ud...); mend it") from None
        earlier = images.setdefault(image.file, image)
        if earlier is image:
            continue
        for name in _ABOUT:
            if getattr(earlier, name) != getattr(image, name):
                raise InputError(
                    f"line {number} of {str(path)!r} gives {image.file!r} another {name} than a line before; make them "
                    "agree"
                )
        earlier.captions.extend(image.captions)
        earlier.wrong_captions.extend(image.wrong_captions)
        earlier.wrong_words.extend(image.wrong_words)
    return list(images.values())


def _entries(path: Path, wanted: Sequence[str], required: bool) -> Iterator[tuple[int, Any]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{wanted[-1]}s {str(path)!r} cannot be read ({reason_of(error)}); check the path") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"line {number} of {str(path)!r} is not UTF-8; give a .csv, .tsv or .jsonl file that is saved as UTF-8"
        ) from None
    return _rows(path, text, wanted, required) if path.suffix.lower() in (".csv", ".tsv") else _lines(path, text)


def _lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # Not `splitlines`, which also breaks at separators that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                raise InputError(
                    f"line {number} of {str(path)!r} is not JSON; give one object a line, or a table named .csv or .tsv"
                ) from None


def _rows(path: Path, text: str, wanted: Sequence[str], required: bool) -> Iterator[tuple[int, Any]]:
    """Rows of a table; spreadsheets of some countries write semicolons into a .csv file."""
    header = text.partition("\n")[0]
    separators = "\t,;" if path.suffix.lower() == ".tsv" else ",;\t"
    separator = next((mark for mark in separators if mark in header), ",")
    # Strict: a quote that is never closed would take the rest of the file for one caption.
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or ()]
        _check_columns(path, rows.fieldnames, wanted, required)
        for row in rows:
            beyond = row.pop(None, [])
            if any(cell.strip() for cell in beyond):
                raise InputError(
                    f"line {rows.line_num} of {str(path)!r} has more cells than there are columns; put what holds "
                    f"{separator!r} in double quotes"
                )
            if wanted == _CAPTION and (row.get("captions") or "").startswith("["):
                raise InputError(
                    f"line {rows.line_num} of {str(path)!r} has a list of captions in one cell; give one row a caption"
                )
            if any((cell or "").strip() for cell in row.values()):
                yield rows.line_num, row
    except csv.Error as error:
        raise InputError(
            f"line {rows.line_num + 1} of {str(path)!r} cannot be read ({reason_of(error)}); mend it"
        ) from None


def _check_columns(path: Path, names: Sequence[str], wanted: Sequence[str], required: bool) -> None:
    choices = (_FILE, wanted) if required else (_FILE,)
    if names and not all(any(name in names for name in choice) for choice in choices):
        raise InputError(
            f"{str(path)!r} has the columns {', '.join(map(repr, names))}; name one file (or file_name, image, path)"
            + (f" and one {wanted[-1]}" if required else "")
        )
    if twice := [name for name in (*_FILE, *wanted, *_ABOUT) if names.count(name) > 1]:
        raise InputError(f"{str(path)!r} has two columns {twice[0]!r}; keep one, with one row a {wanted[-1]}")


def _image(entry: Any, wanted: Sequence[str], required: bool) -> CaptionedImage | None:
    try:
        file = next(entry[name] for name in _FILE if entry.get(name))
        captions = []
        if wanted == _CAPTION and (required or any(name in entry for name in wanted)):
            captions = next(entry[name] for name in wanted if name in entry)
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(file, str) or not isinstance(captions, list):
            return None
        captions = [caption for caption in captions if caption.strip()]
        wrong, words = (_texts(entry, name) if wanted == _CAPTION else [] for name in ("wrong_caption", "wrong_word"))
    except (StopIteration, TypeError, AttributeError):
        return None
    about = {name: None if entry.get(name) in (None, "") else str(entry[name]) for name in _ABOUT}
    if wanted != _CAPTION and not about["label"]:
        return None
    return CaptionedImage(file, captions, **about, wrong_captions=wrong, wrong_words=words or [""] * len(wrong))


def _texts(entry: Any, name: str) -> list[Any]:
    """One text or several, under a name or its plural, as they stand there; a blank alone is none."""
    found = entry.get(f"{name}s", entry.get(name))
    texts = found if isinstance(found, list) else [] if found is None else [found]
    return [] if all(isinstance(text, str) and not text.strip() for text in texts) else texts
