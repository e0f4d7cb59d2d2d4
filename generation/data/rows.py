"""What a row of training data is: as it lies in its source, once checked, and what was wrong with it."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

__all__ = [
    "IMAGES",
    "MAX_PIXELS",
    "MIN_SIDE",
    "Example",
    "ImageRef",
    "Kind",
    "Problem",
    "Row",
    "fingerprint_examples",
    "likely_column",
    "preferred_image",
    "unformed",
]

# What is not trained on unless asked for: images of more pixels, or with a shorter side.
MAX_PIXELS, MIN_SIDE = 50_000_000, 64

Kind: TypeAlias = Literal["pairs", "images"]
IMAGES: dict[Kind, int] = {"pairs": 2, "images": 1}  # in a row

# What others call the columns that are read here.
_OTHER_NAMES = {
    "caption": ("prompt", "description", "sentence", "title"),
    "file_name": ("filename", "file", "path", "image"),
    "image": ("jpg", "png", "file_name"),
    "winner": ("chosen", "preferred"),
    "loser": ("rejected",),
    "label_0": ("label", "preference"),
    "reward": ("score", "rewards", "rating"),
}
_READ = {"caption", "text", "winner", "loser", "jpg_0", "jpg_1", "label_0", "reward", "reward_0", "reward_1"}


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image that was decoded in full. `sha256` is of its encoded bytes, hexadecimal; sizes in pixels, upright."""

    sha256: str
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Example:
    """A row that can be trained on.

    Attributes:
        row: position in its source; `source.row(example.row)` gives its bytes or paths again.
        name: for messages, e.g. "train-000.parquet row 17", "metadata.jsonl line 3", "winner/cat.png".
        caption: text with at least one visible character.
        images: a pair as it is stored (image 0, image 1), or one image.
        winner: which of `images` is preferred; 0 for one image.
        rewards: one finite number an image, where the data have them.
    """

    row: int
    name: str
    caption: str
    images: tuple[ImageRef, ...]
    winner: int
    rewards: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a row, or worth knowing of it.

    `fatal` rows are left out, others are only noted. `message` is one line that does not repeat `name`. `reason` is
    one of `mmalign.imaging.REASONS` or of those that `generation.data.checking.check_data` lists, or "missing_reward",
    where a method weights single images by theirs.
    """

    row: int
    name: str
    reason: str
    message: str
    fatal: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it lies in its source, unchecked.

    Attributes:
        index: position in the source, from 0.
        name: for messages; Parquet rows are counted from 0, lines of a file from 1.
        caption: whatever was there, `None` and numbers included.
        images: two of a pair, or one; encoded bytes, a path, or `None` where there is neither.
        label: of a pair: 1 image 0 is preferred, 0 image 1 is, 0.5 a tie; `None` for one image.
        rewards: one an image, as found; `None` where the data have none.
        problem: why the row could not even be formed, such as broken JSON; the other fields are then empty.
    """

    index: int
    name: str
    caption: object
    images: tuple[bytes | Path | None, ...]
    label: object
    rewards: tuple[object, ...] | None
    problem: Problem | None


def preferred_image(label_0: float) -> int:
    """Which image of a pair `label_0` prefers: 0, or 1 for a label of 0. A tie, left out by the check, would be 0."""
    return 1 if label_0 == 0 else 0


def unformed(index: int, name: str, reason: str, message: str) -> Row:
    """A row of which nothing but its problem is known."""
    return Row(index, name, None, (), None, None, Problem(index, name, reason, message, fatal=True))


def likely_column(wanted: str, found: Iterable[str]) -> str | None:
    """The one among the columns `found` that was probably meant, a misspelling or another usual name."""
    free = [name for name in found if name not in _READ]
    usual = [name for name in free if name.lower() in _OTHER_NAMES.get(wanted, ())]
    return next(iter(difflib.get_close_matches(wanted, free, n=1) or usual), None)


def fingerprint_examples(examples: Sequence[Example]) -> str:
    """SHA-256, hexadecimal, of the content of examples in order."""
    digest = hashlib.sha256()
    for example in examples:
        content = [example.caption, [image.sha256 for image in example.images], example.winner, example.rewards]
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()
