"""All rows of training data checked before the first step: `check_data`."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmalign.checks import at_least, in_range, one_of
from mmalign.errors import InputError
from mmalign.prefetch import default_workers, prefetch
from mmalign.progress import progress_bar

from ..rewards.reward import as_reward
from .images import ImageTable, ImageVerdict
from .memory import CheckMemory
from .rows import (
    IMAGES,
    MAX_PIXELS,
    MIN_SIDE,
    Example,
    Kind,
    Problem,
    Row,
    fingerprint_examples,
    preferred_image,
)
from .sources import RowSource, open_source

if TYPE_CHECKING:
    from ..rewards.reward import AnyReward

__all__ = ["CheckOptions", "CheckedData", "NothingUsableError", "check_data"]

_LOOKED_AT = 100  # rows, where each decides for itself
_LONG_CAPTION = 60
_UNEQUAL_ASPECT = 1.05

_OTHER_KIND = {"pairs": "not_a_pair", "images": "not_one_image"}  # why a row of the other kind cannot be used
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


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """What rows were checked for; see `check_data`. `reward` is its fingerprint, if it was given and has one."""

    kind: Kind
    max_pixels: int
    min_side: int
    min_score: float | None
    min_margin: float | None
    reward: str | None


@dataclass
class CheckedData:
    """Rows that can be trained on, what was wrong with the others, and what is worth knowing.

    Attributes:
        source: gives bytes and paths again: `source.row(example.row)`.
        examples: usable rows, in order.
        problems: in order of rows; fatal ones say why a row was left out, the others are notes.
        fingerprint: SHA-256 over captions, image hashes, winners and rewards in order; not over names or places.
        options: what the rows were checked for.
    """

    source: RowSource
    examples: list[Example]
    problems: list[Problem] = field(repr=False)
    fingerprint: str
    options: CheckOptions

    @property
    def left_out(self) -> int:
        """How many rows cannot be used."""
        return len({problem.row for problem in self.problems if problem.fatal})

    def reasons(self, *, fatal: bool) -> dict[str, int]:
        """How many rows have each reason, the commonest first."""
        found = {(problem.reason, problem.row) for problem in self.problems if problem.fatal == fatal}
        return dict(Counter(reason for reason, _ in sorted(found)).most_common())

    def to_dict(self) -> dict[str, Any]:
        """A summary for JSON: counts of rows, captions, images and winners' sizes, reasons, and what was checked."""
        winners = Counter(example.images[example.winner] for example in self.examples)
        sizes: Counter[str] = Counter()
        for image, count in winners.items():
            sizes[f"{image.width}x{image.height}"] += count
        return {
            "source": self.source.name,
            **asdict(self.options),
            "rows": len(self.source),
            "usable": len(self.examples),
            "left_out": self.left_out,
            "captions": len({example.caption for example in self.examples}),
            "images": len({image.sha256 for example in self.examples for image in example.images}),
            "sizes": dict(sizes.most_common()),
            "reasons": self.reasons(fatal=True),
            "notes": self.reasons(fatal=False),
            "fingerprint": self.fingerprint,
        }


class NothingUsableError(InputError):
    """No row can be used; `checked` says why."""

    def __init__(self, message: str, checked: CheckedData) -> None:
        super().__init__(message)
        self.checked = checked


