"""Which layer of each of two frozen encoders to align: the pair with the most alike neighbourhoods or geometry.

Mutual kNN over paired rows, as "With Limited Data for Multimodal Alignment, Let the STRUCTURE Guide You", arXiv
2506.16895, picks layers; calibration by permuted rows after "Revisiting the Platonic Representation Hypothesis: An
Aristotelian View", arXiv 2602.14486. Unbiased CKA of unit rows ("cka") looks at all distances, not only at the
nearest. The scores are those of the rows given: choose on training rows, report on others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .checks import at_least, one_of
from .errors import InputError
from .progress import progress_bar
from .representation_similarity import check_rows, nearest_neighbours, unbiased_hsic

__all__ = ["LayerScores", "layer_scores", "neighbour_count"]

SCORES = ("mutual-knn", "cka")
RULES = ("rice", "sqrt", "sturges")
SIGNIFICANCE = 0.05  # share of permutations whose best pair may exceed the threshold


@dataclass(frozen=True, eq=False)
class LayerScores:
    """The whole table, not only the winner: a flat table means that the choice hardly matters.

    Attributes:
        table: score of x layer i and y layer j: mutual kNN, in [0, 1], or unbiased CKA, at most 1; 0 for a layer whose
            rows are all the same.
        k: neighbours per row; 0 for CKA, which has none.
        n: rows.
        best: (i, j) of the largest score, the first of equals.
        calibrated: max(0, (score - threshold) / (1 - threshold)): 0 is no better than chance, 1 is perfect. `None`
            without permutations.
        threshold: what the best pair of the table reaches by chance at most, in 95 % of permutations.
    """

    table: Float[np.ndarray, "layers_x layers_y"]
    k: int
    n: int
    best: tuple[int, int]
    calibrated: Float[np.ndarray, "layers_x layers_y"] | None = None
    threshold: float | None = None

    @property
    def chance(self) -> float:
        """Expected score of unrelated layers; 0 for CKA."""
        return self.k / (self.n - 1)


def layer_scores(
    x_layers: Sequence[Float[np.ndarray, "n _"] | Float[Tensor, "n _"]],
    y_layers: Sequence[Float[np.ndarray, "n _"] | Float[Tensor, "n _"]],
    *,
    score: str = "mutual-knn",
    k: str | int = "rice",
    permutations: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> LayerScores:
    """Mutual kNN, or CKA, of every layer of one encoder with every layer of the other, on the same items in order.

    The neighbours of a layer are found once, in its own precision (float16 is widened) and on its own device; memory
    is one layer plus n^2 bytes for every eight layers of x. 5,000 rows are usual; time grows with n^2.

    Args:
        x_layers: one matrix per layer, arrays (memory maps too) or tensors; widths may differ.
        y_layers: the other encoder's.
        score: "mutual-knn", as published with STRUCTURE, or "cka".
        k: neighbours per row: a number, or a rule of `neighbour_count`.
        permutations: how often the rows of one side are shuffled to learn what chance gives; 200 in the paper, 0 for
            none. The largest score of each shuffled table is kept, so that the threshold holds for the best of all
            pairs. For mutual kNN alone.
        seed: of the permutations.
        progress: show a bar on standard error.

    Raises:
        InputError: no layer, layers with different numbers of rows, rows that are not finite, too few rows for k.
    """
    one_of("score", score, SCORES)
    if score == "cka":
        if permutations or k != "rice":
            raise InputError("k and permutations are for the score 'mutual-knn'; leave them out with 'cka'")
        return _cka_scores(x_layers, y_layers, progress)
    at_least("permutations", permutations, 0)
    if permutations and permutations < 1 / SIGNIFICANCE:
        raise InputError(f"permutations is {permutations}; give 0 for none, or {1 / SIGNIFICANCE:.0f} or more")
    n = _row_count(x_layers, y_layers)
    count = neighbour_count(n, k)
    with progress_bar(
        "comparing layers", len(x_layers) + len(y_layers) * 2, unit="layers", enabled=progress
    ) as advance:
        lists: dict[str, list[Int[np.ndarray, "n k"] | None]] = {"x": [], "y": []}
        for side, layers in (("x", x_layers), ("y", y_layers)):
            for index, layer in enumerate(layers):
                lists[side].append(_neighbours(f"{side} layer {index}", layer, count))
                advance()
        rng = np.random.default_rng(seed)
        shuffles = [np.arange(n), *(rng.permutation(n) for _ in range(permutations))]
        scores = np.zeros((len(shuffles), len(x_layers), len(y_layers)))
        for j, of_y in _shared(lists["x"], lists["y"], shuffles, count):
            scores[:, :, j] = of_y
            advance()
    table = scores[0]
    best = np.unravel_index(table.argmax(), table.shape)
    result = LayerScores(table, count, n, (int(best[0]), int(best[1])))
    if not permutations:
        return result
    threshold = float(np.quantile(scores[1:].max(axis=(1, 2)), 1 - SIGNIFICANCE, method="higher"))
    calibrated = np.maximum(0, (table - threshold) / (1 - threshold)) if threshold < 1 else np.zeros_like(table)
    return LayerScores(table, count, n, result.best, calibrated, threshold)


def _cka_scores(x_layers: Sequence[Any], y_layers: Sequence[Any], progress: bool) -> LayerScores:
    n = _row_count(x_layers, y_layers)
    sides = (("x", x_layers), ("y", y_layers))
    with progress_bar("comparing layers", len(x_layers) + len(y_layers), unit="layers", enabled=progress) as advance:
        table = np.zeros((len(x_layers), len(y_layers)))
        units: dict[str, list[tuple[Tensor, float] | None]] = {"x": [], "y": []}
        for side, layers in sides:
            for index, layer in enumerate(layers):
                rows = _as_rows(f"{side} layer {index}", layer)
                flat = bool((rows == rows[0]).all())
                unit = torch.nn.functional.normalize(rows, dim=1)
                units[side].append(None if flat else (unit, float(unbiased_hsic(unit, unit))))
                advance()
        for i, of_x in enumerate(units["x"]):
            for j, of_y in enumerate(units["y"]):
                if of_x is not None and of_y is not None and min(of_x[1], of_y[1]) > 0:
                    table[i, j] = float(unbiased_hsic(of_x[0], of_y[0])) / math.sqrt(of_x[1] * of_y[1])
    best = np.unravel_index(table.argmax(), table.shape)
    return LayerScores(table, 0, n, (int(best[0]), int(best[1])))


def neighbour_count(n: int, rule: str | int = "rice") -> int:
    """How many neighbours to compare among n rows: a number, or a rule from histogram binning.

    "rice" is ceil(2 n^(1/3)), 35 of 5,000; "sqrt" ceil(n^(1/2)); "sturges" ceil(log2 n + 1).

    Raises:
        InputError: another rule, or a number outside [1, n - 1].
    """
    if isinstance(rule, str):
        one_of("k", rule, RULES)
        exact = {"rice": 2 * n ** (1 / 3), "sqrt": n**0.5, "sturges": math.log2(max(n, 1)) + 1}[rule]
        count = math.ceil(round(exact, 9))  # a cube root is rarely exact
    else:
        at_least("k", rule)
        count = int(rule)
    if count >= n:
        raise InputError(f"k is {count}, and each of {n} rows has {max(n - 1, 0)} neighbours; give more rows or less k")
    return count


def _row_count(x_layers: Sequence[Any], y_layers: Sequence[Any]) -> int:
    named = [
        (f"{side} layer {i}", layer) for side, of in (("x", x_layers), ("y", y_layers)) for i, layer in enumerate(of)
    ]
    if not len(x_layers) or not len(y_layers):
        raise InputError(f"there are {len(x_layers)} x layers and {len(y_layers)} y layers; give one or more of each")
    first, reference = named[0]
    for name, layer in named:
        if len(layer) != len(reference):
            raise InputError(f"{name} has {len(layer)} rows, {first} {len(reference)}; give the same items to all")
    return len(reference)


def _neighbours(name: str, layer: Any, k: int) -> Int[np.ndarray, "n k"] | None:
    """Neighbour lists; none of a layer whose rows are all the same, where ties alone would decide."""
    rows = _as_rows(name, layer)
    if (rows == rows[0]).all():
        return None
    return nearest_neighbours(rows, k).cpu().numpy()


def _as_rows(name: str, layer: Any) -> Float[Tensor, "n d"]:
    # A copy: a memory map may be read-only, and float16 has no fast product on a CPU.
    rows = layer.detach() if isinstance(layer, Tensor) else torch.from_numpy(np.array(layer))
    if rows.is_floating_point() and rows.dtype != torch.float64:
        rows = rows.float()
    check_rows(name, rows)
    return rows


def _shared(
    of_xs: Sequence[Int[np.ndarray, "n k"] | None],
    of_ys: Sequence[Int[np.ndarray, "n k"] | None],
    shuffles: Sequence[Int[np.ndarray, " n"]],
    k: int,
) -> Iterator[tuple[int, Float[np.ndarray, "shuffles layers_x"]]]:
    """Per y layer, its index and its mutual kNN with every x layer, row i of y taken from row shuffle[i].

    Bit l of a table's entry (i, j) says that j is a neighbour of i in x layer l, so that one look-up answers for eight
    layers. Neighbours of a shuffled layer are not searched again: row i then stands for item shuffle[i], whose
    neighbours are found under their new positions.
    """
    n = len(shuffles[0])
    tables = []
    for start in range(0, len(of_xs), 8):
        tables.append(np.zeros((n, n), dtype=np.uint8))
        for bit, of_x in enumerate(of_xs[start : start + 8]):
            if of_x is not None:
                tables[-1][np.arange(n)[:, None], of_x] |= np.uint8(1 << bit)
    for column, of_y in enumerate(of_ys):
        scores = np.zeros((len(shuffles), len(tables) * 8))
        for row, shuffle in enumerate(shuffles):
            if of_y is None:
                break
            entry = np.argsort(shuffle)[of_y[shuffle]] + np.arange(0, n * n, n)[:, None]
            for block, table in enumerate(tables):
                found = table.ravel()[entry]
                bits = np.unpackbits(found[found > 0][:, None], axis=1, bitorder="little")
                scores[row, block * 8 : block * 8 + 8] = bits.sum(0, dtype=np.int64) / (n * k)
        yield column, scores[:, : len(of_xs)]
