"""Contrastive losses of image-text pairs: CLIP, CLIP with softened targets, SigLIP. Pure functions on tensors.

All take rows as the heads give them, normalise them inside, and compute in float32 or better with autocast off.
`logit_scale` is the factor on the cosines itself (1 / temperature), not its logarithm.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from .checks import in_range, one_of
from .errors import InputError

__all__ = ["clip_loss", "siglip_loss", "softened_targets"]


def clip_loss(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    logit_scale: Float[Tensor, ""] | float,
    *,
    targets: Float[Tensor, "n n"] | None = None,
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy over the pairs of a batch: CLIP, arXiv 2103.00020, section 2.3.

        logits = logit_scale * u v^T,   L = (CE(logits, targets) + CE(logits^T, targets^T)) / 2

    Args:
        image: row i belongs to row i of `text`; any length but 0.
        text: alike.
        logit_scale: factor on the cosines, above 0; 20 is temperature 0.05.
        targets: what image i should say about every text: rows that sum to 1, such as `softened_targets`; without
            them the text of its own row. From text to image the transposed matrix is used, each row divided by its
            sum; a text that no image points to adds nothing.

    Returns:
        A scalar, at least 0; ln n where nothing is told apart.

    Raises:
        InputError: the shapes do not fit.
    """
    if image.shape != text.shape:
        raise InputError(f"image has shape {tuple(image.shape)}, text {tuple(text.shape)}; give one row each a pair")
    n = len(image)
    if targets is not None and targets.shape != (n, n):
        raise InputError(f"targets have shape {tuple(targets.shape)}; give {(n, n)}, one row an image")
    with torch.autocast(image.device.type, enabled=False):
        logits = (logit_scale * unit_rows(image, "image")) @ unit_rows(text, "text").T
        if targets is None:
            own = torch.arange(n, device=logits.device)
            return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        of_texts = normalize(targets.to(logits.dtype).T, p=1, dim=1)
        return (cross_entropy(logits, targets.to(logits.dtype)) + cross_entropy(logits.T, of_texts)) / 2


@torch.no_grad()
def softened_targets(
    rows: Float[Tensor, "n d"], *, weight: float = 0.2, temperature: float = 0.1
) -> Float[Tensor, "n n"]:
    """Targets for `clip_loss` that credit pairs which resemble each other: after SoftCLIP, arXiv 2303.17561.

        targets = (1 - weight) I + weight softmax_row(u u^T / temperature)

    The mixture with the identity is the paper's; which rows tell the likeness (the paper takes features of image
    regions, here any one embedding a pair, such as the frozen image or text features) is left to the caller.

    Args:
        rows: one embedding a pair.
        weight: share of the softened part, in [0, 1].
        temperature: of the softmax, 1e-6 or more; infinity makes plain label smoothing, weight / n everywhere.

    Returns:
        Rows that sum to 1, without gradient.

    Raises:
        InputError: an option is out of its range, or `rows` is no matrix.
    """
    in_range("weight", weight, 0, 1)
    if temperature != math.inf:
        in_range("temperature", temperature, 1e-6)
    with torch.autocast(rows.device.type, enabled=False):
        unit = unit_rows(rows, "rows")
        soft = torch.softmax(unit @ unit.T / temperature, dim=1)
    soft.mul_(weight).diagonal().add_(1 - weight)
    return soft


def siglip_loss(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "m d"],
    logit_scale: Float[Tensor, ""] | float,
    logit_bias: Float[Tensor, ""] | float = 0.0,
    *,
    positives: Bool[Tensor, "n m"] | None = None,
    average: str = "rows",
) -> Float[Tensor, ""]:
    """Every image-text pair of the batch as its own yes or no: SigLIP, arXiv 2303.15343, eq. 1.

        L = - sum_ij log sigmoid(y_ij (logit_scale * u_i v_j + logit_bias)) / N,   y = 1 for a positive, else -1

    Args:
        image: one row an image.
        text: one row a text; as many as images, unless `positives` says which belong together.
        logit_scale: factor on the cosines, above 0; the paper starts at 10.
        logit_bias: added to the logits; the paper starts at -10, because most pairs are negative.
        positives: which pairs belong together, any number a row; without it row i and row i.
        average: N = n, "rows" (the paper), or N = n m, "pairs" (SAIL, arXiv 2412.04616): then the size of the loss
            does not grow with the number of texts.

    Raises:
        InputError: the shapes do not fit, or `average` is another word.
    """
    one_of("average", average, ("rows", "pairs"))
    n, m = len(image), len(text)
    if positives is None:
        if n != m:
            raise InputError(f"image has {n} rows, text {m}; give positives to say which belong together")
        positives = torch.eye(n, dtype=torch.bool, device=image.device)
    if positives.shape != (n, m) or positives.dtype != torch.bool:
        raise InputError(
            f"positives are {positives.dtype} of shape {tuple(positives.shape)}; give torch.bool of {(n, m)}"
        )
    with torch.autocast(image.device.type, enabled=False):
        logits = (logit_scale * unit_rows(image, "image")) @ unit_rows(text, "text").T + logit_bias
        return -logsigmoid(torch.where(positives, logits, -logits)).sum() / (n if average == "rows" else n * m)


def unit_rows(rows: Float[Tensor, "n d"], name: str) -> Float[Tensor, "n d"]:
    """Rows of length 1 in float32 or better; a row of zeros stays one."""
    if rows.ndim != 2 or not len(rows):
        raise InputError(f"{name} has shape {tuple(rows.shape)}; give a matrix with at least one row")
    return normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)
