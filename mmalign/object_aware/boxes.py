"""Boxes of objects: checked, chosen, and read from files; and what every `Detector` is.

A box is x0 y0 x1 y1 in pixels of the upright image as `mmalign.imaging.read_image` gives it, (0, 0) its upper left
corner and (width, height) its lower right one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ..checks import at_least
from ..errors import InputError, UnreadableImageError, reason_of
from ..imaging import FileContent, read_file, read_image

__all__ = ["BoxesFile", "Detections", "Detector", "checked_boxes", "choose_boxes", "read_boxes"]

SMALL = 0.1  # of the image's area; the methods card's size bin of small objects

_FILE = ("file", "file_name", "image", "path")
_FORMS = (
    'give lines of {"file": NAME, "boxes": [[x0, y0, x1, y1], ...]}, one object of NAME: [[x0, y0, x1, y1], ...], or '
    "COCO's JSON with `images` and `annotations`"
)


@dataclass(frozen=True, eq=False)
class Detections:
    """Boxes found in one image.

    Attributes:
        boxes: x0 y0 x1 y1 in pixels of the image.
        scores: how sure the detector is, in [0, 1]; 1 for boxes that were given.
        labels: what is seen there; "" where nothing is said.
    """

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def none(cls) -> Detections:
        """Of an image in which nothing was found."""
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), ())

    def within(self, image_size: tuple[int, int], where: str = "boxes") -> Detections:
        """Clipped to an image of (width, height); boxes of which nothing is left are dropped.

        Raises:
            InputError: as `checked_boxes`.
        """
        boxes, kept = _clipped(_rows(self.boxes, where), image_size)
        labels = tuple(label for label, keep in zip(self.labels, kept, strict=True) if keep)
        return Detections(boxes[kept], self.scores[kept].astype(np.float32), labels)


class Detector(ABC):
    """Finds objects in images.

    Attributes:
        spec: what `load_detector` was given.
        open_vocabulary: whether it looks for the phrases that it is given.
        needs_phrases: whether it finds nothing without them.
    """

    spec: str
    open_vocabulary: bool = False
    needs_phrases: bool = False

    @property
    @abstractmethod
    def digest(self) -> str:
        """Hex digest of all that decides which boxes are found in a given image: weights and settings."""

    @abstractmethod
    def detect(self, image: Any, *, content: bytes | None = None, phrases: Sequence[str] = ()) -> Detections:
        """Find objects in one image; safe to call from many threads.

        Args:
            image: uint8 tensor 3 height width, Pillow image, or what else `mmalign.imaging.read_image` takes.
            content: bytes of the file that the image was read from, where there is one.
            phrases: what to look for; only a detector of open vocabulary heeds them.

        Returns:
            Boxes within the image, the surest first.

        Raises:
            InputError: the detector needs phrases, or the file's content, and has none.
            UnreadableImageError: a file cannot be read.
        """


class BoxesFile(Detector):
    """Boxes that were given, by an annotator or another program, found by the content of the image's file.

    An image that the file does not name has no boxes, and is treated as by the plain model.

    Attributes:
        images: folder that its names are relative to, where that is not the folder of the file.
    """

    def __init__(
        self,
        boxes: Mapping[str, Detections],
        spec: str,
        missing: tuple[str, ...] = (),
        *,
        images: str | None = None,
        named: int | None = None,
    ) -> None:
        """Takes boxes by hexadecimal SHA-256 of the image's file; how many names they had, their number by default."""
        self.spec, self.images = spec, images
        self._missing = missing
        self._named = len(boxes) + len(missing) if named is None else named
        self._boxes = dict(boxes)

    def __len__(self) -> int:
        return len(self._boxes)

    def __contains__(self, sha256: str) -> bool:
        """Whether the image of that content is named, with boxes or without."""
        return sha256 in self._boxes

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of images that were not there when the file was read."""
        return self._missing

    @property
    def named(self) -> int:
        """How many names of images there are in all."""
        return self._named

    def note_of_missing(self) -> str | None:
        """One line on names of which no image was there, as mistyped ones are; `None` where all were."""
        if not self.missing:
            return None
        return (
            f"{len(self.missing):,} of {self.named:,} images that {self.spec!r} names are not there "
            f"(first: {self.missing[0]!r})"
        )

    @property
    def digest(self) -> str:
        """The same for all boxes files.

        Boxes are input here, as the pixels are: a second file with the boxes of newly added images must not make the
        vectors of the old ones those of another encoder.
        """
        return hashlib.sha256(b"boxes that were given").hexdigest()

    def detect(self, image: Any, *, content: bytes | None = None, phrases: Sequence[str] = ()) -> Detections:
        """The boxes of that content; none for a content that the file does not name."""
        key = None if content is None else hashlib.sha256(content).hexdigest()
        if isinstance(image, (str, os.PathLike)):
            image = read_file(image)
        if key is None and isinstance(image, FileContent):
            key = image.sha256
        elif key is None and isinstance(image, bytes):
            key = hashlib.sha256(image).hexdigest()
        if key is None:
            raise InputError(
                f"boxes of {self.spec!r} are found by the content of image files, and this image is a "
                f"{type(image).__name__} without one; give its path, or `content`, the bytes of its file"
            )
        found = self._boxes.get(key)
        if found is None:
            return Detections.none()
        pixels = image if getattr(image, "ndim", 0) == 3 else read_image(image).pixels
        height, width = pixels.shape[-2:]
        found = found.within((width, height), self.spec)
        order = np.argsort(-found.scores, kind="stable")
        return Detections(found.boxes[order], found.scores[order], tuple(found.labels[place] for place in order))


def checked_boxes(boxes: Any, image_size: tuple[int, int], where: str = "boxes") -> Float[np.ndarray, "n 4"]:
    """Boxes as float32, clipped to the image; those of which nothing is left are dropped.

    Args:
        boxes: rows x0 y0 x1 y1 in pixels: array, tensor or list, `[]` for none.
        image_size: (width, height).
        where: what messages call them.

    Raises:
        InputError: they are not rows of four finite numbers, or x1 < x0 or y1 < y0.
    """
    rows, kept = _clipped(_rows(boxes, where), image_size)
    return rows[kept]


def choose_boxes(
    detections: Detections, image_size: tuple[int, int], max_objects: int = 5
) -> Float[np.ndarray, "chosen 4"]:
    """At most `max_objects` boxes: those under a tenth of the image first, then by score.

    Attention overlooks small objects, and with many boxes each gets but its share of the strength.

    Raises:
        InputError: as `checked_boxes`, or `max_objects` is below 1.
    """
    at_least("max_objects", max_objects)
    found = detections.within(image_size)
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    large = sides.prod(axis=1) >= SMALL * image_size[0] * image_size[1]
    return found.boxes[np.lexsort((-found.scores, large))[:max_objects]]


def read_boxes(path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None) -> BoxesFile:
    """Read boxes of image files; each image is read once, for its SHA-256.

    Args:
        path: JSON lines, or JSON (one object, a list of them, or an object of NAME: boxes). An object has a file
            (`file`, `file_name`, `image` or `path`) and `boxes`, rows x0 y0 x1 y1 with `scores` and `labels` where
            there are some; or `objects`, a list of {"bbox": [x, y, width, height], "category": NAME}. Or COCO's JSON;
            its crowds are left out, as such a box holds many objects. Boxes of one file are put together.
        images: folder that names are relative to; that of `path` by default.

    Raises:
        InputError: not of such a form, none of the images is there, or boxes that are none.
    """
    path = Path(path)
    root = Path(images) if images is not None else path.parent
    if not root.is_dir():
        raise InputError(f"images {str(root)!r} is not a folder; give the one that the names in {str(path)!r} are of")
    named: dict[str, list[Detections]] = {}
    for where, name, found in _entries(path):
        _rows(found.boxes, where)
        named.setdefault(name, []).append(found)
    if not named:
        raise InputError(f"{str(path)!r} names no image; {_FORMS}")
    by_content: dict[str, list[Detections]] = {}
    missing: list[str] = []
    for name, parts in named.items():
        try:
            by_content.setdefault(read_file(root / name).sha256, []).extend(parts)
        except UnreadableImageError as error:
            if error.reason != "missing":
                raise InputError(f"{str(path)!r} names an image that cannot be read: {error}") from None
            missing.append(name)
    if not by_content:
        raise InputError(
            f"none of the {len(named):,} images that {str(path)!r} names are in {str(root)!r} (first: {missing[0]!r}); "
            "give the folder of the images"
        )
    return BoxesFile(
        {key: _together(parts) for key, parts in by_content.items()},
        os.fspath(path),
        tuple(missing),
        images=None if images is None else os.path.abspath(images),
        named=len(named),
    )


def _rows(boxes: Any, where: str) -> Float[np.ndarray, "n 4"]:
    """Rows of four finite numbers, upper left corner first."""
    if hasattr(boxes, "detach"):
        boxes = boxes.detach().cpu()
    try:
        rows = np.asarray(boxes, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: boxes are no table of numbers; give rows of x0, y0, x1, y1") from None
    if rows.size == 0:
        return np.zeros((0, 4), np.float32)
    if rows.ndim != 2 or rows.shape[1] != 4:
        raise InputError(f"{where}: boxes have shape {rows.shape}; give rows of x0, y0, x1, y1")
    for place, row in enumerate(rows):
        shown = [float(f"{value:.6g}") for value in row]
        if not np.isfinite(row).all():
            raise InputError(f"{where}: box {place} is {shown}; give finite numbers")
        if row[2] < row[0] or row[3] < row[1]:
            raise InputError(
                f"{where}: box {place} is {shown}, its right or lower side before the other; give x0, y0, x1, y1 in "
                "pixels (not width and height)"
            )
    return rows


def _clipped(
    rows: Float[np.ndarray, "n 4"], image_size: tuple[int, int]
) -> tuple[Float[np.ndarray, "n 4"], Bool[np.ndarray, " n"]]:
    """Boxes within the image, and which of them have an area left."""
    width, height = image_size
    clipped = np.clip(rows, 0, np.array([width, height, width, height], np.float32))
    return clipped, (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])


def _together(parts: Sequence[Detections]) -> Detections:
    """All boxes; what is there twice, as under two names of one image, once."""
    seen: dict[tuple[Any, ...], float] = {}
    for part in parts:
        for box, score, label in zip(part.boxes.tolist(), part.scores.tolist(), part.labels, strict=True):
            key = (*box, label)
            seen[key] = max(score, seen.get(key, score))
    if not seen:
        return Detections.none()
    boxes = np.array([key[:4] for key in seen], np.float32)
    return Detections(boxes, np.array([*seen.values()], np.float32), tuple(key[4] for key in seen))


# -- what files say ----------------------------------------------------------------------------------------------------


def _entries(path: Path) -> Iterator[tuple[str, str, Detections]]:
    """Where an entry stands, the image it names, and the boxes of that."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"boxes {str(path)!r} cannot be read ({reason_of(error)}); check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"boxes {str(path)!r} are not UTF-8; {_FORMS}") from None
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"line {number} of {str(path)!r}"
                yield _entry(_parsed(line, where), where)
        return
    if isinstance(whole, Mapping) and "images" in whole and "annotations" in whole:
        yield from _coco(whole, path)
    elif isinstance(whole, list):
        for number, entry in enumerate(whole, 1):
            where = f"entry {number} of {str(path)!r}"
            yield _entry(entry, where)
    elif isinstance(whole, Mapping) and not any(isinstance(whole.get(name), str) for name in _FILE):
        for name, boxes in whole.items():
            where = f"{name!r} in {str(path)!r}"
            yield where, name, _detections({"boxes": boxes}, where)
    else:
        yield _entry(whole, repr(str(path)))


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where} is not JSON; {_FORMS}") from None


