"""Rows left out because a reward finds that the caption does not fit, or the winner not better."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mmalign.errors import UnreadableImageError
from mmalign.prefetch import default_workers, prefetch
from mmalign.progress import progress_bar

from ..rewards.reward import Reward
from .images import read_row_image
from .rows import MAX_PIXELS, Example, Problem, fingerprint_examples
from .sources import RowSource

if TYPE_CHECKING:
    from .memory import CheckMemory

__all__ = ["filter_examples"]

_BATCH_IMAGES = 16
_BATCH_PIXELS = 64_000_000


def filter_examples(
    source: RowSource,
    examples: Sequence[Example],
    reward: Reward,
    *,
    min_score: float | None = None,
    min_margin: float | None = None,
    max_pixels: int = MAX_PIXELS,
    memory: CheckMemory | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> tuple[list[Example], list[Problem]]:
    """Examples whose winner scores at least `min_score`, and at least `min_margin` above the loser; and the others.

    A row whose images are no longer those that were checked is left out. The loser is only scored where `min_margin`
    is given. NaN reaches no threshold.

    Args:
        source: where the images are read again.
        examples: checked rows.
        reward: called without gradients.
        min_score: in the units of `reward`.
        min_margin: in the units of `reward`.
        max_pixels: as the rows were checked with.
        memory: keeps the scores if `reward` has a `fingerprint`.
        workers: decoding threads.
        progress: show a bar.

    Raises:
        InputError: `reward` returns another number of scores than it was given images.
    """
    margins = min_margin is not None
    known = reward.fingerprint
    key = hashlib.sha256(f"{known} {margins} {fingerprint_examples(examples)}".encode()).hexdigest()
    kept = memory.load_scores(key) if memory and known else None
    scores: list[tuple[float, ...] | UnreadableImageError]
    if kept is not None and len(kept) == len(examples):
        scores = [tuple(row) for row in kept]
    else:
        with progress_bar("scoring", len(examples), unit="rows", enabled=progress) as advance:
            scores = []
            for batch in _score_batches(source, examples, reward, margins, max_pixels, workers):
                scores += batch
                advance(len(batch))
        if memory and known:
            complete = [row for row in scores if isinstance(row, tuple)]
            if len(complete) == len(scores):
                memory.save_scores(key, complete)

    left: list[Example] = []
    problems: list[Problem] = []
    for example, found in zip(examples, scores, strict=True):
        flaw = _flaw(found, min_score, min_margin)
        if flaw:
            problems.append(Problem(example.row, example.name, *flaw, fatal=True))
        else:
            left.append(example)
    return left, problems


def _flaw(
    found: tuple[float, ...] | UnreadableImageError, min_score: float | None, min_margin: float | None
) -> tuple[str, str] | None:
    if isinstance(found, UnreadableImageError):
        return found.reason, str(found)
    if min_score is not None and not found[0] >= min_score:
        return "low_score", f"the winner scores {found[0]:.4g}, less than {min_score:g}"
    if min_margin is not None and not found[0] - found[1] >= min_margin:
        margin = found[0] - found[1]
        return "low_score", f"the winner scores {margin:.4g} above the loser, less than {min_margin:g}"
    return None


def _score_batches(
    source: RowSource,
    examples: Sequence[Example],
    reward: Reward,
    margins: bool,
    max_pixels: int,
    workers: int | None,
) -> Iterator[list[tuple[float, ...] | UnreadableImageError]]:
    """Scores of consecutive examples, the winner's first, in batches bounded by images and by pixels."""

    def load(example: Example) -> list[Tensor]:
        images = source.row(example.row).images
        places = [example.winner, 1 - example.winner] if margins else [example.winner]
        return [
            read_row_image(images[i], name=example.name, sha256=example.images[i].sha256, max_pixels=max_pixels)
            for i in places
        ]

    waiting: list[tuple[Example, list[Tensor] | UnreadableImageError]] = []
    images = pixels = 0
    for example, found in prefetch(examples, load, ahead=4 * (workers or default_workers()), workers=workers):
        waiting.append((example, found))
        if isinstance(found, list):
            images += len(found)
            pixels += sum(image[0].numel() for image in found)
        if images >= _BATCH_IMAGES or pixels >= _BATCH_PIXELS:
            yield _score(waiting, reward)
            waiting, images, pixels = [], 0, 0
    if waiting:
        yield _score(waiting, reward)


def _score(
    rows: list[tuple[Example, list[Tensor] | UnreadableImageError]], reward: Reward
) -> list[tuple[float, ...] | UnreadableImageError]:
    readable = [(example, found) for example, found in rows if isinstance(found, list)]
    images = [image for _, found in readable for image in found]
    captions = [example.caption for example, found in readable for _ in found]
    flat = iter(reward(images, captions).tolist())
    return [tuple(next(flat) for _ in found) if isinstance(found, list) else found for _, found in rows]
