"""Training and held-out rows that share nothing: equal content and given groups stay on one side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from ..errors import InputError
from ..features import Features
from ..features.items import hash_items
from ..imaging import DEFAULT_DECODING
from ..pairs import CaptionedImage

__all__ = ["ImageSplits", "PairSubset", "grouped", "held_out", "shared_content", "unique_images"]

_SPLITS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def grouped(*labels: Sequence[object]) -> Int[np.ndarray, " n"]:
    """One group number a row: rows that agree in any of the `labels` are in one group, and so on from row to row.

    `None` agrees with nothing.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(labels[0])
    columns: list[int] = []
    for column in labels:
        first: dict[str, int] = {}
        columns += [row if value is None else first.setdefault(str(value), row) for row, value in enumerate(column)]
    rows = np.tile(np.arange(n), len(labels))
    return connected_components(coo_array((np.ones(len(rows)), (rows, columns)), shape=(n, n)), directed=False)[1]


def held_out(groups: Int[np.ndarray, " n"], share: float, seed: int) -> Bool[np.ndarray, " n"]:
    """Whole groups in random order, as long as they fit into `share` of the rows; the smallest one if none does.

    Raises:
        InputError: fewer than two groups, or a share that leaves nothing to train on.
    """
    if not 0 < share < 1:
        raise InputError(f"held-out share is {share:g}; give a number between 0 and 1")
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise InputError(f"{len(groups)} rows are one group (equal content or group), which cannot be split; add pairs")
    left = max(1, round(share * len(groups)))
    taken: list[int] = []
    for candidate in np.random.default_rng(seed).permutation(len(sizes)).tolist():
        if sizes[candidate] <= left and len(taken) < len(sizes) - 1:
            taken.append(candidate)
            left -= sizes[candidate]
    return np.isin(group, taken or [int(sizes.argmin())])


def shared_content(
    content: Sequence[str], one: Bool[np.ndarray, " n"], other: Bool[np.ndarray, " n"]
) -> list[tuple[int, int]]:
    """Pairs of rows, one on each side, of equal content."""
    first = {content[row]: row for row in np.flatnonzero(one)[::-1].tolist()}
    return [(first[content[row]], row) for row in np.flatnonzero(other).tolist() if content[row] in first]


def unique_images(
    content: Sequence[str], wanted: Bool[np.ndarray, " n"], owner: Int[np.ndarray, " m"]
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " texts"], Int[np.ndarray, " texts"]]:
    """The wanted images, each content once, with the texts of all its copies.

    Args:
        content: hash of each image.
        wanted: which images; all can be read.
        owner: the image that each text describes.

    Returns:
        Rows of the images kept, rows of their texts, and for each of these texts its place among the images kept.
    """
    rows = np.flatnonzero(wanted)
    first: dict[str, int] = {}
    original = np.array([first.setdefault(content[row], row) for row in rows.tolist()], dtype=np.int64)
    kept = np.unique(original)
    place = np.full(len(wanted), -1)
    place[rows] = np.searchsorted(kept, original)
    texts = np.flatnonzero(place[owner] >= 0)
    return kept, texts, place[owner[texts]]


@dataclass(frozen=True)
class PairSubset:
    """Some images, each content once, with all their texts."""

    images: Features
    texts: Features
    owner: Int[np.ndarray, " m"]
    rows: Int[np.ndarray, " n"]
    text_rows: Int[np.ndarray, " m"]
    copies: int

    @classmethod
    def of(cls, images: Features, texts: Features, owner: np.ndarray, mask: Bool[np.ndarray, " n"]) -> PairSubset:
        """The images of a mask.

        Raises:
            InputError: none is left.
        """
        if not mask.any():
            raise InputError("no readable image is left to train on or to measure on; check the files and the splits")
        rows, text_rows, whose = unique_images(images.content, mask, owner)
        return cls(images.take(rows), texts.take(text_rows), whose, rows, text_rows, int(mask.sum()) - len(rows))


@dataclass(frozen=True)
class ImageSplits:
    """Masks over the images; groups hold equal content and what the data call a group."""

    training: Bool[np.ndarray, " n"]
    validation: Bool[np.ndarray, " n"]
    test: Bool[np.ndarray, " n"]
    groups: Int[np.ndarray, " n"]
    warnings: list[str]

    @classmethod
    def of(
        cls,
        images: Sequence[CaptionedImage],
        files: Sequence[Path],
        *,
        test: float,
        duplicates: str,
        seed: int,
        workers: int | None,
        progress: bool,
    ) -> ImageSplits:
        """What the lines say, or shares drawn at random.

        Args:
            images: all.
            files: of each.
            test: share of all, where no line says so.
            duplicates: "refuse" copies of test images among the others, or "drop" them.
            seed: of what is drawn.
            workers: hashing threads.
            progress: show a bar.

        Raises:
            InputError: copies across the splits (named), a split of another name, or too few images.
        """
        named = np.array([_split_name(image) for image in images])
        tested, checked = named == "test", named == "validation"
        hashes, _ = hash_items(list(files), "image", DEFAULT_DECODING, workers=workers, progress=progress)
        # Files that cannot be read are like no other; they are reported where features are extracted.
        groups = grouped([digest or None for digest in hashes], [image.group for image in images])
        if not tested.any():
            if not test:
                raise InputError("no line says split test, and test is 0; give a share to measure on")
            pool = np.flatnonzero(~checked)
            _, local = np.unique(groups[pool], return_inverse=True)
            tested[pool[held_out(local, test, seed)]] = True
        keys = [str(group) for group in groups]
        copies = shared_content(keys, tested, ~tested)
        if copies and duplicates == "refuse":
            other, row = copies[0]
            raise InputError(
                f"{len(copies)} images to train on have copies (equal content or group) among the test images (first: "
                f"{images[row].file!r} and {images[other].file!r}); mend `split`, or leave them out with duplicates "
                "'drop'"
            )
        dropped = np.zeros(len(images), bool)
        warnings = []
        checked_copies = shared_content(keys, checked, ~checked & ~tested)
        for pairs, where in ((copies, "test"), (checked_copies, "validation")):
            more = [row for _, row in pairs if not dropped[row]]
            if more:
                dropped[more] = True
                warnings.append(
                    f"{len(more)} images have copies (equal content or group) among the {where} images and are left "
                    f"out of training (first: {images[more[0]].file!r})"
                )
        training = ~tested & ~dropped
        if not (training & ~checked).any() or tested.sum() < 2:
            raise InputError(
                f"{int((training & ~checked).sum())} images to train on and {int(tested.sum())} to measure on, and it "
                "takes 1 and 2; give more pairs or another share `test`, or mend `split`"
            )
        return cls(training, checked & ~dropped, tested, groups, warnings)


def _split_name(image: CaptionedImage) -> str:
    name = _SPLITS.get((image.split or "train").strip().lower())
    if name is None:
        raise InputError(f"{image.file!r} has split {image.split!r}; give train, validation or test")
    return name
