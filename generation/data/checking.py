"""All rows of training data checked before the first step: `check_data`."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmalign.encoders.stream import decode_ahead, default_workers
from mmalign.errors import InputError
from mmalign.progress import progress_bar

from .images import ImageTable, ImageVerdict
from .memory import CheckMemory
from .rows import Example, Problem, Row, fingerprint_examples, preferred_image
from .sources import RowSource, open_source

if TYPE_CHECKING:
    from ..rewards.reward import AnyReward

__all__ = ["CheckedData", "check_data"]

Kind = Literal["pairs", "images"]

_LONG_CAPTION = 60
_UNEQUAL_ASPECT = 1.05

_CONVERSIONS = {
    "exif_orientation": "turned upright as its EXIF data ask",
    "bad_exif": "EXIF data unreadable, taken as upright",
    "alpha": "transparent, put on white",
    "palette": "palette to RGB",
    "grayscale": "gray to RGB",
    "16bit": "16 to 8 bits",
    "float": "float to 8 bits",
    "int32": "32-bit integers stretched to 8 bits",
    "cmyk": "CMYK to RGB",
    "colorspace": "another colour space to RGB",
    "first_frame": "several frames, the first one taken",
    "extreme_aspect": "one side more than 50 times the other",
}


@dataclass
class CheckedData:
    """Rows that can be trained on, what was wrong with the others, and what is worth knowing.

    Attributes:
        source: gives bytes and paths again: `source.row(example.row)`.
        examples: usable rows, in order.
        problems: in order of rows; fatal ones say why a row was left out, the others are notes.
        fingerprint: SHA-256 over captions, image hashes, winners and rewards in order; not over names or places.
    """

    source: RowSource
    examples: list[Example]
    problems: list[Problem] = field(repr=False)
    fingerprint: str

    @property
    def left_out(self) -> int:
        """How many rows cannot be used."""
        return len({problem.row for problem in self.problems if problem.fatal})

    def reasons(self, *, fatal: bool) -> dict[str, int]:
        """How many rows have each reason, the commonest first."""
        found = {(problem.reason, problem.row) for problem in self.problems if problem.fatal == fatal}
        return dict(Counter(reason for reason, _ in sorted(found)).most_common())


def check_data(
    data: str | Path | RowSource,
    *,
    split: str | None = None,
    kind: Kind = "pairs",
    max_pixels: int = 50_000_000,
    min_side: int = 64,
    workers: int | None = None,
    progress: bool = True,
    memory: str | Path | None = None,
    reward: AnyReward | None = None,
    min_score: float | None = None,
    min_margin: float | None = None,
    allow_empty: bool = False,
) -> CheckedData:
    """Read every row and decode every image in full; list by name what cannot be used.

    Fatal reasons are those of `mmalign.imaging.REASONS` and: "too_small", "empty_caption" (none, not text, or blanks),
    "tie" (not decoded), "bad_label" (not 0, 0.5 or 1), "bad_reward" (not a finite number), "missing_column",
    "bad_json", "no_partner" and "ambiguous" (twin folders), "same_image" (winner and loser have equal bytes),
    "duplicate" (caption, winner and loser of an earlier row), "contradiction" (an earlier row has the opposite winner;
    the later is left out) and "low_score". Notes are "converted" (what reading an image as RGB changed),
    "different_size" (aspect ratios more than 5 % apart: image 1 will be resized to the size of image 0) and
    "long_caption" (more than 60 words; text encoders cut at 77 tokens).

    Args:
        data: see `open_source`.
        split: see `open_source`.
        kind: "pairs" of a preferred and another image, or single captioned "images".
        max_pixels: an image of more is "too_large", which its header tells: it is not decoded.
        min_side: in pixels; an image with a shorter side is "too_small".
        workers: decoding threads; one a core by default.
        progress: show a bar.
        memory: a folder that keeps the result, so that the same data under the same options are not decoded again.
        reward: scores images with their captions, for `min_score` and `min_margin`: a `generation.rewards.Reward`, or
            any callable with the arguments of its `score`.
        min_score: leave out rows whose winner scores less.
        min_margin: leave out pairs whose winner scores less than this above the loser.
        allow_empty: return an empty result where no row can be used, instead of raising.

    Raises:
        InputError: an option is out of range, the source cannot be opened or is of another kind, or nothing is left.
    """
    _check_options(kind, max_pixels, min_side, workers, reward, min_score, min_margin)
    source = open_source(data, split=split)
    width = 2 if kind == "pairs" else 1
    if source.images_per_row not in (None, width):
        has = "pairs" if source.images_per_row == 2 else "images"
        raise InputError(f"{source.name!r} holds {has}, not {kind}; use kind {has!r} (--kind {has}) or other data")

    options = {"kind": kind, "max_pixels": max_pixels, "min_side": min_side}
    store = CheckMemory(Path(memory), source, options) if memory is not None else None
    known = store.load() if store else None
    if known is None:
        table = ImageTable(max_pixels=max_pixels, min_side=min_side)
        known = _check_rows(source, width, table, workers, progress)
        if store:
            store.save(*known)
    examples, problems = known
    if reward is not None:
        from .filtering import filter_examples

        examples, low = filter_examples(
            source,
            examples,
            reward,
            min_score=min_score,
            min_margin=min_margin,
            workers=workers,
            progress=progress,
            memory=store,
        )
        problems = problems + low
    examples, repeats = _leave_out_repeats(examples)
    problems = sorted(problems + repeats, key=lambda problem: (problem.row, not problem.fatal))
    checked = CheckedData(source, examples, problems, fingerprint_examples(examples))
    if not examples and not allow_empty:
        raise InputError(_nothing_left(checked))
    return checked


def _check_options(
    kind: str,
    max_pixels: int,
    min_side: int,
    workers: int | None,
    reward: AnyReward | None,
    min_score: float | None,
    min_margin: float | None,
) -> None:
    if kind not in ("pairs", "images"):
        raise InputError(f"kind is {kind!r}; give 'pairs' or 'images'")
    for name, value in (("max_pixels", max_pixels), ("min_side", min_side), ("workers", workers)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; give 1 or more")
    for name, bound in (("min_score", min_score), ("min_margin", min_margin)):
        if bound is not None and not math.isfinite(bound):
            raise InputError(f"{name} is {bound}; give a finite number")
    if reward is None and (min_score is not None or min_margin is not None):
        raise InputError("min_score and min_margin need a reward (--filter-encoder on the command line)")
    if reward is not None and min_score is None and min_margin is None:
        raise InputError("a reward alone leaves nothing out; give min_score or min_margin with it")
    if min_margin is not None and kind == "images":
        raise InputError("min_margin compares the images of a pair; use min_score for single images")


def _check_rows(
    source: RowSource, width: int, table: ImageTable, workers: int | None, progress: bool
) -> tuple[list[Example], list[Problem]]:
    examples: list[Example] = []
    problems: list[Problem] = []
    bad = 0

    def load(row: Row) -> tuple[tuple[Example | None, list[Problem]], None]:
        return _check_row(row, width, table), None

    with progress_bar("checking", len(source), unit="rows", enabled=progress, bad=0) as advance:
        ahead = 4 * (workers or default_workers())
        for _, loaded in decode_ahead(source.rows(), load, ahead=ahead, workers=workers):
            assert isinstance(loaded, tuple)  # the table gives verdicts, and raises nothing
            example, found = loaded[0]
            problems += found
            if example is None:
                bad += 1
            else:
                examples.append(example)
            advance(1, bad=bad)
    return examples, problems


def _check_row(row: Row, width: int, table: ImageTable) -> tuple[Example | None, list[Problem]]:
    """The example that a row makes, if nothing is fatally wrong with it, and all that was found."""
    if row.problem:
        return None, [row.problem]
    if len(row.images) != width:
        found, wanted = ("a pair", "one image") if width == 1 else ("one image", "a pair")
        return None, [Problem(row.index, row.name, "missing_column", f"is {found}, where {wanted} is wanted", True)]
    flaws = list(_check_values(row, width))
    images: list[ImageVerdict] = []
    if not any(reason == "tie" for reason, _ in flaws):
        images = [table.look(image) for image in row.images]
        flaws += _check_images(row, images)
    fatal = [Problem(row.index, row.name, reason, message, fatal=True) for reason, message in flaws]
    if fatal:
        return None, fatal
    notes = [Problem(row.index, row.name, reason, message, fatal=False) for reason, message in _remarks(row, images)]
    example = Example(
        row.index,
        row.name,
        str(row.caption),
        tuple(verdict.image for verdict in images if verdict.image),
        preferred_image(row.label) if isinstance(row.label, int | float) else 0,
        tuple(float(reward) for reward in row.rewards if isinstance(reward, int | float)) if row.rewards else None,
    )
    return example, notes


def _check_values(row: Row, width: int) -> Iterator[tuple[str, str]]:
    caption, label = row.caption, row.label
    if not isinstance(caption, str):
        found = "missing" if caption is None else f"{str(caption)[:60]!r}, which is no text"
        yield "empty_caption", f"the caption is {found}"
    elif not caption.strip():
        yield "empty_caption", "the caption is blank"
    elif not _is_encodable(caption):
        yield "empty_caption", "the caption has half a surrogate pair, which is no text"
    if width == 2:
        if label == 0.5:
            yield "tie", "label_0 is 0.5: neither image is preferred"
        elif not isinstance(label, int | float) or label not in (0, 1):
            found = "missing" if label is None else ("the text " if isinstance(label, str) else "") + repr(label)[:60]
            yield "bad_label", f"label_0 is {found}; it must be the number 1 (image 0 is preferred), 0 or 0.5 (a tie)"
    for number, reward in enumerate(row.rewards or ()):
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not abs(reward) <= sys.float_info.max:
            yield "bad_reward", f"the reward of image {number} is {str(reward)[:60]!r}, not a finite number"


def _check_images(row: Row, verdicts: Sequence[ImageVerdict]) -> Iterator[tuple[str, str]]:
    for number, verdict in enumerate(verdicts):
        if verdict.reason:
            yield verdict.reason, f"{_describe(row, number)} {verdict.detail}"
    hashes = [verdict.image.sha256 for verdict in verdicts if verdict.image]
    if len(hashes) == 2 and hashes[0] == hashes[1]:
        yield "same_image", "winner and loser are the same image"


def _remarks(row: Row, verdicts: Sequence[ImageVerdict]) -> Iterator[tuple[str, str]]:
    for number, verdict in enumerate(verdicts):
        if verdict.flags:
            done = "; ".join(_CONVERSIONS.get(flag, flag) for flag in verdict.flags)
            yield "converted", f"{_describe(row, number)}: {done}"
    sizes = [(verdict.image.width, verdict.image.height) for verdict in verdicts if verdict.image]
    if len(sizes) == 2:
        aspects = [width / height for width, height in sizes]
        if max(aspects) > _UNEQUAL_ASPECT * min(aspects):
            (w0, h0), (w1, h1) = sizes
            yield "different_size", f"image 1, {w1}x{h1}, will be resized to {w0}x{h0}, the size of image 0"
    words = len(str(row.caption).split())
    if words > _LONG_CAPTION:
        yield "long_caption", f"the caption has {words} words; text encoders cut at 77 tokens"


def _describe(row: Row, number: int) -> str:
    image = row.images[number]
    which = "the image" if len(row.images) == 1 else f"image {number}"
    if not isinstance(image, Path):
        return which
    return f"{which} {'/'.join(image.parts[-2:])!r}"


def _leave_out_repeats(examples: list[Example]) -> tuple[list[Example], list[Problem]]:
    """Without rows that say what an earlier one says, or the opposite."""
    kept: list[Example] = []
    problems: list[Problem] = []
    first: dict[tuple[Any, ...], str] = {}
    for example in examples:
        hashes = [image.sha256 for image in example.images]
        preferred, other = hashes[example.winner], hashes[1 - example.winner] if len(hashes) == 2 else ""
        same, opposite = (example.caption, preferred, other), (example.caption, other, preferred)
        if same in first:
            reason, message = "duplicate", f"says the same as {first[same]}"
        elif opposite in first:
            reason, message = "contradiction", f"says the opposite of {first[opposite]}: same caption and images"
        else:
            first[same] = example.name
            kept.append(example)
            continue
        problems.append(Problem(example.row, example.name, reason, message, fatal=True))
    return kept, problems


def _nothing_left(checked: CheckedData) -> str:
    rows = len(checked.source)
    if not rows:
        return f"{checked.source.name!r} holds no rows; give other data"
    commonest = ", ".join(f"{count:,} {reason}" for reason, count in list(checked.reasons(fatal=True).items())[:4])
    first = next(problem for problem in checked.problems if problem.fatal)
    return (
        f"none of the {rows:,} rows of {checked.source.name!r} can be used: {commonest} "
        f"(first: {first.name}: {first.message}); `mmalign data check` lists them"
    )


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
