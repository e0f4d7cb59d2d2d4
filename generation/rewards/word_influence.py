"""How much each word of a prompt does for an image's score, by any reward: by leaving it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from mmalign.errors import InputError
from mmalign.word_attribution import Word, split_words

from .embedding import EmbeddingReward
from .reward import AnyReward, Reward, as_reward

__all__ = ["WordInfluence", "word_influence"]


class WordInfluence(NamedTuple):
    """A word, and the score of the prompt minus that of the prompt without it; below 0, the image contradicts it."""

    word: str
    influence: float


def word_influence(reward: AnyReward, image: Any, prompt: str) -> list[WordInfluence]:
    """The influence of every word, in their order, in the reward's own units.

    Ours, and no published method: occlusion, for rewards whose inside cannot be looked into. It costs a score a word,
    of texts alone where the reward compares vectors. A prompt without a word is another sentence, which can score
    higher or lower for its sound alone; compare words of one prompt rather than numbers with zero. For a CLIP,
    `mmalign.word_attribution` is published and cheaper.

    Args:
        reward: any that looks at the prompt.
        image: one, of the kinds that `Reward` takes.
        prompt: of two words or more. Punctuation is no word, and stays.

    Raises:
        InputError: the reward does not look at the prompt, or the prompt has fewer than two words.
        UnreadableImageError: the image cannot be read.
    """
    reward = as_reward(reward)
    if not reward.uses_text:
        raise InputError(f"the reward {reward.name} does not look at the prompt; give one that does, as CLIPScore")
    words = [word for word in split_words(prompt) if not word.is_punctuation]
    if len(words) < 2:
        raise InputError(f"prompt is {prompt!r}; give one of two words or more, as one word cannot be left out")
    prompts = [prompt, *(_without(prompt, word) for word in words)]
    if isinstance(reward, EmbeddingReward):
        reward = _OneImage(reward)
    whole, *others = reward([image] * len(prompts), prompts).tolist()
    return [WordInfluence(word.word, whole - other) for word, other in zip(words, others, strict=True)]


def _without(prompt: str, word: Word) -> str:
    return " ".join((prompt[: word.start] + prompt[word.end :]).split())


class _OneImage(Reward):
    """A reward of vectors that is asked of one image over and over."""

    def __init__(self, reward: EmbeddingReward) -> None:
        self._reward = reward
        self._image: Tensor | None = None

    def score(self, images: Sequence[Float[Tensor, "3 height width"]], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        if self._image is None:
            self._image = self._reward.image_embeds(images[:1])
        texts = self._reward.text_embeds(prompts)
        return self._reward.score_embeds(self._image.expand(len(prompts), -1), texts)
