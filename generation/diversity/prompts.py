"""Prompts that ask for variety in one respect and leave the rest open, after the four dimensions of DivGenBench."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from mmalign.checks import at_least, one_of
from mmalign.errors import InputError

from .keywords import BASE_PROMPTS, CONFLICTS, KEYWORDS, pluralise, with_article

__all__ = ["DIMENSIONS", "PromptSpec", "diversity_prompts"]

DIMENSIONS = tuple(KEYWORDS)
_WITH_SCENE = ("style", "tonal")
_Row: TypeAlias = "list[str]"


@dataclass(frozen=True)
class PromptSpec:
    """A prompt and what it was made of.

    Attributes:
        text: the prompt.
        dimension: identity, style, layout or tonal.
        keywords: axis -> keyword. A detector for layout looks for `keywords["object"]`.
    """

    text: str
    dimension: str
    keywords: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, the text as `prompt`."""
        return {"prompt": self.text, "dimension": self.dimension, "keywords": self.keywords}


def diversity_prompts(
    dimension: str,
    n: int,
    *,
    seed: int = 0,
    keywords: Mapping[str, Sequence[str]] | None = None,
    base_prompts: Sequence[str] | None = None,
) -> list[PromptSpec]:
    """n prompts of a dimension, each keyword of an axis equally often to within one; a function of the arguments.

    identity: a portrait of age x ethnicity x gender x facial feature, without those that contradict each other.
    style: a painting of a base prompt in a style. layout: two to five objects of a class on a plain background. tonal:
    a base prompt with a keyword of saturation, contrast or brightness. No combination comes again before nearly all
    have come, but for what is contradicted
    by half of an axis, such as beards.

    Templates and counts are those of arXiv 2512.24146; its keyword files are not released, so the words are ours and
    figures cannot be compared with the paper's. The paper has n = 800 of each.

    Args:
        dimension: identity, style, layout or tonal.
        n: how many, 1 or more.
        seed: which combinations.
        keywords: other words for an axis: age, ethnicity, gender, feature (behind "with"); style; object (singular),
            count; saturation, contrast, brightness. Axes that are left out keep theirs.
        base_prompts: other scenes, for style and tonal.

    Raises:
        InputError: another dimension or axis, an axis without a keyword or with one twice, or keywords of which too
            many contradict each other.
    """
    one_of("dimension", dimension, DIMENSIONS)
    at_least("n", n)
    words = _words(dimension, keywords or {})
    if base_prompts is not None and dimension not in _WITH_SCENE:
        raise InputError(f"base_prompts have no place in the {dimension} template; leave them out")
    scenes = _distinct("base_prompts", BASE_PROMPTS if base_prompts is None else base_prompts)
    axes: dict[str, list[Any]] = {**words}
    if dimension == "tonal":  # one axis: of a prompt, one keyword
        axes = {"tone": [(axis, word) for axis, found in words.items() for word in found]}
    if dimension in _WITH_SCENE:
        axes["scene"] = scenes
    rng = np.random.default_rng(seed)
    fits = _fits(list(axes))
    axes = _usable(axes, fits)
    shuffled = [[values[i] for i in rng.permutation(len(values))] for values in axes.values()]
    rows = [
        [values[place] for values, place in zip(shuffled, places, strict=True)]
        for places in _spread(n, [len(values) for values in shuffled])
    ]
    if dimension == "identity":
        _Table(rows, shuffled, fits).mend(rng)
    return [_spec(dimension, dict(zip(axes, row, strict=True))) for row in rows]


def _spec(dimension: str, row: Mapping[str, Any]) -> PromptSpec:
    if dimension == "identity":
        who = with_article(f"{row['age']} {row['ethnicity']} {row['gender']}")
        return PromptSpec(f"a high quality portrait photo of {who} with {row['feature']}", dimension, dict(row))
    if dimension == "style":
        text = f"a painting in the style of {row['style']}, depicting {row['scene']}"
        return PromptSpec(text, dimension, dict(row))
    if dimension == "layout":
        return PromptSpec(f"{row['count']} {pluralise(row['object'])} on a plain background", dimension, dict(row))
    axis, word = row["tone"]
    return PromptSpec(f"{row['scene']}, {word}", dimension, {axis: word, "scene": row["scene"]})


