"""Where a caption and an image disagree, for people: words with scores, marked, drawn, and calibrated by an encoder.

`mmalign.word_attribution` has the mathematics and what it is good for: objects far more than attributes, relations and
counts. That no word is marked does not say that the caption fits.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from .checks import at_least, in_range, one_of
from .errors import InputError, reason_of
from .files import whole_file
from .imaging import read_image
from .metrics import sentence_auroc, sentence_average_precision, word_accuracy
from .pairs import CaptionedImage, read_captioned
from .progress import progress_bar
from .word_attribution import (
    EPS,
    LAYERS,
    TEMPLATE,
    Mode,
    WordAttribution,
    WordScore,
    attributed_words,
    calibrate_eps,
    word_attribution,
)

if TYPE_CHECKING:
    from .encoders.encoder import Encoder

__all__ = [
    "ExplainedWord",
    "Explanation",
    "WordCalibration",
    "WordReport",
    "calibrate",
    "check_picture",
    "evaluate_words",
    "explain",
    "explain_many",
]

_FORMAT = "mmalign word calibration 1"
_EPS_IS_FOR = "open_clip:ViT-H-14/laion2b_s32b_b79k"
_BATCH = 32
_PICTURE = 640  # pixels of the longer side of an image that is kept to be drawn
_FEW = 200  # words, below which a share of a twentieth is ten words or fewer


@dataclass(frozen=True, slots=True)
class ExplainedWord(WordScore):
    """A word with its score, negative where the image contradicts it, and whether it is suspect."""

    flagged: bool


@dataclass(frozen=True, eq=False)
class Explanation:
    """What an encoder holds against a caption, word by word.

    Attributes:
        caption: the text, without template.
        encoder: its spec.
        cosine: of image and template with caption.
        clip_score: 2.5 max(cosine, 0), in [0, 2.5].
        f_clip_score: (1 - max(cosine, 0)) times the sum of the flagged words' scores; nearer 0 fits better.
        words: in their order, punctuation included; those beyond the encoder's window are left out.
        phrases: flagged words in their order, neighbours joined, with the mean of their scores.
        eps: below which a word is flagged.
        eps_from: "given", "calibration", or "default".
        mode: "threshold", or "most_negative": the lowest word alone is flagged, whatever its score.
        notes: what to know before these are relied on.
    """

    caption: str
    encoder: str
    cosine: float
    clip_score: float
    f_clip_score: float
    words: tuple[ExplainedWord, ...]
    phrases: tuple[WordScore, ...]
    eps: float
    eps_from: Literal["given", "calibration", "default"]
    mode: Mode
    notes: tuple[str, ...]
    picture: Image.Image = field(repr=False)

    @property
    def flagged(self) -> list[ExplainedWord]:
        """The suspect words, the worst first."""
        return sorted((word for word in self.words if word.flagged), key=lambda word: word.score)

    def marked(self, *, color: bool = False) -> str:
        """The caption in one line, suspect phrases in [brackets]; with `color` also red, for a terminal."""
        before, after = ("\x1b[1;31m[", "]\x1b[0m") if color else ("[", "]")
        pieces, place = [], 0
        for phrase in self.phrases:
            pieces += [_printable(self.caption[place : phrase.start]), before]
            pieces += [_printable(self.caption[phrase.start : phrase.end]), after]
            place = phrase.end
        return "".join([*pieces, _printable(self.caption[place:])]).strip()

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; all but the picture."""
        names = ("caption", "encoder", "cosine", "clip_score", "f_clip_score", "eps", "eps_from", "mode")
        about: dict[str, Any] = {name: getattr(self, name) for name in names}
        about |= {"marked": self.marked(), "words": [asdict(word) for word in self.words]}
        return {**about, "phrases": [asdict(phrase) for phrase in self.phrases], "notes": list(self.notes)}

    def draw(self, path: str | os.PathLike[str]) -> Path:
        """Save a picture (.png): the image, the caption with its words coloured by score, and a bar for each.

        Raises:
            InputError: it cannot be written, or its name does not end in .png.
        """
        target = Path(path)
        check_picture(target)
        with whole_file(target) as fresh:
            _draw(self, fresh)
        return target


