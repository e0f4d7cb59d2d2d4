"""STRUCTURE: a head may move its encoder's features, but not change who is whose neighbour.

"With Limited Data for Multimodal Alignment, Let the STRUCTURE Guide You", arXiv 2506.16895. Two frozen encoders are
joined by small heads trained with a CLIP loss on few pairs; `structure_loss` keeps each head from distorting the
neighbourhoods of its own encoder. Methods card "STRUCTURE", sections 2 and 3.

Pure functions on tensors. Everything is computed in float32 or better with autocast off.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from .checks import at_least, in_range, one_of
from .contrastive import clip_loss
from .errors import InputError

__all__ = [
    "StructureObjective",
    "mean_self_probability",
    "structure_loss",
    "structure_objective",
    "structure_weight",
    "walk_probabilities",
]

CENTERINGS = ("mean", "none", "standard")
SIMILARITIES = ("cosine", "rbf")
WEIGHTINGS = ("inverse", "none")
DIVERGENCES = ("reverse", "js")
CACHED_ENTRIES = 2**16  # of each of half a dozen matrices for each thread, so that all fit the cache of its core


def walk_probabilities(
    rows: Float[Tensor, "n d"],
    *,
    temperature: float = 0.05,
    centering: str = "mean",
    center_first: bool = False,
    similarity: str = "cosine",
    gamma: float = 1.0,
    eps: float = 1e-12,
) -> Float[Tensor, "n n"]:
    """P: the probability of stepping from each row to each row, itself included, in a walk to similar rows.

    Rows are normalised, then centred (so the similarity is an inner product, no cosine), then

        P = softmax_row(z z^T / temperature)   or, "rbf",   softmax_row(exp(-gamma ||z_i - z_j||^2))

    Args:
        rows: features or head outputs of one batch.
        temperature: 1e-6 or more; "rbf" does not use it.
        centering: "mean" subtracts the mean row; "standard" also divides each dimension by its unbiased standard
            deviation; "none".
        center_first: centre, then normalise: invariant to translation, no longer to the scale of single rows.
        similarity: "cosine" or "rbf".
        gamma: of "rbf", above 0.
        eps: the least norm and the least standard deviation, above 0.

    Returns:
        Rows that sum to 1, with gradient to `rows`.

    Raises:
        InputError: an option is unknown or out of its range, or `rows` cannot be used.
    """
    _check_walk(temperature, centering, similarity, gamma, eps)
    if rows.ndim != 2 or len(rows) < (2 if centering == "standard" else 1):
        raise InputError(
            f"rows have shape {tuple(rows.shape)}; give a matrix of one row or more, two for centering 'standard'"
        )
    with torch.autocast(rows.device.type, enabled=False):
        z = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if center_first:
            z = normalize(_centered(z, centering, eps), dim=1, eps=eps)
        else:
            z = _centered(normalize(z, dim=1, eps=eps), centering, eps)
        if similarity == "cosine":
            return torch.softmax(_Gram.apply(z, 1 / temperature), dim=1)
        square = z.square().sum(1)
        return torch.softmax(torch.exp(gamma * (_Gram.apply(z, 2.0) - square[:, None] - square)), dim=1)


def structure_loss(
    original: Float[Tensor, "n d"] | None,
    aligned: Float[Tensor, "n e"],
    *,
    original_probabilities: Float[Tensor, "n n"] | None = None,
    temperature: float = 0.05,
    levels: int = 1,
    weighting: str = "inverse",
    divergence: str = "reverse",
    centering: str = "mean",
    center_first: bool = False,
    similarity: str = "cosine",
    gamma: float = 1.0,
    margin: float = 0.0,
    eps: float = 1e-12,
) -> Float[Tensor, ""]:
    """R_S: how far the walk among the aligned rows is from the walk among the original ones.

        R_S = (1/L) sum_l w_l max(0, D(P_X^l, P_Z^l) - margin),   D a mean over the n rows

    with M = (P_X^l + P_Z^l) / 2 and, for "reverse", D = (KL(M||P_Z) + KL(M||P_X)) / 2, unbounded: the form of the
    released code, for which its weight of 10 was tuned; for "js", D = (KL(P_Z||M) + KL(P_X||M)) / 2, at most ln 2:
    the paper's equation. "reverse" is 3 to 9 times "js" far from the optimum and agrees with it to second order near.

    R_S does not change under rotation of either side nor under a positive factor on a row; it does change under
    translation (unless `center_first`) and depends on n. It needs n of 2 or more to say anything, and a P that is not
    nearly the identity: see `mean_self_probability`.

    Args:
        original: frozen features; they get no gradient.
        aligned: what the head made of the same rows; the gradient goes here.
        original_probabilities: `walk_probabilities` of `original` with the same options, where a loop keeps them;
            `original` is then not read and may be None.
        temperature, centering, center_first, similarity, gamma: see `walk_probabilities`.
        levels: L, the longest walk in steps; above 1 each level costs two n^3 products and their gradient.
        weighting: w_l = 1/l, "inverse", or 1, "none".
        divergence: "reverse" or "js".
        margin: divergence that costs nothing, 0 or more.
        eps: added to the probabilities inside the logarithms (and to the weighting M of "reverse"), above 0.

    Raises:
        InputError: an option is unknown or out of its range ("spearman" among them: ranks have no gradient), or the
            shapes do not fit.
    """
    at_least("levels", levels)
    one_of("weighting", weighting, WEIGHTINGS)
    one_of("divergence", divergence, DIVERGENCES)
    in_range("margin", margin, 0)
    walk: dict[str, Any] = {
        "temperature": temperature,
        "centering": centering,
        "center_first": center_first,
        "similarity": similarity,
        "gamma": gamma,
        "eps": eps,
    }
    if original_probabilities is None:
        if original is None:
            raise InputError("original is None; give the frozen features or original_probabilities")
        with torch.no_grad():
            original_probabilities = walk_probabilities(original, **walk)
    step_z = walk_probabilities(aligned, **walk)
    step_x = original_probabilities.detach().to(step_z)
    if step_x.shape != step_z.shape:
        raise InputError(f"original has {len(step_x)} rows, aligned {len(step_z)}; give the same rows on both sides")
    with torch.autocast(step_z.device.type, enabled=False):
        total, walk_x, walk_z = step_z.new_zeros(()), step_x, step_z
        for level in range(1, levels + 1):
            if level > 1:
                walk_x, walk_z = walk_x @ step_x, walk_z @ step_z
            distance = _Divergence.apply(walk_x, walk_z, eps, divergence)
            total = total + (distance - margin).clamp_min(0) / (level if weighting == "inverse" else 1)
        return total / levels


def structure_weight(step: int, weight: float = 10.0, warmup_steps: int = 1000) -> float:
    """lambda at the zero-based optimiser step: weight * min(1, step / warmup_steps); 0 at step 0 of a warm-up."""
    at_least("step", step, 0)
    at_least("warmup_steps", warmup_steps, 0)
    in_range("weight", weight, 0)
    return weight * min(1.0, step / warmup_steps) if warmup_steps else weight


class StructureObjective(NamedTuple):
    """`loss` = clip + weight * structure; `structure`, the mean R_S of both sides, is NaN where weight is 0."""

    loss: Float[Tensor, ""]
    clip: Float[Tensor, ""]
    structure: Float[Tensor, ""]
    weight: float


def structure_objective(
    image_original: Float[Tensor, "n d_image"],
    image_aligned: Float[Tensor, "n e"],
    text_original: Float[Tensor, "n d_text"],
    text_aligned: Float[Tensor, "n e"],
    *,
    step: int,
    weight: float = 10.0,
    warmup_steps: int = 1000,
    temperature: float = 0.05,
    unpaired_image: tuple[Float[Tensor, "m d_image"], Float[Tensor, "m e"]] | None = None,
    unpaired_text: tuple[Float[Tensor, "k d_text"], Float[Tensor, "k e"]] | None = None,
    unpaired_only: bool = False,
    levels: int = 1,
    weighting: str = "inverse",
    divergence: str = "reverse",
    centering: str = "mean",
    center_first: bool = False,
    similarity: str = "cosine",
    gamma: float = 1.0,
    margin: float = 0.0,
    eps: float = 1e-12,
) -> StructureObjective:
    """CLIP loss plus `structure_weight` times the mean of R_S of images and of texts, one temperature for all.

        L = L_CLIP(z_image, z_text; temperature) + lambda(step) (R_S(image) + R_S(text)) / 2

    The halves are the released code's, whose weight of 10 is the default. At lambda 0 the second term is skipped.

    Args:
        image_original: frozen image features.
        image_aligned: the image head's outputs, not normalised.
        text_original: frozen text features, row i belonging to image i.
        text_aligned: the text head's outputs.
        step: optimiser step, from 0.
        weight, warmup_steps: see `structure_weight`.
        temperature: of the CLIP logits and of R_S.
        unpaired_image: frozen features and head outputs of images without a text, for R_S only.
        unpaired_text: alike, texts without an image.
        unpaired_only: R_S of a side is that of its unpaired rows alone, where it has any.
        levels, weighting, divergence, centering, center_first, similarity, gamma, margin, eps: see `structure_loss`.

    Raises:
        InputError: as in `structure_loss`; `unpaired_only` without unpaired rows.
    """
    if unpaired_only and unpaired_image is None and unpaired_text is None:
        raise InputError("unpaired_only is True but no unpaired rows are given; give unpaired_image or unpaired_text")
    in_range("temperature", temperature, 1e-6)
    clip = clip_loss(image_aligned, text_aligned, 1 / temperature)
    now = structure_weight(step, weight, warmup_steps)
    if now == 0:
        return StructureObjective(clip, clip, torch.full_like(clip, math.nan), now)
    sides = (
        _with_unpaired((image_original, image_aligned), unpaired_image, unpaired_only),
        _with_unpaired((text_original, text_aligned), unpaired_text, unpaired_only),
    )
    of_image, of_text = (
        structure_loss(
            original,
            aligned,
            temperature=temperature,
            levels=levels,
            weighting=weighting,
            divergence=divergence,
            centering=centering,
            center_first=center_first,
            similarity=similarity,
            gamma=gamma,
            margin=margin,
            eps=eps,
        )
        for original, aligned in sides
    )
    structure = (of_image + of_text) / 2
    return StructureObjective(clip + now * structure, clip, structure, now)


def mean_self_probability(probabilities: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """Mean diagonal of P, in [0, 1]. Above 0.99 no row sees a neighbour, R_S says nothing: raise the temperature."""
    return probabilities.diagonal().mean()


def _check_walk(temperature: float, centering: str, similarity: str, gamma: float, eps: float) -> None:
    in_range("temperature", temperature, 1e-6)
    in_range("gamma", gamma, 1e-12)
    in_range("eps", eps, 1e-30)
    one_of("centering", centering, CENTERINGS)
    if similarity == "spearman":
        raise InputError("similarity is 'spearman'; ranks have no gradient for a head to learn from; give cosine")
    one_of("similarity", similarity, SIMILARITIES)


def _centered(rows: Float[Tensor, "n d"], centering: str, eps: float) -> Float[Tensor, "n d"]:
    if centering == "none":
        return rows
    centered = rows - rows.mean(0)
    return centered / rows.std(0).clamp_min(eps) if centering == "standard" else centered


def _with_unpaired(
    paired: tuple[Tensor, Tensor], unpaired: tuple[Tensor, Tensor] | None, unpaired_only: bool
) -> tuple[Tensor, Tensor]:
    if unpaired is None:
        return paired
    if unpaired_only:
        return unpaired
    return torch.cat([paired[0], unpaired[0]]), torch.cat([paired[1], unpaired[1]])


class _Gram(torch.autograd.Function):
    """scale * z z^T. Its gradient is scale * (G + G^T) z: one product, where autograd makes two."""

    @staticmethod
    def forward(ctx: Any, z: Float[Tensor, "n e"], scale: float) -> Float[Tensor, "n n"]:
        ctx.save_for_backward(z)
        ctx.scale = scale
        return (z @ z.T).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n e"], None]:
        (z,) = ctx.saved_tensors
        return ((grad + grad.T) @ z).mul_(ctx.scale), None


class _Divergence(torch.autograd.Function):
    """D of two row-stochastic matrices with its gradient to the second, found together.

    On a CPU a few rows at a time: the dozen passes then stay in the cache and ask for no memory of size n x n.
    """

    @staticmethod
    def forward(
        ctx: Any, original: Float[Tensor, "n n"], aligned: Float[Tensor, "n n"], eps: float, divergence: str
    ) -> Float[Tensor, ""]:
        n = len(aligned)
        rows = max(1, CACHED_ENTRIES * torch.get_num_threads() // n) if aligned.device.type == "cpu" else n
        gradient = torch.empty_like(aligned)
        of_rows = _reverse_divergence if divergence == "reverse" else _js_divergence
        parts = [
            of_rows(p, q, out, eps)
            for p, q, out in zip(original.split(rows), aligned.split(rows), gradient.split(rows), strict=True)
        ]
        ctx.save_for_backward(gradient)
        return torch.stack(parts).sum() / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, ""]) -> tuple[None, Float[Tensor, "n n"], None, None]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * (grad / len(gradient)), None, None


def _reverse_divergence(
    original: Float[Tensor, "r n"], aligned: Float[Tensor, "r n"], gradient: Float[Tensor, "r n"], eps: float
) -> Float[Tensor, ""]:
    """Sum over rows of (KL(m||q) + KL(m||p)) / 2; its gradient to `aligned` goes into `gradient`.

    p = original + eps, q = aligned + eps, m = (p + q) / 2. With d = q - p the two logarithms join into one that is
    never negative, log(m/p) + log(m/q) = log1p(d/p * d/q / 4): 0 for equal rows, and exact near them in float32.
    """
    p, q = original + eps, aligned + eps
    d = q - p
    by_q = d / q
    log_ratio = (d / p).mul_(by_q).mul_(0.25).log1p_()
    torch.add(log_ratio, by_q, out=gradient).mul_(0.25)
    return p.add_(d, alpha=0.5).mul_(log_ratio).sum() / 2


def _js_divergence(
    original: Float[Tensor, "r n"], aligned: Float[Tensor, "r n"], gradient: Float[Tensor, "r n"], eps: float
) -> Float[Tensor, ""]:
    """Sum over rows of (KL(aligned||m) + KL(original||m)) / 2, eps inside the logarithms only; gradient alike."""
    p, q = original + eps, aligned + eps
    m = (p + q).mul_(0.5)
    log_p, log_q = (p / m).log_(), (q / m).log_()
    torch.add(log_q, 1 / m - 1 / q, alpha=eps, out=gradient).mul_(0.5)
    return (log_p.mul_(original).sum() + log_q.mul_(aligned).sum()) / 2
