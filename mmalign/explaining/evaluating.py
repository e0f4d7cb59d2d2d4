"""How well wrong captions are told from right ones: calibration, and figures over a data set."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checks import at_least, in_range
from ..errors import InputError
from ..imaging import read_image
from ..metrics import sentence_auroc, sentence_average_precision, word_accuracy
from ..pairs import CaptionedImage, read_captioned
from ..progress import progress_bar
from ..word_attribution import (
    LAYERS,
    TEMPLATE,
    WordAttribution,
    attributed_words,
    word_attribution,
)
from .calibrating import WordCalibration, calibration_of

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

__all__ = ["WordReport", "calibrate", "evaluate_words"]

_BATCH = 32


def calibrate(
    encoder: Encoder | str | os.PathLike[str],
    pairs: str | os.PathLike[str] | Iterable[tuple[Any, str | Sequence[str]]],
    flagged_share: float = 0.05,
    *,
    template: str = TEMPLATE,
    layers: int | None = LAYERS,
    batch_size: int | None = None,
    progress: bool = False,
) -> WordCalibration:
    """The eps of an encoder, by pairs of images and captions that are known to fit each other.

    Args:
        encoder: as for `explain`.
        pairs: a file or folder for `mmalign.pairs.read_captioned`, whose `captions` count; or (image, caption or
            captions). Hundreds of words.
        flagged_share: of the words of these captions, in [0, 1], that is to be below eps. Where more than this share
            of the words scores above 0, which does happen, fewer are, as eps is never above 0.
        template: as for `explain`.
        layers: as for `explain`.
        batch_size: captions a pass; 32 by default.
        progress: show a bar.

    Raises:
        InputError: as `explain`, what is given are no pairs, or there is no caption.
        UnreadableImageError: an image cannot be read; of a file or folder it is left out instead.
    """
    encoder = _loaded(encoder)
    in_range("flagged_share", flagged_share, 0, 1)
    options: dict[str, Any] = {"template": template, "layers": layers, "batch_size": batch_size}
    if isinstance(pairs, (str, os.PathLike)):
        report = evaluate_words(encoder, pairs, flagged_share, progress=progress, **options)
        return report.calibration
    rows = _image_texts(pairs)
    found = [
        one
        for image, texts in rows
        if texts
        for one in word_attribution(encoder, [read_image(image).pixels], texts, **options)
    ]
    return calibration_of(encoder, found, sum(bool(texts) for _, texts in rows), flagged_share, template, layers)


@dataclass(frozen=True)
class WordReport:
    """How well an encoder's words tell right captions from wrong ones.

    Attributes:
        calibration: by the right captions.
        marked_share: of the words of these, in [0, 1], below eps; less than was asked for where eps would be above 0.
        wrong: how many wrong captions there are; without any, nothing is measured.
        figures: by score ("cosine", "f_clip_score", at the calibrated eps, and "most_negative", F-CLIPScore of the
            lowest word): "auroc" and "average_precision" of finding wrong captions. "chance" beside them. eps was
            fitted to the right ones among them, which may flatter "f_clip_score".
        word_accuracy: share of wrong captions whose lowest word is the wrong one; `None` where none is named.
        word_chance: what a word drawn at random would reach.
        named: wrong captions whose wrong word is named, and within the window.
        left_out: images that could not be read, with reason and message.
    """

    calibration: WordCalibration
    marked_share: float
    wrong: int
    figures: dict[str, dict[str, float]]
    word_accuracy: float | None
    word_chance: float | None
    named: int
    left_out: list[dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)

    def table(self) -> list[str]:
        """Lines for people; none where there is no wrong caption."""
        if not self.figures:
            return []
        width = max(map(len, self.figures))
        lines = [
            f"{self.calibration.captions:,} captions that fit, {self.wrong:,} that do not",
            f"{'':<{width}}  {'AUROC':>6}  {'average precision':>17}",
        ]
        for name, row in self.figures.items():
            lines.append(f"{name:<{width}}  {row['auroc']:>6.3f}  {row['average_precision']:>17.3f}")
        lines.append("eps was fitted to the captions that fit here, which may flatter f_clip_score")
        if self.word_accuracy is not None:
            lines.append(
                f"the lowest word is the wrong one in {self.word_accuracy:.3f} of {self.named:,} wrong captions "
                f"(chance {self.word_chance:.3f})"
            )
        return lines


def evaluate_words(
    encoder: Encoder | str | os.PathLike[str],
    data: str | os.PathLike[str],
    flagged_share: float = 0.05,
    *,
    template: str = TEMPLATE,
    layers: int | None = LAYERS,
    batch_size: int | None = None,
    progress: bool = False,
) -> WordReport:
    """Calibrate by the captions of data, and where these have wrong captions too, measure how well they are found.

    eps is fitted to the right captions that F-CLIPScore is then measured on, which may flatter it; the cosine
    and "most_negative" have no eps. For a figure without that, `calibrate` on other captions.

    Args:
        encoder: as for `explain`.
        data: for `mmalign.pairs.read_captioned`; lines may have `wrong_captions`, and `wrong_words`, the part of each
            that is wrong.
        flagged_share: as for `calibrate`.
        template: as for `explain`.
        layers: as for `explain`.
        batch_size: captions a pass; 32 by default.
        progress: show a bar.

    Raises:
        InputError: as `calibrate`, no image can be read, or a wrong word does not stand in its caption.
    """
    encoder = _loaded(encoder)
    in_range("flagged_share", flagged_share, 0, 1)
    at_least("batch_size", batch_size)
    rows, root = read_captioned(data)
    rows = [row for row in rows if row.captions or row.wrong_captions]
    for row in rows:
        _check_words(row)
    # Before thousands of images are encoded for an encoder that cannot be read.
    attributed_words(encoder, torch.ones(1, encoder.dim), ["a"], template=template, layers=layers)
    vectors, left_out = _image_vectors(encoder, [root / row.file for row in rows], batch_size, progress)
    seen = [(row, vector) for row, vector in zip(rows, vectors, strict=True) if vector is not None]
    texts = [(text, vector) for row, vector in seen for text in (*row.captions, *row.wrong_captions)]
    found: list[WordAttribution] = []
    size = batch_size or _BATCH
    with progress_bar("reading captions", len(texts), unit="captions", enabled=progress) as advance:
        for start in range(0, len(texts), size):
            captions, images = zip(*texts[start : start + size], strict=True)
            found += word_attribution(encoder, np.stack(images), captions, template=template, layers=layers,
                                      batch_size=size)  # fmt: skip
            advance(len(captions))
    right: list[WordAttribution] = []
    wrong: list[tuple[WordAttribution, str]] = []
    following = iter(found)
    for row, _ in seen:
        right += islice(following, len(row.captions))
        wrong += zip(islice(following, len(row.wrong_captions)), row.wrong_words, strict=True)
    images_with = sum(bool(row.captions) for row, _ in seen)
    if not right:
        why = f" (first: {left_out[0]['message']})" if left_out else ""
        raise InputError(f"no image of {os.fspath(data)!r} with a caption can be read{why}; check the paths in it")
    calibration = calibration_of(encoder, right, images_with, flagged_share, template, layers)
    accuracy, chance, named = _found_words(wrong)
    figures = _figures(right, [one for one, _ in wrong], calibration.eps) if wrong else {}
    marked = sum(word.score < calibration.eps for one in right for word in one.words if not word.is_punctuation)
    share = marked / calibration.words
    return WordReport(calibration, share, len(wrong), figures, accuracy, chance, named, left_out)


def _image_texts(pairs: Any) -> list[tuple[Any, list[str]]]:
    """Images, each with its captions."""
    wanted = "give (image, caption) or (image, captions) for each image, or a file of captioned images"
    if not isinstance(pairs, Iterable):
        raise InputError(f"pairs are {pairs!r}; {wanted}")
    rows = []
    for place, pair in enumerate(pairs):
        try:
            image, texts = pair
            rows.append((image, [texts] if isinstance(texts, str) else list(texts)))
        except (TypeError, ValueError):
            kind = type(pair).__name__
            about = f"({', '.join(type(part).__name__ for part in pair)})" if isinstance(pair, tuple) else kind
            raise InputError(f"pair {place} is {about}; {wanted}") from None
    return rows


def _check_words(row: CaptionedImage) -> None:
    for caption, word in zip(row.wrong_captions, row.wrong_words, strict=True):
        if word.strip() and not _places(caption, word):
            raise InputError(
                f"the wrong word {word!r} of {row.file!r} does not stand in its caption {caption!r}; give it as it is "
                "written there"
            )


def _places(caption: str, word: str) -> list[tuple[int, int]]:
    """Where a word, or several, stand in a caption, in any case, not as a part of another word."""
    pattern = r"\s+".join(re.escape(part) for part in word.split())
    return [found.span() for found in re.finditer(rf"(?<!\w){pattern}(?!\w)", caption, re.IGNORECASE)]


def _found_words(wrong: Sequence[tuple[WordAttribution, str]]) -> tuple[float | None, float | None, int]:
    """Accuracy of the lowest word, that of a word drawn at random, and the number of captions that these are of."""
    scores, flags = [], []
    for one, word in wrong:
        spans = _places(one.caption, word) if word.strip() else []
        marked = [any(w.start < end and start < w.end for start, end in spans) for w in one.words]
        if any(marked):
            scores.append(np.array([w.score for w in one.words]))
            flags.append(np.array(marked))
    if not scores:
        return None, None, 0
    return word_accuracy(scores, flags), float(np.mean([each.mean() for each in flags])), len(scores)


def _figures(
    right: Sequence[WordAttribution], wrong: Sequence[WordAttribution], eps: float
) -> dict[str, dict[str, float]]:
    everything, flags = [*right, *wrong], np.repeat([False, True], [len(right), len(wrong)])
    scores = {
        "cosine": [one.cosine for one in everything],
        "f_clip_score": [one.f_clip_score(eps) for one in everything],
        "most_negative": [one.f_clip_score(mode="most_negative") for one in everything],
    }
    figures = {
        name: {
            "auroc": sentence_auroc(np.array(values), flags),
            "average_precision": sentence_average_precision(np.array(values), flags),
        }
        for name, values in scores.items()
    }
    return {**figures, "chance": {"auroc": 0.5, "average_precision": float(flags.mean())}}


def _image_vectors(
    encoder: Encoder, files: Sequence[Path], batch_size: int | None, progress: bool
) -> tuple[list[np.ndarray | None], list[dict[str, str]]]:
    """Rows of images; `None` for one that cannot be read, and what is wrong with those."""
    from ..encoders.stream import encode_stream

    vectors: list[np.ndarray | None] = []
    left_out = []
    with progress_bar("encoding images", len(files), enabled=progress) as advance:
        for batch in encode_stream(encoder, files, encoder.load_image, batch_size=batch_size):
            for outcome in batch.outcomes:
                vectors.append(None if outcome.vector is None else batch.vectors[outcome.vector])
                if outcome.error is not None:
                    about = {"reason": outcome.error.reason, "message": str(outcome.error)}
                    left_out.append({"file": os.fspath(outcome.source), **about})
            advance(len(batch.outcomes))
    return vectors, left_out


def _loaded(encoder: Encoder | str | os.PathLike[str]) -> Encoder:
    """An encoder, by its spec too."""
    from ..encoders import load_encoder

    return load_encoder(encoder) if isinstance(encoder, (str, os.PathLike)) else encoder