def _words(dimension: str, given: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    own = KEYWORDS[dimension]
    for axis in given:
        if axis not in own:
            raise InputError(f"keywords name the axis {axis!r}; {dimension} has {', '.join(own)}")
    return {axis: _distinct(f"keywords of {axis}", given.get(axis, own[axis])) for axis in own}


def _distinct(name: str, words: Sequence[str]) -> list[str]:
    if isinstance(words, str) or not all(isinstance(word, str) and word.strip() for word in words):
        raise InputError(f"{name} are {words!r}; give a list of words that are not blank")
    found = [word.strip() for word in words]
    if not found:
        raise InputError(f"{name} are an empty list; give one or more, or leave it out for ours")
    twice = [word for word, count in Counter(found).items() if count > 1]
    if twice:
        raise InputError(f"{name} have {twice[0]!r} twice; give each once")
    return found


def _spread(n: int, sizes: Sequence[int]) -> list[list[int]]:
    """n rows of places, one an axis: of every run from the start, each place of an axis equally often to within one.

    All combinations come once before one comes again. By induction over the axes: those before repeat after S rows;
    within lcm(S, size) rows the pairs with this axis differ, and a shift by one for each such block makes the blocks
    differ.
    """
    columns: list[list[int]] = []
    before = 1
    for size in sizes:
        block, period = math.lcm(before, size), before * size
        columns.append([(i % period + i % period // block) % size for i in range(n)])
        before = period
    return [list(row) for row in zip(*columns, strict=True)]


def _fits(axes: Sequence[str]) -> Callable[[Sequence[Any]], bool]:
    rules = [
        (axes.index(one), ones, axes.index(other), others)
        for (one, ones), (other, others) in CONFLICTS
        if one in axes and other in axes
    ]
    return lambda row: not any(row[i] in ones and row[j] in others for i, ones, j, others in rules)


def _usable(axes: dict[str, list[Any]], fits: Callable[[Sequence[Any]], bool]) -> dict[str, list[Any]]:
    """The axes without keywords that contradict all others of another axis; there are some where words are given."""
    if "feature" not in axes:
        return axes
    seen: list[set[Any]] = [set() for _ in axes]
    for row in itertools.product(*axes.values()):
        if fits(row):
            for values, value in zip(seen, row, strict=True):
                values.add(value)
    if not all(seen):
        raise InputError("keywords contradict each other in every combination; give others for gender, age or feature")
    return {
        axis: [word for word in words if word in found] for (axis, words), found in zip(axes.items(), seen, strict=True)
    }


class _Table:
    """Rows that are mended in place, keeping each keyword's count to within one and rows distinct if possible."""

    def __init__(self, rows: list[_Row], axes: Sequence[Sequence[str]], fits: Callable[[Sequence[Any]], bool]) -> None:
        self.rows, self.axes, self.fits = rows, axes, fits
        self.used = Counter(map(tuple, rows))
        self.counts = [Counter(row[axis] for row in rows) for axis in range(len(axes))]

    def mend(self, rng: np.random.Generator) -> None:
        """Rid all rows of contradictions.

        Raises:
            InputError: that cannot be done.
        """
        most = math.ceil(len(self.rows) / sum(map(self.fits, itertools.product(*self.axes))))
        for limit in (most, most + 1, len(self.rows) + 1):  # what contradicts much comes again, for its count
            for i in [number for number, row in enumerate(self.rows) if not self.fits(row)]:
                _ = self._exchange(i, limit, rng) or self._replace(i, limit)
        if not all(map(self.fits, self.rows)):
            raise InputError(
                "keywords contradict each other too often to come equally often; give others, or another n"
            )

    def _exchange(self, i: int, limit: int, rng: np.random.Generator) -> bool:
        """Let a row and another one exchange a keyword."""
        for j, axis in itertools.product(rng.permutation(len(self.rows)).tolist(), range(len(self.axes))):
            mine = _with(self.rows[i], axis, self.rows[j][axis])
            other = _with(self.rows[j], axis, self.rows[i][axis])
            if mine != other and self._free(mine, limit) and self._free(other, limit):
                self._put(i, mine)
                self._put(j, other)
                return True
        return False

    def _replace(self, i: int, limit: int) -> bool:
        """Give a row a keyword that has come less often than its own."""
        for axis, words in enumerate(self.axes):
            counts, old = self.counts[axis], self.rows[i][axis]
            for word in words:
                new = _with(self.rows[i], axis, word)
                if counts[word] < counts[old] and self._free(new, limit):
                    counts[old] -= 1
                    counts[word] += 1
                    self._put(i, new)
                    return True
        return False

    def _free(self, row: _Row, limit: int) -> bool:
        return self.fits(row) and self.used[tuple(row)] < limit

    def _put(self, i: int, row: _Row) -> None:
        self.used[tuple(self.rows[i])] -= 1
        self.used[tuple(row)] += 1
        self.rows[i] = row


def _with(row: _Row, axis: int, word: str) -> _Row:
    return [*row[:axis], word, *row[axis + 1 :]]