def _entry(entry: Any, where: str) -> tuple[str, str, Detections]:
    name = next((entry[key] for key in _FILE if entry.get(key)), None) if isinstance(entry, Mapping) else None
    if not isinstance(name, str) or not ("boxes" in entry or "objects" in entry):
        raise InputError(f"{where} has no `file` with `boxes` or `objects`; {_FORMS}")
    return where, name, _detections(entry, where)


def _detections(entry: Mapping[str, Any], where: str) -> Detections:
    if "boxes" in entry:
        boxes = _rows(entry["boxes"] if entry["boxes"] is not None else [], where)
        scores, labels = entry.get("scores"), entry.get("labels")
    else:
        objects = entry["objects"] if entry["objects"] is not None else []
        if not isinstance(objects, list) or not all(isinstance(one, Mapping) and "bbox" in one for one in objects):
            raise InputError(f"{where}: `objects` is no list of objects with `bbox`; {_FORMS}")
        boxes = _corners([one["bbox"] for one in objects], where)
        labels, scores = [one.get("category", "") for one in objects], [one.get("score", 1.0) for one in objects]
    labels = [""] * len(boxes) if labels is None else labels
    scores = [1.0] * len(boxes) if scores is None else scores
    for name, values in (("scores", scores), ("labels", labels)):
        if not isinstance(values, list) or len(values) != len(boxes):
            count = len(values) if isinstance(values, list) else repr(values)
            raise InputError(f"{where}: {len(boxes)} boxes and {count} {name}; give one a box, or leave them out")
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise InputError(f"{where}: a score is {score!r}; give a finite number")
    return Detections(boxes, np.array(scores, np.float32), tuple(str(label) for label in labels))


