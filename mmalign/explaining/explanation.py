"""Where a caption and an image disagree, word by word, for people."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image

from ..checks import in_range, one_of
from ..errors import InputError
from ..files import whole_file
from ..imaging import read_image
from ..word_attribution import (
    EPS,
    LAYERS,
    TEMPLATE,
    Mode,
    WordAttribution,
    WordScore,
    word_attribution,
)
from .calibrating import WordCalibration
from .drawing import check_picture, draw_explanation, printable

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

__all__ = ["ExplainedWord", "Explanation", "explain", "explain_many"]

_EPS_IS_FOR = "open_clip:ViT-H-14/laion2b_s32b_b79k"
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
            pieces += [printable(self.caption[place : phrase.start]), before]
            pieces += [printable(self.caption[phrase.start : phrase.end]), after]
            place = phrase.end
        return "".join([*pieces, printable(self.caption[place:])]).strip()

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
            draw_explanation(self, fresh)
        return target


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
        encoder: a CLIP whose text tower is causal (see `mmalign.word_attribution`), or its spec for `load_encoder`. In
            float32; half precision may move scores by some percent.
        eps: words that score below are suspect; at most 0. By default that of `calibration`, or else -5e-5, which was
            measured for LAION's ViT-H/14 alone: scores are absolute numbers that differ between encoders.
        mode: "most_negative" flags the lowest word alone, as where one word is known to be wrong.
        template: put in front of the text. Ends in a space, or is empty.
        layers: how many of the last text layers count; `None` for all.
        calibration: of `calibrate`, or the file it was saved to; in place of `eps`.

    Raises:
        InputError: an encoder of another kind, a text that is blank or not valid Unicode, an option out of range, or a
            calibration of another encoder, template or number of layers.
        UnreadableImageError: the image cannot be read.
    """
    options: dict[str, Any] = {"eps": eps, "mode": mode, "template": template, "layers": layers}
    return explain_many(image, [text], encoder=encoder, calibration=calibration, **options)[0]


def explain_many(
    image: Any,
    texts: str | Sequence[str],
    *,
    encoder: Encoder | str | os.PathLike[str],
    eps: float | None = None,
    mode: Mode = "threshold",
    template: str = TEMPLATE,
    layers: int | None = LAYERS,
    calibration: WordCalibration | str | os.PathLike[str] | None = None,
) -> list[Explanation]:
    """`explain` of several texts, or one, for one image, which is encoded once."""
    from ..encoders import load_encoder

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
    found = word_attribution(encoder, [pixels], texts, template=template, layers=layers)
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((_PICTURE, _PICTURE))
    limit = eps if eps is not None else EPS if calibration is None else calibration.eps
    source: Any = "given" if eps is not None else "default" if calibration is None else "calibration"
    return [_explanation(one, encoder, limit, source, mode, calibration, picture) for one in found]


def _explanation(
    found: WordAttribution,
    encoder: Encoder,
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
        encoder=encoder.spec,
        cosine=found.cosine,
        clip_score=2.5 * max(found.cosine, 0.0),
        f_clip_score=found.f_clip_score(eps, mode),
        words=words,
        phrases=tuple(found.phrases(eps) if mode == "threshold" else suspects),
        eps=eps,
        eps_from=eps_from,
        mode=mode,
        notes=tuple(_notes(found, encoder, eps, eps_from, mode, calibration)),
        picture=picture,
    )


def _notes(
    found: WordAttribution, encoder: Encoder, eps: float, eps_from: str, mode: Mode, calibration: WordCalibration | None
) -> Iterable[str]:
    end = max((word.end for word in found.words), default=0)
    if rest := found.caption[end:].split():
        yield f"the text is cut after {printable(found.caption[:end])[-20:]!r}; {len(rest):,} words more are not read"
    if encoder.dtype != torch.float32:
        half = str(encoder.dtype).removeprefix("torch.")
        yield f"the encoder is in {half}, which may move scores by some percent; load it with dtype='float32'"
    if mode == "most_negative":
        return
    if eps_from == "default" and encoder.spec != _EPS_IS_FOR:
        yield (
            f"eps {eps:g} was measured for {_EPS_IS_FOR}, not for {encoder.spec!r}, whose scores are of another size; "
            "calibrate it with `mmalign eval words`"
        )
    if calibration is not None and calibration.words < _FEW:
        yield f"eps {eps:g} was measured on no more than {calibration.words} words"
