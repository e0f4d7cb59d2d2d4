"""Which words of a caption an image contradicts, by a CLIP as it is; and F-CLIPScore, which sums them up.

After "Extract Free Dense Misalignment from CLIP" (CLIP4DM), arXiv 2412.18404. A word's score is the attention that the
text's end token pays to it, times the gradient of the cosine of image and text with respect to that attention, over the
last layers: negative where more attention to the word would lower the cosine. No training, one backward pass a caption.

What the paper found: good for objects, weak for attributes, relations and counts (recall of wrong nouns 0.34, verbs
0.21, adjectives 0.19, numbers 0.08 with ViT-H/14). On one of its benchmarks (HAT) the average precision is below the
plain cosine's. Scores are absolute numbers that differ between encoders: `calibrate_eps` for each.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from .checks import at_least, in_range, one_of, visible_text
from .errors import InputError

if TYPE_CHECKING:
    from .encoders.encoder import Encoder

__all__ = [
    "EPS",
    "LAYERS",
    "TEMPLATE",
    "AttributedWords",
    "Mode",
    "Word",
    "WordAttribution",
    "WordScore",
    "attributed_words",
    "calibrate_eps",
    "f_clip_score",
    "relevance",
    "split_words",
    "token_attribution",
    "word_attribution",
    "word_means",
]

Mode: TypeAlias = Literal["threshold", "most_negative"]
EPS = -5e-5  # for LAION's ViT-H/14
LAYERS = 3
TEMPLATE = "A photo depicts "

_BATCH = 32


@dataclass(frozen=True, slots=True)
class Word:
    """A word and where it stands: `text[start:end]`."""

    word: str
    start: int
    end: int

    @property
    def is_punctuation(self) -> bool:
        """Whether it is made of nothing else."""
        return all(c in string.punctuation or unicodedata.category(c).startswith("P") for c in self.word)


@dataclass(frozen=True, slots=True)
class WordScore(Word):
    """A word, or several next to each other, with its score; negative where the image contradicts it."""

    score: float


@dataclass(frozen=True, slots=True)
class WordAttribution:
    """A caption's words with their scores, for one image.

    Attributes:
        caption: the text, without template.
        cosine: of image and template with caption.
        words: in their order, punctuation included; those beyond the context window are left out.
    """

    caption: str
    cosine: float
    words: tuple[WordScore, ...]

    def flagged(self, eps: float = EPS, mode: Mode = "threshold") -> list[WordScore]:
        """The words that the image contradicts, lowest first.

        "threshold": those below `eps`, punctuation aside. "most_negative": the lowest alone, even where it is positive.
        """
        one_of("mode", mode, get_args(Mode))
        if mode == "most_negative":
            return sorted(self.words, key=lambda word: word.score)[:1]
        return sorted((word for word in self._plain() if word.score < eps), key=lambda word: word.score)

    def phrases(self, eps: float = EPS) -> list[WordScore]:
        """Flagged words in their order, those next to each other joined, with the mean of their scores."""
        groups: list[list[WordScore]] = []
        previous = None
        for place, word in enumerate(self._plain()):
            if word.score < eps:
                if groups and previous == place - 1:
                    groups[-1].append(word)
                else:
                    groups.append([word])
                previous = place
        return [
            WordScore(
                " ".join(word.word for word in group),
                group[0].start,
                group[-1].end,
                sum(word.score for word in group) / len(group),
            )
            for group in groups
        ]

    def f_clip_score(self, eps: float = EPS, mode: Mode = "threshold") -> float:
        """`f_clip_score` of the words; punctuation counts in mode "most_negative" alone."""
        words = self._plain() if mode == "threshold" else self.words
        return float(f_clip_score([word.score for word in words], self.cosine, eps, mode))

    def _plain(self) -> list[WordScore]:
        return [word for word in self.words if not word.is_punctuation]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {"caption": self.caption, "cosine": self.cosine, "words": [asdict(word) for word in self.words]}


def word_attribution(
    encoder: Encoder,
    images: Any,
    captions: str | Sequence[str],
    *,
    template: str = TEMPLATE,
    layers: int | None = LAYERS,
    batch_size: int | None = None,
) -> list[WordAttribution]:
    """Score the words of captions, each for its image.

    The image tower runs once an image, without gradients.

    Args:
        encoder: a CLIP of open_clip or transformers whose text tower is causal; in float32, as half precision loses
            digits of gradients near 1e-5.
        images: what `Encoder.encode_images` takes, or image vectors, a row each; one for each caption, or one for all.
        captions: one or several.
        template: put in front of every caption, and left out of the words. Ends in a space, or is empty.
        layers: how many of the last text layers count, all where there are fewer; `None` for all.
        batch_size: captions a pass; 32 by default.

    Raises:
        InputError: the encoder is of another kind (SigLIP, CoCa, sentence encoders, joined encoders), images and
            captions are not as many, a caption is blank or not valid Unicode, or the template does not end in a space.
        UnreadableImageError: an image cannot be read.
    """
    captions = [captions] if isinstance(captions, str) else list(captions)
    at_least("batch_size", batch_size)
    _check(encoder, captions, template, layers)
    given = torch.as_tensor(images) if getattr(images, "ndim", 0) == 2 else None
    rows = torch.from_numpy(encoder.encode_images(images)) if given is None else given.detach()
    if len(rows) not in (1, len(captions)):
        raise InputError(f"{len(rows)} images for {len(captions)} captions; give one each, or one image for all")
    if rows.shape[1] != encoder.dim:
        raise InputError(f"image vectors have {rows.shape[1]} dimensions and those of {encoder.spec!r} {encoder.dim}")
    rows, size, found = rows.expand(len(captions), -1), batch_size or _BATCH, []
    for start in range(0, len(captions), size):
        batch = captions[start : start + size]
        results = attributed_words(encoder, rows[start : start + size], batch, template=template, layers=layers)
        for caption, (words, scores, cosine) in zip(batch, results, strict=True):
            scored = (WordScore(w.word, w.start, w.end, s) for w, s in zip(words, scores.tolist(), strict=True))
            found.append(WordAttribution(caption, float(cosine), tuple(scored)))
    return found


class AttributedWords(NamedTuple):
    """Words of one caption, their scores, and the cosine; tensors in the graph of the image vector, if it has one."""

    words: list[Word]
    scores: Float[Tensor, " words"]
    cosine: Float[Tensor, ""]


def attributed_words(
    encoder: Encoder,
    image_embeds: Float[Tensor, "n dim"],
    captions: Sequence[str],
    *,
    template: str = TEMPLATE,
    layers: int | None = LAYERS,
) -> list[AttributedWords]:
    """`word_attribution` of image vectors in one batch, as tensors; differentiable where the vectors are.

    Raises:
        InputError: as `word_attribution`.
    """
    _check(encoder, captions, template, layers)
    attended = encoder.attend_texts([template + caption for caption in captions], layers)  # type: ignore[attr-defined]
    with torch.inference_mode(False), torch.enable_grad():
        texts = normalize(attended.features, dim=-1)
        images = normalize(image_embeds.to(texts), dim=-1)
        cosines = (images * texts).sum(dim=-1)
        # Rows do not meet, so that the gradients of the sum are those of each caption's cosine.
        gradients = torch.autograd.grad(cosines.sum(), attended.attention, create_graph=images.requires_grad)
        found = relevance(attended.attention, gradients)
        if not images.requires_grad:
            found, cosines = found.detach(), cosines.detach()
        results = []
        for row, (caption, end) in enumerate(zip(captions, attended.end.tolist(), strict=True)):
            scores = token_attribution(found[row], end)
            words, counts, skipped = _counted(encoder, template, caption, len(scores), attended.full[row])
            means = word_means(scores[skipped:], counts)
            results.append(AttributedWords(words[: len(means)], means, cosines[row]))
    return results


def relevance(
    attention: Sequence[Float[Tensor, "*batch heads n n"]], gradients: Sequence[Float[Tensor, "*batch heads n n"]]
) -> Float[Tensor, "*batch n n"]:
    """R = mean over layers of the mean over heads of A * dS/dA; no ReLU, and no product of layers.

    Args:
        attention: probabilities A of each layer that counts.
        gradients: of the cosine, with respect to each, through all later layers.
    """
    layers = [(a * g).mean(dim=-3) for a, g in zip(attention, gradients, strict=True)]
    return torch.stack(layers).mean(dim=0)


def token_attribution(relevance: Float[Tensor, "n n"], end: int) -> Float[Tensor, " tokens"]:
    """r_k = R[end, k] for all tokens k between the begin token, 0, and the end token."""
    return relevance[end, 1:end]


def word_means(token_scores: Float[Tensor, " tokens"], counts: Sequence[int]) -> Float[Tensor, " words"]:
    """Mean score of the tokens of each word, of which `counts` says how many it has.

    Where there are fewer tokens than `counts` wants, the last word has what is left; words without any are left out.
    """
    groups = token_scores[: sum(counts)].split([*_fitting(counts, len(token_scores))])
    means = [group.mean() for group in groups]
    return torch.stack(means) if means else token_scores.new_zeros(0)


def f_clip_score(
    word_scores: Float[Tensor, " words"] | Sequence[float],
    cosine: Float[Tensor, ""] | float,
    eps: float = EPS,
    mode: Mode = "threshold",
) -> Float[Tensor, ""]:
    """F-CLIPScore: (1 - max(cosine, 0)) times the sum of the scores of flagged words.

    Nearer to 0 is better aligned; 0 where no word is flagged. Differentiable.

    Args:
        word_scores: of the words that count.
        cosine: of image and text, without logit scale.
        eps: a word below is flagged.
        mode: "threshold", or "most_negative", which takes the lowest word alone, whatever it is; the result can be
            above 0 then.
    """
    one_of("mode", mode, get_args(Mode))
    scores = word_scores if isinstance(word_scores, Tensor) else torch.tensor(word_scores, dtype=torch.float64)
    if mode == "threshold":
        flagged = scores[scores < eps].sum()
    else:
        flagged = scores.min() if len(scores) else scores.sum()
    return (1 - torch.as_tensor(cosine, dtype=scores.dtype).clamp(min=0)) * flagged


def calibrate_eps(matching: Iterable[WordAttribution], *, flagged_share: float = 0.05) -> float:
    """The eps at which a share of the words of captions that fit their images would be flagged; at most 0. Ours.

    Args:
        matching: of pairs that are known to match, by the encoder and layers that eps is for; hundreds of words.
        flagged_share: in [0, 1]; of words, punctuation aside.

    Raises:
        InputError: there is no word.
    """
    in_range("flagged_share", flagged_share, 0, 1)
    scores = [word.score for one in matching for word in one.words if not word.is_punctuation]
    if not scores:
        raise InputError("there are no words to calibrate by; give attributions of pairs that match")
    return min(0.0, float(torch.tensor(scores, dtype=torch.float64).quantile(flagged_share)))


def split_words(text: str) -> list[Word]:
    """Words as the paper counts them: between spaces, with `.` and `,` words of their own."""
    return [Word(found[0], *found.span()) for found in re.finditer(r"[.,]|[^\s.,]+", text)]


def _check(encoder: Any, captions: Sequence[str], template: str, layers: int | None) -> None:
    at_least("layers", layers)
    if not hasattr(encoder, "attend_texts"):
        from .encoders.attention import attention_undefined

        raise attention_undefined(encoder, f"{type(encoder).__name__} is no CLIP")
    if template and not template[-1].isspace():
        raise InputError(f"template is {template!r}; end it in a space, as words are split there, or leave it empty")
    for caption in captions:
        visible_text("caption", caption)


def _counted(encoder: Any, template: str, caption: str, tokens: int, full: bool) -> tuple[list[Word], list[int], int]:
    """Words of a caption, how many tokens each has, and how many tokens of the template precede them."""
    skipped = sum(encoder.count_tokens(chunk) for chunk in template.split())
    words, counts = [], []
    for chunk in re.finditer(r"\S+", caption):
        inside = [Word(w.word, w.start + chunk.start(), w.end + chunk.start()) for w in split_words(chunk[0])]
        alone = [encoder.count_tokens(word.word) for word in inside]
        whole = encoder.count_tokens(chunk[0])
        if sum(alone) != whole:  # a token runs across words, as that of three dots
            inside, alone = [Word(chunk[0], *chunk.span())], [whole]
        kept = [(word, count) for word, count in zip(inside, alone, strict=True) if count]
        words += [word for word, _ in kept]
        counts += [count for _, count in kept]
    if skipped + sum(counts) != tokens and not (full and skipped + sum(counts) > tokens):
        raise InputError(
            f"the tokenizer of {encoder.spec!r} makes {tokens} tokens of {template + caption!r} and "
            f"{skipped + sum(counts)} of its words one by one; write the caption with plain words and spaces"
        )
    return words, counts, skipped


def _fitting(counts: Sequence[int], tokens: int) -> Iterable[int]:
    """Counts, cut where the tokens end."""
    for count in counts:
        if tokens <= 0:
            return
        yield min(count, tokens)
        tokens -= count
