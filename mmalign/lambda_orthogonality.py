"""The losses that train compatible maps between two frozen models: lambda-orthogonality, arXiv 2509.16664.

"lambda-Orthogonality Regularization for Compatible Representation Learning". B maps rows of the new model to the old
space (backward), F maps stored rows of the old model to where B puts the new ones (forward). The paper's alpha,
temperature and weights are not known to us, nor whether its squared errors are sums or means: what is a default here
is ours. `mmalign.compatible_maps` trains with these.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from .checks import at_least, in_range, one_of
from .contrastive import unit_rows
from .errors import InputError

__all__ = [
    "REDUCTIONS",
    "CompatibilityObjective",
    "Reduction",
    "compatibility_objective",
    "lambda_orthogonality",
    "relative_threshold",
    "supervised_contrastive",
]

Reduction: TypeAlias = Literal["sum", "mean"]
REDUCTIONS = ("sum", "mean")


class CompatibilityObjective(NamedTuple):
    """Every part of the objective, without its weight, and the total. `contrastive` is the sum of its two parts."""

    forward: Float[Tensor, ""]
    backward: Float[Tensor, ""]
    contrastive_new: Float[Tensor, ""]
    contrastive_old: Float[Tensor, ""]
    contrastive: Float[Tensor, ""]
    orthogonality: Float[Tensor, ""]
    total: Float[Tensor, ""]


def compatibility_objective(
    old: Float[Tensor, "n d"],
    backward_new: Float[Tensor, "n d"],
    forward_old: Float[Tensor, "n d"],
    *,
    weight: Float[Tensor, "d_out d_in"] | None = None,
    labels: Int[Tensor, " n"] | None = None,
    threshold: float = 0.0,
    sharpness: float = 10.0,
    temperature: float = 0.07,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    reduction: Reduction = "sum",
) -> CompatibilityObjective:
    """w1 L_F + w2 L_B + w3 L_C + L_lambda: arXiv 2509.16664, Eq. 10.

        L_F = ||F(h_old) - B(h_new)||^2                          Eq. 7
        L_B = ||B(h_new) - h_old||^2                             Eq. 2
        L_C = L_contr(F(h_old), B(h_new)) + L_contr(F(h_old), h_old)    Eq. 9

    No gradient is stopped anywhere. L_F alone gives up what the old gallery is worth to new queries, L_B alone what
    the new one is worth to itself.

    Args:
        old: h_old, zero-padded where the new model is the wider one.
        backward_new: B(h_new), of the same items.
        forward_old: F(h_old).
        weight: of B, for L_lambda; without it L_lambda is 0, as for a B that is orthogonal by construction.
        labels: classes for L_contr; without them each item is its own class.
        threshold: lambda of `lambda_orthogonality`.
        sharpness: alpha of it.
        temperature: of `supervised_contrastive`.
        weights: w1, w2, w3 of L_F, L_B, L_C.
        reduction: of the squared errors over the dimensions: "sum", or "mean", d times smaller. Items are averaged.

    Raises:
        InputError: the shapes differ, or an option is out of range.
    """
    if not old.shape == backward_new.shape == forward_old.shape:
        shapes = f"{tuple(old.shape)}, backward_new {tuple(backward_new.shape)}, forward_old {tuple(forward_old.shape)}"
        raise InputError(f"old has shape {shapes}; give rows of the same items in one space, the narrower side padded")
    one_of("reduction", reduction, REDUCTIONS)
    if len(weights) != 3:
        raise InputError(f"weights are {weights!r}; give three, of L_F, L_B and L_C")
    for name, value in zip(("L_F", "L_B", "L_C"), weights, strict=True):
        in_range(f"the weight of {name}", value, 0)

    def squared_error(a: Tensor, b: Tensor) -> Tensor:
        squares = (a - b).square()
        return squares.sum(1).mean() if reduction == "sum" else squares.mean()

    forward, backward = squared_error(forward_old, backward_new), squared_error(backward_new, old)
    of_new = supervised_contrastive(forward_old, backward_new, labels, temperature)
    of_old = supervised_contrastive(forward_old, old, labels, temperature)
    regulariser = old.new_zeros(()) if weight is None else lambda_orthogonality(weight, threshold, sharpness)
    contrastive = of_new + of_old
    total = weights[0] * forward + weights[1] * backward + weights[2] * contrastive + regulariser
    return CompatibilityObjective(forward, backward, of_new, of_old, contrastive, regulariser, total)


def lambda_orthogonality(
    weight: Float[Tensor, "d_out d_in"], threshold: float, sharpness: float = 10.0
) -> Float[Tensor, ""]:
    """A penalty that lets a matrix be orthogonal up to a threshold: arXiv 2509.16664, Eq. 6.

        L = sigmoid(alpha (N - lambda)) N,   N = ||W W^T - I||_F

    Below lambda nearly nothing, above it nearly N. The smallest value is at N = 0 for every lambda: the threshold only
    holds because the slope below it is tiny, which takes alpha * lambda well above 1. At alpha 10 and lambda 12, L is
    0.08 at N = 11.5, 6 at 12 and 12.4 at 12.5; at alpha * lambda = 1 it pulls all the way to N = 0. With lambda = 0 it
    lies between N / 2 and N.

    ||I||_F is sqrt(n), so a lambda means little without n: lambda_rel = lambda / sqrt(n) carries over to other sizes
    (`relative_threshold`). The paper's 12 at n = 512 is 0.53; at n = 64 the same 12 would never bite.

    Args:
        weight: W as `nn.Linear` has it, d_out <= d_in; a taller one cannot come nearer than N = sqrt(d_out - d_in).
            Give the transpose to penalise W^T W.
        threshold: lambda, at least 0.
        sharpness: alpha, above 0.

    Returns:
        At least 0, in float32 or better; the gradient is 0 where W W^T = I exactly.

    Raises:
        InputError: W is no matrix, or a number is out of range.
    """
    if weight.ndim != 2:
        raise InputError(f"weight has shape {tuple(weight.shape)}; give a matrix")
    in_range("threshold", threshold, 0)
    in_range("sharpness", sharpness, 0)
    if not sharpness:
        raise InputError("sharpness is 0, which ignores the threshold; give a number above 0, e.g. 10")
    with torch.autocast(weight.device.type, enabled=False):
        w = weight.to(torch.promote_types(weight.dtype, torch.float32))
        # torch's norm has gradient 0 at 0; the root of a sum of squares has NaN, and an orthogonal start hits that.
        deviation = torch.linalg.norm(w @ w.T - torch.eye(len(w), dtype=w.dtype, device=w.device))
        return torch.sigmoid(sharpness * (deviation - threshold)) * deviation


def relative_threshold(lambda_rel: float, n: int) -> float:
    """lambda = lambda_rel * sqrt(n), the threshold of `lambda_orthogonality` for an n x n matrix.

    Raises:
        InputError: lambda_rel is below 0, or n below 1.
    """
    in_range("lambda_rel", lambda_rel, 0)
    at_least("n", n)
    return lambda_rel * math.sqrt(n)


def supervised_contrastive(
    anchors: Float[Tensor, "n d"],
    candidates: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"] | None = None,
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    """How well each anchor finds the candidates of its class in the batch: arXiv 2509.16664, Eq. 8.

        L = - mean_i sum_j t_ij log softmax_j(cos(a_i, c_j) / temperature),   t_ij = [y_i = y_j] / #{k : y_k = y_i}

    One direction only, unlike `mmalign.contrastive.clip_loss`; the candidate of the anchor's own index counts among
    its positives. Rows are normalised inside.

    Args:
        anchors: row i belongs to row i of `candidates`.
        candidates: alike.
        labels: classes; without them the own index alone is right (InfoNCE).
        temperature: above 0.

    Raises:
        InputError: the shapes do not fit, or temperature is not above 0.
    """
    if anchors.shape != candidates.shape:
        shapes = f"{tuple(anchors.shape)}, candidates {tuple(candidates.shape)}"
        raise InputError(f"anchors have shape {shapes}; give one row each per item")
    n = len(anchors)
    if labels is not None and labels.shape != (n,):
        raise InputError(f"labels have shape {tuple(labels.shape)}; give one class for each of {n} rows")
    in_range("temperature", temperature, 1e-6)
    with torch.autocast(anchors.device.type, enabled=False):
        logits = unit_rows(anchors, "anchors") @ unit_rows(candidates, "candidates").T / temperature
        if labels is None:
            return cross_entropy(logits, torch.arange(n, device=logits.device))
        same = (labels[:, None] == labels).to(logits)
        return cross_entropy(logits, same / same.sum(1, keepdim=True))