def check_picture(path: Path) -> None:
    """Refuse a name under which `Explanation.draw` does not write, before anything is computed.

    Raises:
        InputError: it does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"picture {str(path)!r} does not end in .png; give a name that does")


@dataclass(frozen=True)
class WordCalibration:
    """The eps of one encoder, and what it was measured with.

    Attributes:
        eps: words below are suspect; at most 0.
        flagged_share: of the words of captions that fit, in [0, 1], that are below eps.
        encoder: spec, for messages.
        fingerprint: of the encoder.
        template: in front of every caption.
        layers: of the text tower, from the last; `None` for all.
        images: with captions that fit.
        captions: of those.
        words: of those, punctuation aside.
    """

    eps: float
    flagged_share: float
    encoder: str
    fingerprint: str
    template: str
    layers: int | None
    images: int
    captions: int
    words: int

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write JSON.

        Raises:
            InputError: it cannot be written.
        """
        with whole_file(path) as fresh:
            fresh.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WordCalibration:
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file, or it is no calibration.
        """
        name, remedy = repr(os.fspath(path)), "make one with `mmalign eval words`"
        try:
            about = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"calibration {name} cannot be read ({reason_of(error)}); {remedy}") from None
        except (ValueError, RecursionError):
            raise InputError(f"calibration {name} is not JSON; {remedy}") from None
        if not isinstance(about, Mapping) or about.get("format") != _FORMAT:
            raise InputError(f"{name} is no calibration of words; {remedy}")
        kinds: dict[str, Any] = {
            "eps": (int, float), "flagged_share": (int, float), "encoder": str, "fingerprint": str, "template": str,
            "layers": (int, type(None)), "images": int, "captions": int, "words": int,
        }  # fmt: skip
        for key, kind in kinds.items():
            value = about.get(key)
            bad = key not in about or not isinstance(value, kind) or isinstance(value, bool)
            if bad or (key == "eps" and not (math.isfinite(value) and value <= 0)):  # type: ignore[arg-type, operator]
                raise InputError(f"calibration {name} has {key} {value!r}; {remedy}")
        return cls(**{key: about[key] for key in kinds})

    def check(self, encoder: Encoder, template: str = TEMPLATE, layers: int | None = LAYERS) -> None:
        """Refuse what it was not measured for.

        Raises:
            InputError: another encoder, template, or number of layers.
        """
        if encoder.fingerprint != self.fingerprint:
            raise InputError(
                f"the calibration is of the encoder {self.encoder!r} (fingerprint {self.fingerprint[:12]}), and "
                f"{encoder.spec!r} is another ({encoder.fingerprint[:12]}); calibrate it with `mmalign eval words`"
            )
        for name, mine, given in (("template", self.template, template), ("layers", self.layers, layers)):
            if mine != given:
                raise InputError(
                    f"{name} is {given!r} and that of the calibration {mine!r}; give that, or calibrate anew"
                )


def explain(
    image: Any,
    text: str,
    *,
    encoder: Encoder | str | os.PathLike[str],
    eps: float | None = None,
    mode: Mode = "threshold",
    template: str = TEMPLATE,
    layers: int | None = LAYERS,
    calibration: WordCalibration | str | os.PathLike[str] | None = None,
) -> Explanation:
    """Tell which words of a text an image contradicts.

    Args:
        image: what `mmalign.imaging.read_image` takes.
        text: not blank.
        encoder: a CLIP whose text tower is causal (see `mmalign.word_attribution`), or its spec for `load_encoder`.
        eps: words that score below are suspect; at most 0. By default that of `calibration`, or else -5e-5, which was
            measured for LAION's ViT-H/14 alone: scores are absolute numbers that differ between encoders.
        mode: "most_negative" flags the lowest word alone, as where one word is known to be wrong.
        template: put in front of the text. Ends in a space, or is empty.
        layers: how many of the last text layers count; `None` for all.
        calibration: of `calibrate`, or the file it was saved to; in place of `eps`.

    Raises:
        InputError: an encoder of another kind, a blank text, an option out of range, or a calibration of another
            encoder, template or number of layers.
        UnreadableImageError: the image cannot be read.
    """
    options: dict[str, Any] = {"eps": eps, "mode": mode, "template": template, "layers": layers}
    return explain_many(image, [text], encoder=encoder, calibration=calibration, **options)[0]


def explain_many(
    image: Any,
    texts: Sequence[str],
    *,
    encoder: Encoder | str | os.PathLike[str],
    eps: float | None = None,
    mode: Mode = "threshold",
    template: str = TEMPLATE,
    layers: int | None = LAYERS,
    calibration: WordCalibration | str | os.PathLike[str] | None = None,
) -> list[Explanation]:
    """`explain` of several texts for one image, which is encoded once."""
    from .encoders import load_encoder

    one_of("mode", mode, ("threshold", "most_negative"))
    in_range("eps", eps, high=0)
    if eps is not None and calibration is not None:
        raise InputError(f"eps is {eps:g} and a calibration is given, which has its own; give one of them")
    if isinstance(calibration, (str, os.PathLike)):
        calibration = WordCalibration.load(calibration)
    if isinstance(encoder, (str, os.PathLike)):
        encoder = load_encoder(encoder)
    if calibration is not None:
        calibration.check(encoder, template, layers)
    pixels = read_image(image).pixels
    found = word_attribution(encoder, [pixels], list(texts), template=template, layers=layers)
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((_PICTURE, _PICTURE))
    limit = eps if eps is not None else EPS if calibration is None else calibration.eps
    source: Any = "given" if eps is not None else "default" if calibration is None else "calibration"
    return [_explanation(one, encoder.spec, limit, source, mode, calibration, picture) for one in found]


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
        InputError: as `explain`, or there is no caption.
        UnreadableImageError: an image cannot be read; of a file or folder it is left out instead.
    """
    encoder = _loaded(encoder)
    in_range("flagged_share", flagged_share, 0, 1)
    options: dict[str, Any] = {"template": template, "layers": layers, "batch_size": batch_size}
    if isinstance(pairs, (str, os.PathLike)):
        report = evaluate_words(encoder, pairs, flagged_share, progress=progress, **options)
        return report.calibration
    rows = [(image, [texts] if isinstance(texts, str) else list(texts)) for image, texts in pairs]
    found = [
        one
        for image, texts in rows
        if texts
        for one in word_attribution(encoder, [read_image(image).pixels], texts, **options)
    ]
    return _calibration(encoder, found, sum(bool(texts) for _, texts in rows), flagged_share, template, layers)


