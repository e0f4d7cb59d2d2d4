"""Orthogonal matrices as something to train: a linear layer, and the maps from free numbers to such matrices.

Dynamic trivialisation, "Trivializations for Gradient-Based Optimization on Manifolds", arXiv 1909.09501, as
`torch.nn.utils.parametrizations.orthogonal` has it; the layer is built on that. `orthogonal_weight` is the same
mathematics as a function.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from .checks import at_least, one_of
from .errors import InputError

__all__ = ["ORTHOGONAL_MAPS", "OrthogonalLinear", "OrthogonalMap", "orthogonal_weight", "skew_exponential"]

OrthogonalMap: TypeAlias = Literal["cayley", "matrix_exp", "householder"]
ORTHOGONAL_MAPS = ("cayley", "matrix_exp", "householder")
_MOST_OFF = 1e-4  # of an entry of B^T B: a Procrustes solution of some hundred dimensions in float32 passes


class OrthogonalLinear(nn.Linear):
    """x -> x Q^T + b with Q square and orthogonal whatever an optimiser does.

    Choosing the map: "cayley" unless a published run is to be repeated. One CPU thread, float32, forward / backward:

        dim     matrix_exp          cayley
        512     0.035 / 0.52 s      0.013 / 0.012 s
        768     0.18 / 2.1 s        0.07 / 0.07 s
        1,024   0.44 / 6.3 s        0.21 / 0.17 s

    That cost is paid at each use of `weight`, not once a step: wrap a step that uses it more than once in
    `torch.nn.utils.parametrize.cached()`.

    None of the maps leaves the rotations: det Q is that of the base, 1 or -1, for good. A base that is near the answer
    (a Procrustes solution) is also a much better start than a random one. In float32, ||Q^T Q - I||_F is about 1e-4 at
    768 dimensions.

    Attributes:
        weight: Q, `dim dim`, computed from the trained numbers.
        bias: b, `dim`, free; 0 to begin with where a base is given, else as `nn.Linear` draws it.
    """

    def __init__(
        self,
        dim: int,
        *,
        orthogonal_map: OrthogonalMap = "cayley",
        base: Float[Tensor, "dim dim"] | None = None,
        bias: bool = True,
    ) -> None:
        """Starts at a base, or where torch does.

        Args:
            dim: of x and of what comes out.
            orthogonal_map: "cayley", "matrix_exp" or "householder"; see `orthogonal_weight`.
            base: orthogonal; the layer has its dtype and device, and starts with Q equal to it bit for bit. Without
                it, Q starts as the Q factor of what `nn.Linear` draws from torch's global random numbers.
            bias: whether there is b.

        Raises:
            InputError: dim is below 1, another map, or a base of another shape or not orthogonal.
        """
        at_least("dim", dim)
        one_of("orthogonal_map", orthogonal_map, ORTHOGONAL_MAPS)
        if base is None:
            super().__init__(dim, dim, bias=bias)
            orthogonal(self, orthogonal_map=orthogonal_map)
            return
        _check_base(base, dim)
        super().__init__(dim, dim, bias=bias, dtype=base.dtype, device=base.device)
        with torch.no_grad():
            self.weight.copy_(torch.eye(dim))
            if bias:
                self.bias.zero_()
        orthogonal(self, orthogonal_map=orthogonal_map)
        # Not by way of the weight: torch would replace a base that float32 has rounded by its QR factor, signs and all.
        self.parametrizations.weight[0].base = base.detach().clone()  # type: ignore[index, union-attr]


def orthogonal_weight(
    raw: Float[Tensor, "rows columns"],
    *,
    orthogonal_map: OrthogonalMap = "cayley",
    base: Float[Tensor, "most most"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """The matrix of orthonormal columns (wide ones: rows) that free numbers stand for.

    With A = L - L^T and L the lower triangle of `raw` (of its transpose if it is wide) filled up with zeros to a
    square:

        matrix_exp    exp(A)
        cayley        (I - A/2)^-1 (I + A/2)
        householder   H_1 ... H_k diag(raw), H_i the reflection along e_i + the part of column i below the diagonal

    cut to the columns of `raw` and multiplied by the base from the left. The diagonal of `raw` counts for householder
    alone, has to be 1 or -1, and gets no gradient; at -I all three maps give I.

    Args:
        raw: free numbers, of the shape of the result.
        orthogonal_map: which of the three.
        base: orthogonal, of the larger of both sizes; the identity where it is left out.

    Raises:
        InputError: another map, `raw` is no matrix, or the base does not fit.
    """
    one_of("orthogonal_map", orthogonal_map, ORTHOGONAL_MAPS)
    if raw.ndim != 2 or not raw.numel():
        raise InputError(f"raw has shape {tuple(raw.shape)}; give a matrix")
    if base is not None:
        _check_base(base, max(raw.shape))
    wide = raw.shape[0] < raw.shape[1]
    tall = raw.T if wide else raw
    n, k = tall.shape
    if orthogonal_map == "householder":
        reflectors = tall.tril(-1)
        scales = 2 / (1 + reflectors.square().sum(0))
        q = torch.linalg.householder_product(reflectors, scales) * tall.diagonal().detach().trunc()
    else:
        lower = nn.functional.pad(tall.tril(), (0, n - k))
        skew = lower - lower.T
        if orthogonal_map == "matrix_exp":
            q = torch.matrix_exp(skew)[:, :k]
        else:
            identity = torch.eye(n, dtype=raw.dtype, device=raw.device)
            q = torch.linalg.solve(identity - skew / 2, (identity + skew / 2)[:, :k])
    if base is not None:
        q = base @ q
    return q.T if wide else q


def skew_exponential(upper: Float[Tensor, " entries"]) -> Float[Tensor, "n n"]:
    """exp(P) with P = U - U^T, U strictly upper triangular: the rotation of "lambda-Orthogonality", arXiv 2509.16664.

    Args:
        upper: the n (n - 1) / 2 entries of U, row by row.

    Returns:
        Orthogonal, with determinant 1.

    Raises:
        InputError: no n has so many entries.
    """
    n = (1 + math.isqrt(1 + 8 * upper.numel())) // 2
    if upper.ndim != 1 or n < 2 or n * (n - 1) // 2 != upper.numel():
        raise InputError(f"upper has shape {tuple(upper.shape)}; give n (n - 1) / 2 numbers: 1, 3, 6, 10, ...")
    rows, columns = torch.triu_indices(n, n, 1, device=upper.device)
    triangle = upper.new_zeros(n, n).index_put((rows, columns), upper)
    return torch.matrix_exp(triangle - triangle.T)


def _check_base(base: Float[Tensor, "n n"], dim: int) -> None:
    if base.shape != (dim, dim) or not base.is_floating_point():
        raise InputError(f"base is {tuple(base.shape)} of {base.dtype}; give {(dim, dim)} of float32 or float64")
    off = float((base.detach().T @ base.detach() - torch.eye(dim, dtype=base.dtype, device=base.device)).abs().max())
    if not off <= _MOST_OFF:
        raise InputError(
            f"base is not orthogonal: an entry of base^T base is {off:.2g} off; give `procrustes` of it with the "
            "identity, which is the nearest that is"
        )
