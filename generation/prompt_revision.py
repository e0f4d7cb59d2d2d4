"""What a prompt is revised by between rounds of best-of-N: the words that the best image so far misses.

Draw, look at what is missing, ask again in other words: so do PRIS (Prompt Redesign for Inference-time Scaling) and,
among paraphrases in one pass, Fast Prompt Alignment (arXiv 2412.08639), where language models write. Any callable can
here. `emphasise_misaligned`, which needs no model, is ours; what it does for trained generators was not measured.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image

from mmalign.errors import InputError
from mmalign.word_attribution import word_attribution

from .images import GeneratedImage
from .rewards import EmbeddingReward, Reward
from .rewards.word_influence import word_influence

__all__ = ["Misalignments", "Revise", "RevisionRequest", "emphasise_misaligned", "misaligned_words"]

# Of an image and its prompt: words, each with its influence on the score.
Misalignments: TypeAlias = "Callable[[Image.Image, str], Sequence[tuple[str, float]]]"
Revise: TypeAlias = "Callable[[RevisionRequest], str | None]"

_SMALL_WORDS = frozenset(
    (
        "a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "has", "have", "her", "his", "in", "into", "is",
        "it", "its", "of", "on", "or", "out", "over", "that", "the", "their", "them", "this", "to", "up", "was", "were",
        "which", "while", "who", "with",
    )
)  # fmt: skip


@dataclass(frozen=True)
class RevisionRequest:
    """What is known after a round.

    Attributes:
        prompt: the original one; all scores are of it.
        drawn: the prompt of this round.
        round: from 1.
        image: the best so far, of any round.
        scores: final scores of this round, best first.
        words: of `prompt` in their order, with the influence of each on the score of `image`; the image misses, or
            contradicts, those with the least. Empty where the reward does not see the prompt.
    """

    prompt: str
    drawn: str
    round: int
    image: GeneratedImage
    scores: Sequence[float]
    words: Sequence[tuple[str, float]]


def emphasise_misaligned(request: RevisionRequest, *, most: int = 2) -> str | None:
    """The prompt with the words that its image misses most put in front once more, as in `red, bicycle: ...` (ours).

    These are words with less than the mean influence; articles, prepositions and the like do not count. They are
    compared with each other, and not with 0, which for a word left out means little.

    Args:
        request: what `best_of_n` gives.
        most: how many words.

    Returns:
        `None`, which ends the rounds, where there is no such word or the prompt would be the same again.
    """
    found: dict[str, float] = {}
    for text, influence in request.words:
        word = re.sub(r"^\W+|\W+$", "", text)
        if word and word.lower() not in _SMALL_WORDS:
            found[word] = min(influence, found.get(word, influence))
    mean = sum(found.values()) / max(len(found), 1)
    worst = sorted((word for word, influence in found.items() if influence < mean), key=lambda word: found[word])[:most]
    revised = f"{', '.join(worst)}: {request.prompt}"
    return revised if worst and revised != request.drawn else None


def misaligned_words(reward: Reward, image: Image.Image, prompt: str) -> list[tuple[str, float]]:
    """Words with their influence on the score of an image, in their order, punctuation left out.

    By `mmalign.word_attribution` where it is defined for the reward's encoder (a causal CLIP), otherwise by
    `word_influence`; the two have other units. Empty where the reward does not see the prompt, or it is one word.
    """
    if not reward.uses_text:
        return []
    with contextlib.suppress(InputError):  # not defined for this encoder
        if isinstance(reward, EmbeddingReward):
            (found,) = word_attribution(reward.encoder, [image], prompt)
            return [(word.word, word.score) for word in found.words if not word.is_punctuation]
    with contextlib.suppress(InputError):  # one word
        return [(word, influence) for word, influence in word_influence(reward, image, prompt)]
    return []
