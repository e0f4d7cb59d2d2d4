"""How well scores tell captions that fit their image from those that do not, and find the word that is wrong.

Methods card CLIP4DM, section 5. What is to be found, the positive class, are the wrong captions; scores are higher for
captions that fit, as those of the cosine and of F-CLIPScore are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ..errors import InputError
from ._arrays import as_numpy

__all__ = ["sentence_auroc", "sentence_average_precision", "word_accuracy"]


def sentence_auroc(scores: Float[np.ndarray, " caption"], wrong: Bool[np.ndarray, " caption"]) -> float:
    """Chance that a wrong caption scores below a right one, ties counting half; 0.5 by a coin.

    Args:
        scores: higher for captions that fit.
        wrong: which captions do not.

    Raises:
        InputError: not one flag a score, a score is NaN, or all captions are of one kind.
    """
    values, flags = _checked(scores, wrong)
    _, level, count = np.unique(values, return_inverse=True, return_counts=True)
    mid_rank = (np.cumsum(count) - (count - 1) / 2)[level]  # from 1; those of one score share the mean of their ranks
    right = int((~flags).sum())
    above = mid_rank[~flags].sum() - right * (right + 1) / 2
    return float(above / (right * int(flags.sum())))


def sentence_average_precision(scores: Float[np.ndarray, " caption"], wrong: Bool[np.ndarray, " caption"]) -> float:
    """Mean precision over the wrong captions, the lowest score first; by a coin, the share of wrong captions.

    Captions of one score are found together: each of them has the precision at the last.

    Raises:
        InputError: as `sentence_auroc`.
    """
    values, flags = _checked(scores, wrong)
    _, level, count = np.unique(values, return_inverse=True, return_counts=True)
    found = np.bincount(level, weights=flags)
    precision = np.cumsum(found) / np.cumsum(count)
    return float((precision * found).sum() / flags.sum())


def word_accuracy(
    word_scores: Sequence[Float[np.ndarray, " word"]], wrong: Sequence[Bool[np.ndarray, " word"]]
) -> float:
    """Share of wrong captions whose lowest word is one that is wrong, in [0, 1].

    Where several words share the lowest score, the share of them that is wrong counts.

    Args:
        word_scores: of the words of each wrong caption.
        wrong: which words of it are wrong; some, and perhaps all.

    Raises:
        InputError: there is no caption, not one flag a word, a score is NaN, or a caption has no wrong word.
    """
    if not len(word_scores) or len(word_scores) != len(wrong):
        raise InputError(f"{len(word_scores)} captions with scores and {len(wrong)} with flags; give as many, and some")
    hits = []
    for place, (scores, flags) in enumerate(zip(word_scores, wrong, strict=True)):
        values, marked = _paired(scores, flags, f"caption {place}: ")
        if not marked.any():
            raise InputError(f"caption {place} has no wrong word; leave it out")
        hits.append(marked[values == values.min()].mean())
    return float(np.mean(hits))


def _checked(scores: Any, wrong: Any) -> tuple[np.ndarray, np.ndarray]:
    values, flags = _paired(scores, wrong)
    if flags.all() or not flags.any():
        kind = "none" if not flags.any() else "all"
        raise InputError(f"{kind} of {len(flags)} captions are wrong; give right and wrong ones")
    return values, flags


def _paired(scores: Any, wrong: Any, where: str = "") -> tuple[np.ndarray, np.ndarray]:
    values, flags = as_numpy(scores).astype(np.float64), as_numpy(wrong)
    if values.ndim != 1 or values.shape != flags.shape or (flags.size and not np.isin(flags, (0, 1)).all()):
        raise InputError(
            f"{where}scores have shape {values.shape} and flags {flags.shape}; give a score one true or false"
        )
    if np.isnan(values).any():
        raise InputError(f"{where}score {int(np.isnan(values).argmax())} is NaN; leave that one out")
    return values, flags.astype(bool)
