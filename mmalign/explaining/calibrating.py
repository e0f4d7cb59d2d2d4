"""From which score on a word counts as suspect, measured for an encoder on captions that fit their images."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, reason_of
from ..files import whole_file
from ..word_attribution import (
    LAYERS,
    TEMPLATE,
    WordAttribution,
    calibrate_eps,
)

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

__all__ = ["WordCalibration", "calibration_of"]

_FORMAT = "mmalign word calibration 1"


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


def calibration_of(
    encoder: Encoder,
    found: Sequence[WordAttribution],
    images: int,
    flagged_share: float,
    template: str,
    layers: int | None,
) -> WordCalibration:
    """What attributions of captions that fit their images say."""
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
