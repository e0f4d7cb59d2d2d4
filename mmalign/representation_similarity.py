"""How alike two representations of the same items are, without a map between them.

Mutual kNN, CKNNA and cycle-kNN as in "The Platonic Representation Hypothesis", arXiv 2405.07987; linear CKA as in
"Similarity of Neural Network Representations Revisited", arXiv 1905.00414, and its unbiased form with the HSIC
estimator of Song et al., JMLR 13 (2012), eq. 5. Row i of one representation and row i of the other stand for the same
item. Sums are in float64 where the device has it.

Raw scores depend on the number of rows and dimensions, and the best of many pairs of layers looks good by luck: read
them beside the chance level, or calibrated (`mmalign.layer_selection`).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from .checks import at_least
from .errors import InputError

__all__ = [
    "check_pairs",
    "check_rows",
    "cknna",
    "cycle_knn",
    "linear_cka",
    "mutual_knn",
    "nearest_neighbours",
    "unbiased_hsic",
    "unbiased_linear_cka",
    "widened",
]

BLOCK_ELEMENTS = 1 << 24  # similarities held at once


def nearest_neighbours(rows: Float[Tensor, "n d"], k: int) -> Int[Tensor, "n k"]:
    """The k rows most similar to each by cosine, most similar first, itself left out. Ties fall either way.

    Raises:
        InputError: k is no whole number in [1, n - 1], or a row is not finite.
    """
    check_rows("rows", rows)
    at_least("k", k)
    n = len(rows)
    if k >= n:
        raise InputError(f"k is {k}, and each of {n} rows has {n - 1} neighbours; give {n - 1} or less, or more rows")
    unit = normalize(rows, dim=1)
    found = torch.empty(n, k, dtype=torch.int64, device=rows.device)
    step = max(1, BLOCK_ELEMENTS // n)
    for start in range(0, n, step):
        similarity = unit[start : start + step] @ unit.T
        similarity.diagonal(start).fill_(-torch.inf)
        found[start : start + step] = similarity.topk(k, dim=1).indices
    return found


def mutual_knn(neighbours_x: Int[Tensor, "n k"], neighbours_y: Int[Tensor, "n k"]) -> float:
    """mean_i |N_x(i) and N_y(i) in common| / k, in [0, 1]; k / (n - 1) by chance. Lists are `nearest_neighbours`.

    Raises:
        InputError: the lists differ in n or k.
    """
    if neighbours_x.shape != neighbours_y.shape:
        shapes = f"{tuple(neighbours_x.shape)} and {tuple(neighbours_y.shape)}"
        raise InputError(f"the neighbour lists have shapes {shapes}; give lists of the same rows with one k")
    # A list names a row once, so what appears twice in both lists together is shared.
    both = torch.cat([neighbours_x, neighbours_y], dim=1).sort(dim=1).values
    return int((both[:, 1:] == both[:, :-1]).sum()) / neighbours_x.numel()


def linear_cka(x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"]) -> float:
    """Centred kernel alignment with linear kernels, in [0, 1]: arXiv 1905.00414, eq. 3.

        ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F)   with centred columns

    Rows are taken as they are; give unit rows to compare directions. Biased upwards where n is not far above the
    dimensions: see `unbiased_linear_cka`.

    Raises:
        InputError: the rows cannot be paired, or all rows of one side are the same.
    """
    check_pairs(x, y)
    left, right = (side - side.mean(0) for side in (widened(x), widened(y)))
    return _alignment(*((a.T @ b).square().sum() for a, b in ((left, right), (left, left), (right, right))))


def unbiased_linear_cka(x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"]) -> float:
    """Linear CKA with the unbiased estimator of HSIC (Song et al. 2012, eq. 5), at most 1; about 0 by chance.

        HSIC(K, L) = [tr(K L) + 1^T K 1 1^T L 1 / ((n-1)(n-2)) - 2 1^T K L 1 / (n-2)] / (n (n-3)),  diagonals zero

    n x n kernels are never formed. Rows are taken as they are.

    Raises:
        InputError: the rows cannot be paired, are fewer than 4, or all rows of one side are the same.
    """
    check_pairs(x, y, least=4)
    return _alignment(unbiased_hsic(x, y), unbiased_hsic(x, x), unbiased_hsic(y, y))


def unbiased_hsic(x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"]) -> Float[Tensor, ""]:
    """The estimator in `unbiased_linear_cka`, for linear kernels of rows that can be paired (at least 4)."""
    # It does not change under a shift of the rows; centring keeps the sums small.
    a, b = (side - side.mean(0) for side in (widened(x), widened(y)))
    sums, diagonals = [], []
    for rows in (a, b):
        diagonals.append(rows.square().sum(1))
        sums.append(rows @ rows.sum(0) - diagonals[-1])
    trace = (a.T @ b).square().sum() - diagonals[0] @ diagonals[1]
    return _unbiased_hsic(trace, *sums)


def cknna(x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"], k: int) -> float:
    """Kernel alignment over shared nearest neighbours, at most 1; arXiv 2405.07987, appendix A.

    Unbiased CKA of the cosine kernels in which K_ij is kept where j is one of i's k neighbours on both sides (for the
    two self-alignments: on that side). k = n - 1 is unbiased linear CKA of unit rows. Holds a few n x n matrices.

    Raises:
        InputError: the rows cannot be paired, are fewer than 4, k is not in [1, n - 1], or a side does not align
            with itself.
    """
    check_pairs(x, y, least=4)
    kernels, masks = [], []
    for side in (x, y):
        unit = normalize(widened(side), dim=1)
        kernels.append(unit @ unit.T)
        masks.append(torch.zeros_like(kernels[-1], dtype=torch.bool).scatter_(1, nearest_neighbours(unit, k), True))

    def hsic(a: int, b: int) -> Tensor:
        shared = masks[a] & masks[b]
        left, right = kernels[a] * shared, kernels[b] * shared
        return _unbiased_hsic((left * right.T).sum(), left.sum(0), right.sum(1))

    return _alignment(hsic(0, 1), hsic(0, 0), hsic(1, 1))


def cycle_knn(x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"], k: int) -> float:
    """Share of items that a step to a neighbour in y, then to a neighbour in x, can lead back to; in [0, 1].

    Item i counts where some j of its k neighbours in y has i among its k neighbours in x: arXiv 2405.07987, appendix A.
    Not symmetric in x and y.

    Raises:
        InputError: the rows cannot be paired, or k is not in [1, n - 1].
    """
    check_pairs(x, y)
    neighbours_x, neighbours_y = nearest_neighbours(x, k), nearest_neighbours(y, k)
    own = torch.arange(len(x), device=x.device).unsqueeze(1)
    back = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for step in neighbours_y.T:
        back |= (neighbours_x[step] == own).any(1)
    return int(back.sum()) / len(x)


def check_rows(name: str, rows: Tensor, least: int = 2) -> None:
    """A matrix of float32 or float64 with `least` rows or more, every value finite.

    Raises:
        InputError: it is not.
    """
    if rows.ndim != 2 or not rows.shape[1]:
        raise InputError(f"{name} has shape {tuple(rows.shape)}; give a matrix with one row per item")
    if rows.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{name} is of {rows.dtype}; give float32 or float64")
    if len(rows) < least:
        raise InputError(f"{name} has {len(rows)} rows; give {least} or more")
    finite = rows.isfinite().all(1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise InputError(f"{name} row {row} holds NaN or infinity; encode that item again or leave it out")


def check_pairs(x: Tensor, y: Tensor, least: int = 2) -> None:
    """Two sides with the same number of rows, each as `check_rows` has it.

    Raises:
        InputError: they are not.
    """
    check_rows("x", x, least)
    check_rows("y", y, least)
    if len(x) != len(y):
        raise InputError(f"x has {len(x)} rows, y {len(y)}; row i of both must stand for the same item")


def widened(rows: Tensor) -> Tensor:
    """In float64, but on Apple's MPS, which has none."""
    return rows if rows.device.type == "mps" else rows.double()


def _unbiased_hsic(trace: Tensor, column_sums_k: Tensor, row_sums_l: Tensor) -> Tensor:
    """From tr(K L), 1^T K and L 1 of kernels with zero diagonals."""
    n = len(row_sums_l)
    product = column_sums_k.sum() * row_sums_l.sum() / ((n - 1) * (n - 2))
    return (trace + product - 2 * (column_sums_k @ row_sums_l) / (n - 2)) / (n * (n - 3))


def _alignment(across: Tensor, own_x: Tensor, own_y: Tensor) -> float:
    for name, own in (("x", own_x), ("y", own_y)):
        if own <= 0:
            raise InputError(f"{name} does not vary over the rows given; give other items, or leave that layer out")
    return float(across / (own_x.sqrt() * own_y.sqrt()))