@dataclass(frozen=True)
class WordReport:
    """How well an encoder's words tell right captions from wrong ones.

    Attributes:
        calibration: by the right captions.
        marked_share: of the words of these, in [0, 1], below eps; less than was asked for where eps would be above 0.
        wrong: how many wrong captions there are; without any, nothing is measured.
        figures: by score ("cosine", "f_clip_score", at the calibrated eps, and "most_negative", F-CLIPScore of the
            lowest word): "auroc" and "average_precision" of finding wrong captions. "chance" beside them.
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
    calibration = _calibration(encoder, right, images_with, flagged_share, template, layers)
    accuracy, chance, named = _found_words(wrong)
    figures = _figures(right, [one for one, _ in wrong], calibration.eps) if wrong else {}
    marked = sum(word.score < calibration.eps for one in right for word in one.words if not word.is_punctuation)
    share = marked / calibration.words
    return WordReport(calibration, share, len(wrong), figures, accuracy, chance, named, left_out)


def _image_vectors(
    encoder: Encoder, files: Sequence[Path], batch_size: int | None, progress: bool
) -> tuple[list[np.ndarray | None], list[dict[str, str]]]:
    """Rows of images; `None` for one that cannot be read, and what is wrong with those."""
    from .encoders.stream import encode_stream

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
    from .encoders import load_encoder

    return load_encoder(encoder) if isinstance(encoder, (str, os.PathLike)) else encoder


def _explanation(
    found: WordAttribution,
    spec: str,
    eps: float,
    eps_from: Literal["given", "calibration", "default"],
    mode: Mode,
    calibration: WordCalibration | None,
    picture: Image.Image,
) -> Explanation:
    suspects = found.flagged(eps, mode)
    words = tuple(ExplainedWord(word.word, word.start, word.end, word.score, word in suspects) for word in found.words)
    return Explanation(
        caption=found.caption,
        encoder=spec,
        cosine=found.cosine,
        clip_score=2.5 * max(found.cosine, 0.0),
        f_clip_score=found.f_clip_score(eps, mode),
        words=words,
        phrases=tuple(found.phrases(eps) if mode == "threshold" else suspects),
        eps=eps,
        eps_from=eps_from,
        mode=mode,
        notes=tuple(_notes(found, spec, eps, eps_from, mode, calibration)),
        picture=picture,
    )


def _notes(
    found: WordAttribution, spec: str, eps: float, eps_from: str, mode: Mode, calibration: WordCalibration | None
) -> Iterable[str]:
    end = max((word.end for word in found.words), default=0)
    if rest := found.caption[end:].split():
        yield f"the text is cut after {_printable(found.caption[:end])[-20:]!r}; {len(rest):,} words more are not read"
    if mode == "most_negative":
        return
    if eps_from == "default" and spec != _EPS_IS_FOR:
        yield (
            f"eps {eps:g} was measured for {_EPS_IS_FOR}, not for {spec!r}, whose scores are of another size; "
            "calibrate it with `mmalign eval words`"
        )
    if calibration is not None and calibration.words < _FEW:
        yield f"eps {eps:g} was measured on no more than {calibration.words} words"


def _calibration(
    encoder: Encoder,
    found: Sequence[WordAttribution],
    images: int,
    flagged_share: float,
    template: str,
    layers: int | None,
) -> WordCalibration:
    return WordCalibration(
        eps=calibrate_eps(found, flagged_share=flagged_share),
        flagged_share=float(flagged_share),
        encoder=encoder.spec,
        fingerprint=encoder.fingerprint,
        template=template,
        layers=layers,
        images=images,
        captions=len(found),
        words=sum(not word.is_punctuation for one in found for word in one.words),
    )


# -- wrong captions ----------------------------------------------------------------------------------------------------


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


# -- pictures ----------------------------------------------------------------------------------------------------------


def _printable(text: str) -> str:
    """Without line breaks, and without what would steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _draw(found: Explanation, path: Path) -> None:
    import warnings

    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    from .plotting import name_axes, new_figure, save_figure

    words = found.words
    bars = 0.19 * len(words) + 0.9  # inches, as all below
    width, left, gap, line = 10.0, 4.4, 0.25, 0.3
    largest = max((abs(word.score) for word in words), default=0.0) or 1.0
    shade, colours = Normalize(-1.5 * largest, 1.5 * largest), colormaps["RdBu"]  # pale enough for black letters
    figure, _ = new_figure(1, 1.0, width)
    figure.clear()
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()

    def size(text: str, weight: str) -> float:
        item = figure.text(0, 0, text, fontsize=11, fontweight=weight, parse_math=False)
        extent = item.get_window_extent(renderer).width / figure.dpi
        item.remove()
        return float(extent)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks become boxes
        placed, x, row, end = [], 0.0, 0, 0
        for word in words:
            text, spaced = _printable(word.word), found.caption[end : word.start] != ""
            weight = "bold" if word.flagged else "normal"
            extent, end = size(text, weight) + 0.08, word.end
            x += 0.06 * spaced
            if x and x + extent > width - left - 2 * gap:
                x, row = 0.0, row + 1
            placed.append((text, word, weight, x, row, extent))
            x += extent
        block = (row + 1) * line
        height = max(block + bars + 0.8, 3.6)
        figure.set_size_inches(width, height)

        def axes(x: float, y: float, w: float, h: float) -> Any:
            return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

        image = axes(gap, gap, left - 2 * gap, height - 2 * gap)
        image.imshow(np.asarray(found.picture))
        image.set_anchor("N")
        image.set_axis_off()
        caption = axes(left, gap, width - left - gap, block)
        caption.set(xlim=(0, width - left - gap), ylim=(block, 0))
        caption.set_axis_off()
        for text, word, weight, x, row, extent in placed:
            frame = {"edgecolor": "black", "linewidth": 1.4} if word.flagged else {"edgecolor": "none"}
            face = colours(shade(word.score))
            caption.add_patch(Rectangle((x, row * line + 0.03), extent, line - 0.06, facecolor=face, **frame))
            caption.text(
                x + 0.04, row * line + line / 2, text, fontsize=11, va="center", parse_math=False,
                fontweight=weight,
            )  # fmt: skip
        chart = axes(left + 1.5, block + 0.75, width - left - 1.5 - gap, bars - 0.6)
        drawn = chart.barh(
            range(len(words)), [word.score for word in words], color=[colours(shade(word.score)) for word in words],
            edgecolor="0.5", linewidth=0.5,
        )  # fmt: skip
        for bar, word in zip(drawn, words, strict=True):
            if word.flagged:
                bar.set(hatch="////", edgecolor="black", linewidth=1.2)
        names = [f"[{text}]" if word.flagged else text for text, word, *_ in placed]
        chart.set_yticks(range(len(words)), [n if len(n) <= 22 else f"{n[:20]}…" for n in names], parse_math=False)
        chart.set_ylim(len(words) - 0.4, -0.6)
        chart.axvline(0, color="0.3", linewidth=0.8)
        if found.mode == "threshold":
            chart.axvline(found.eps, color="black", linewidth=0.8, linestyle="--")
        title = f"cosine {found.cosine:.3f}   CLIPScore {found.clip_score:.3f}   F-CLIPScore {found.f_clip_score:.2e}"
        suspect = f"below eps {found.eps:.2g}" if found.mode == "threshold" else "the lowest word"
        name_axes(chart, title, f"score of the word; framed, hatched: {suspect}")
        chart.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))
        chart.tick_params(labelsize=8)
        save_figure(figure, path)