def _corners(boxes: Any, where: str) -> Float[np.ndarray, "n 4"]:
    """COCO's x, y, width, height as corners."""
    try:
        rows = np.asarray(boxes, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: a `bbox` is no list of numbers; give x, y, width, height") from None
    if rows.size == 0:
        return np.zeros((0, 4), np.float32)
    if rows.ndim != 2 or rows.shape[1] != 4:
        raise InputError(f"{where}: `bbox` has shape {rows.shape[1:]}; give x, y, width, height")
    bad = ~np.isfinite(rows).all(axis=1) | (rows[:, 2:] < 0).any(axis=1)
    if bad.any():
        shown = rows[bad][0].tolist()
        raise InputError(f"{where}: `bbox` is {shown}; give finite x, y, width, height, no side below 0")
    return np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:]], axis=1).astype(np.float32)


def _coco(whole: Mapping[str, Any], path: Path) -> Iterator[tuple[str, str, Detections]]:
    """Images of COCO's JSON, those without annotations too."""
    try:
        numbers = Counter(image["id"] for image in whole["images"])
        names = {image["id"]: image["file_name"] for image in whole["images"]}
        categories = {one["id"]: str(one["name"]) for one in whole.get("categories", [])}
        by_image: dict[Any, list[dict[str, Any]]] = {number: [] for number in names}
        for one in whole["annotations"]:
            if not one.get("iscrowd"):
                kind = one.get("category_id")
                label = categories.get(kind, "" if kind is None else str(kind))
                about = {"bbox": one["bbox"], "category": label, "score": one.get("score", 1.0)}
                by_image[one["image_id"]].append(about)
    except KeyError as error:
        raise InputError(
            f"{str(path)!r} is not COCO's JSON: {error} is missing; give `images` with `id` and `file_name`, and "
            "`annotations` with `image_id` (of an image there) and `bbox`"
        ) from None
    except (TypeError, AttributeError):
        raise InputError(
            f"{str(path)!r} is not COCO's JSON, though it has `images` and `annotations`; mend it"
        ) from None
    if again := [number for number, count in numbers.items() if count > 1]:
        raise InputError(f"{str(path)!r} has two images of the id {again[0]!r}; give each its own")
    if wrong := [name for name in names.values() if not isinstance(name, str)]:
        raise InputError(f"{str(path)!r} has the file name {wrong[0]!r}; give a text")
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise InputError(f"{str(path)!r} has two images named {twice[0]!r}; keep one")
    for number, objects in by_image.items():
        where = f"image {number!r} of {str(path)!r}"
        yield where, names[number], _detections({"objects": objects}, where)
