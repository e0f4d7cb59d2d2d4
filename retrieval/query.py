"""What a person asks: words, images, several of both with weights, minus words; turned into one unit vector."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mmalign.checks import in_range, one_of
from mmalign.encoders import Encoder
from mmalign.errors import InputError
from mmalign.imaging import DEFAULT_DECODING, DecodeSettings

from .scan import IMAGE_SUFFIXES
from .vectors import checked_rows

__all__ = [
    "Query",
    "Term",
    "as_terms",
    "as_vector",
    "embed_query",
    "find_image",
    "has_image_suffix",
    "kind_of",
    "names_image",
    "parse_term",
]


@dataclass(frozen=True)
class Term:
    """One part of a query: a text or an image, with a weight; negative weights push away.

    Attributes:
        value: a text; or with `kind="image"` a path, bytes, Pillow image, array or tensor.
        weight: finite and not 0.
        kind: "text" or "image".
    """

    value: Any
    weight: float = 1.0
    kind: str = "text"

    def __post_init__(self) -> None:
        one_of("kind", self.kind, ("text", "image"))
        in_range("weight", self.weight)
        if self.weight == 0:
            raise InputError(f"weight of {self.value!r} is 0; give another number, below 0 to push away")
        if self.kind == "text" and (not isinstance(self.value, str) or not self.value.strip()):
            raise InputError(f"the query {self.value!r} is empty; give some words or an image")


# A string, a path or picture, a Term, a list of these, or a vector.
Query = Any

_WEIGHT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)):(?=.)", re.DOTALL)


def parse_term(text: str, sign: float = 1.0, roots: Sequence[Path] = ()) -> Term:
    """A term as typed: `words`, `path/to/image.jpg`, either with a weight in front (`2:red`, `0.5:photo.jpg`).

    What names an existing file, here or in one of `roots`, is an image. `text:` and `image:` in front say which is
    meant.

    Raises:
        InputError: nothing but a weight, or what looks like an image file and is none.
    """
    weight, front = sign, ""
    match = _WEIGHT.match(text)
    if match and find_image(text, roots) is None:
        weight, front, text = sign * float(match[1]), match[0], text[match.end() :]
    if text.startswith("text:"):
        return Term(text[5:], weight)
    if text.startswith("image:"):
        return Term(find_image(text[6:], roots) or Path(text[6:]), weight, "image")
    path = find_image(text, roots)
    if path is None and names_image(text):
        raise InputError(f"{text!r} does not exist; {front}text:{text} searches for the words")
    return Term(text, weight) if path is None else Term(path, weight, "image")


def names_image(text: str) -> bool:
    """Whether a text looks like the name of an image file, be it there or not."""
    return has_image_suffix(text) or "/" in text or os.sep in text


def has_image_suffix(text: str) -> bool:
    """Whether a text ends as image files do."""
    return Path(text).suffix.lower() in IMAGE_SUFFIXES


def find_image(text: str, roots: Sequence[Path]) -> Path | None:
    """The file of that name here; else, if it looks like an image's name, in the first of the folders that has it."""
    places = [Path(text), *(root / text for root in roots)] if names_image(text) else [Path(text)]
    return next((place for place in places if _is_file(place)), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a NUL: words
        return False


def as_terms(query: Query) -> list[Term]:
    """Normalise what `ImageIndex.search` takes, except vectors. Strings are words, paths are images."""
    parts = list(query) if isinstance(query, (list, tuple)) else [query]
    terms = []
    for part in parts:
        if isinstance(part, Term):
            terms.append(part)
        elif isinstance(part, str):
            terms.append(Term(part))
        else:
            terms.append(Term(part, kind="image"))
    if not terms:
        raise InputError("the query is empty; give some words or an image")
    return terms


def embed_query(
    encoder: Encoder, terms: Sequence[Term], decode: DecodeSettings = DEFAULT_DECODING
) -> Float[np.ndarray, " dim"]:
    """The unit vector of the weighted sum of unit vectors.

    Args:
        encoder: embeds the terms.
        terms: at least one.
        decode: how images become pixels; that of the index which is asked.

    Raises:
        InputError: the encoder lacks a modality, or the terms cancel out.
        UnreadableImageError: an image cannot be read.
    """
    total = np.zeros(encoder.dim, np.float64)
    for term in terms:
        if term.kind == "text":
            vector = encoder.encode_texts([term.value])[0]
        else:
            vector = encoder.encode_images([term.value], decode=decode)[0]
        total += term.weight * vector.astype(np.float64)
    norm = float(np.linalg.norm(total))
    if norm < 1e-6:
        raise InputError("the terms of the query cancel out; change a weight")
    return (total / norm).astype(np.float32)


def kind_of(terms: Sequence[Term]) -> str:
    """Which background a query is compared with: "text" if any term with a positive weight is text, else "image"."""
    positive = [term for term in terms if term.weight > 0]
    return "text" if any(term.kind == "text" for term in positive or terms) else "image"


def as_vector(query: Query, dim: int) -> Float[np.ndarray, " dim"] | None:
    """A query that is a vector, [dim] or [1, dim], as a unit vector; `None` for any other query.

    Raises:
        InputError: another width, zero, or values that are not finite.
    """
    if not isinstance(query, np.ndarray) or query.ndim > 2 or query.size != query.shape[-1]:
        return None
    return checked_rows(query.reshape(1, -1), dim)[0]