def check_data(
    data: str | os.PathLike[str] | RowSource,
    *,
    split: str | None = None,
    kind: Literal["auto"] | Kind = "auto",
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    reward: AnyReward | None = None,
    min_score: float | None = None,
    min_margin: float | None = None,
    memory: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> CheckedData:
    """Read every row and decode every image in full; list by name what cannot be used.

    Fatal reasons are those of `mmalign.imaging.REASONS` and: "too_small", "empty_caption" (none, not text, or blanks),
    "tie" (not decoded), "bad_label" (not 0, 0.5 or 1), "bad_reward" (not a finite number), "missing_column",
    "not_a_pair" and "not_one_image" (a row of the other kind), "bad_json", "no_partner" and "ambiguous" (twin folders),
    "same_image" (winner and loser have equal bytes), "duplicate" (caption, winner and loser of an earlier row),
    "contradiction" (an earlier row has the opposite winner; the later is left out) and "low_score". Notes are
    "converted" (what reading an image as RGB changed), "different_size" (aspect ratios more than 5 % apart: image 1
    will be resized to the size of image 0) and "long_caption" (more than 60 words; text encoders cut at 77 tokens).

    Args:
        data: see `open_source`.
        split: see `open_source`.
        kind: "pairs" of a preferred and another image, single captioned "images", or "auto": what the source holds,
            and where each row decides for itself, pairs if there is one among the first hundred rows.
        max_pixels: an image of more is "too_large", which its header tells: it is not decoded.
        min_side: in pixels; an image with a shorter side is "too_small".
        reward: scores images with their captions, for `min_score` and `min_margin`: a `generation.rewards.Reward`, or
            any callable with the arguments of its `score`.
        min_score: leave out rows whose winner scores less.
        min_margin: leave out pairs whose winner scores less than this above the loser.
        memory: a folder that keeps the result, so that the same data under the same options are not decoded again.
        workers: decoding threads; one a core by default.
        progress: show a bar.

    Raises:
        InputError: an option is out of range, the source cannot be opened or is of another kind.
        NothingUsableError: no row can be used; the result is in its `checked`.
    """
    one_of("kind", kind, ("auto", *IMAGES))
    for name, value in (("max_pixels", max_pixels), ("min_side", min_side), ("workers", workers)):
        at_least(name, value)
    source = open_source(data, split=split)
    found = _kind_of(source) if kind == "auto" else kind
    if source.kind not in (None, found):
        raise InputError(_other_kind(source, found))
    _check_thresholds(found, reward, min_score, min_margin)
    scorer = None if reward is None else as_reward(reward)
    asked = CheckOptions(found, max_pixels, min_side, min_score, min_margin, scorer.fingerprint if scorer else None)

    options = {"kind": found, "max_pixels": max_pixels, "min_side": min_side}
    store = CheckMemory(Path(memory), source, options) if memory is not None else None
    known = store.load() if store else None
    if known is None:
        table = ImageTable(max_pixels=max_pixels, min_side=min_side)
        known = _check_rows(source, found, table, workers, progress)
        if store:
            store.save(*known)
    examples, problems = known
    if scorer is not None:
        from .filtering import filter_examples

        examples, low = filter_examples(
            source,
            examples,
            scorer,
            min_score=min_score,
            min_margin=min_margin,
            max_pixels=max_pixels,
            memory=store,
            workers=workers,
            progress=progress,
        )
        problems = problems + low
    examples, repeats = _leave_out_repeats(examples)
    problems = sorted(problems + repeats, key=lambda problem: (problem.row, not problem.fatal))
    checked = CheckedData(source, examples, problems, fingerprint_examples(examples), asked)
    if not examples:
        raise NothingUsableError(_nothing_usable(checked), checked)
    return checked


def _check_thresholds(kind: Kind, reward: AnyReward | None, min_score: float | None, min_margin: float | None) -> None:
    in_range("min_score", min_score)
    in_range("min_margin", min_margin)
    if reward is None and (min_score is not None or min_margin is not None):
        raise InputError("min_score and min_margin need a reward (--filter-encoder on the command line); give one")
    if reward is not None and min_score is None and min_margin is None:
        raise InputError("a reward alone leaves nothing out; give min_score or min_margin with it")
    if kind == "images" and min_margin is not None:
        raise InputError("min_margin compares the images of a pair; use min_score for single images")


def _kind_of(source: RowSource) -> Kind:
    if source.kind is not None:
        return source.kind
    counts = {len(row.images) for row in islice(source.rows(), _LOOKED_AT)}
    return "images" if counts - {0} == {IMAGES["images"]} else "pairs"


def _other_kind(source: RowSource, wanted: Kind) -> str:
    other = "images" if wanted == "pairs" else "pairs"
    return f"{source.name!r} holds {other}, not {wanted}; use kind {other!r} (--kind {other}) or other data"


def _check_rows(
    source: RowSource, kind: Kind, table: ImageTable, workers: int | None, progress: bool
) -> tuple[list[Example], list[Problem]]:
    examples: list[Example] = []
    problems: list[Problem] = []
    bad = 0

    def load(row: Row) -> tuple[Example | None, list[Problem]]:
        return _check_row(row, kind, table)

    with progress_bar("checking", len(source), unit="rows", enabled=progress, bad=0) as advance:
        ahead = 4 * (workers or default_workers())
        for _, loaded in prefetch(source.rows(), load, ahead=ahead, workers=workers):
            assert isinstance(loaded, tuple)  # the table gives verdicts, and raises nothing
            example, found = loaded
            problems += found
            if example is None:
                bad += 1
            else:
                examples.append(example)
            advance(1, bad=bad)
    return examples, problems


def _check_row(row: Row, kind: Kind, table: ImageTable) -> tuple[Example | None, list[Problem]]:
    """The example that a row makes, if nothing is fatally wrong with it, and all that was found."""
    if row.problem:
        return None, [row.problem]
    if len(row.images) != IMAGES[kind]:
        message = "is one image, where a pair is wanted" if kind == "pairs" else "is a pair, where one image is wanted"
        return None, [Problem(row.index, row.name, _OTHER_KIND[kind], message, fatal=True)]
    flaws = list(_check_values(row, kind))
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


def _check_values(row: Row, kind: Kind) -> Iterator[tuple[str, str]]:
    caption, label = row.caption, row.label
    if not isinstance(caption, str):
        found = "missing" if caption is None else f"{str(caption)[:60]!r}, which is no text"
        yield "empty_caption", f"the caption is {found}"
    elif not caption.strip():
        yield "empty_caption", "the caption is blank"
    elif not _is_encodable(caption):
        yield "empty_caption", "the caption has half a surrogate pair, which is no text"
    if kind == "pairs":
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


def _nothing_usable(checked: CheckedData) -> str:
    source, reasons = checked.source, checked.reasons(fatal=True)
    if not len(source):
        return f"{source.name!r} holds no rows; give other data"
    if set(reasons) == {_OTHER_KIND[checked.options.kind]}:
        return _other_kind(source, checked.options.kind)
    commonest = ", ".join(f"{count:,} {reason}" for reason, count in list(reasons.items())[:4])
    first = next(problem for problem in checked.problems if problem.fatal)
    return (
        f"no row of {source.name!r} can be used: {commonest} (first: {first.name}: {first.message}); "
        "mend them (`mmalign data check` lists all), or give other data"
    )


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
