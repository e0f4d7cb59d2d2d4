"""Threshold-consistent margins: one score threshold that holds for every class, arXiv 2307.04047.

A regulariser beside a metric loss: L = L_base + L_TCM. Positive pairs are pulled above one margin and negative pairs
pushed below another, the same for all classes. Methods card "retrieval metrics", section 6; what it is for is
measured by `mmalign.metrics.opis`.

Pure functions on tensors, in float32 or better with autocast off.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .checks import in_range
from .contrastive import unit_rows
from .errors import InputError

__all__ = ["TCM", "tcm_loss", "tcm_pairs"]


class TCM(NamedTuple):
    """`loss` = positive + negative, both with their weights; and how many pairs were hard."""

    loss: Float[Tensor, ""]
    positive: Float[Tensor, ""]
    negative: Float[Tensor, ""]
    n_positive: Int[Tensor, ""]
    n_negative: Int[Tensor, ""]


def tcm_loss(
    embeddings: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    *,
    positive_margin: float = 0.9,
    negative_margin: float = 0.5,
    positive_weight: float = 1.0,
    negative_weight: float = 1.0,
) -> TCM:
    """`tcm_pairs` of the cosines of a batch: pairs i != j of one label are positive, of two labels negative.

    Args:
        embeddings: one row an item; normalised inside.
        labels: any whole numbers.
        positive_margin, negative_margin, positive_weight, negative_weight: see `tcm_pairs`.

    Raises:
        InputError: the shapes do not fit or an option is out of its range.
    """
    if labels.shape != embeddings.shape[:1]:
        raise InputError(
            f"embeddings have shape {tuple(embeddings.shape)}, labels {tuple(labels.shape)}; give one label a row"
        )
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = unit_rows(embeddings, "embeddings")
        similarity = unit @ unit.T
    return tcm_pairs(
        similarity,
        labels[:, None] == labels[None, :],
        exclude=torch.eye(len(labels), dtype=torch.bool, device=labels.device),
        positive_margin=positive_margin,
        negative_margin=negative_margin,
        positive_weight=positive_weight,
        negative_weight=negative_weight,
    )


def tcm_pairs(
    similarity: Float[Tensor, "n m"],
    positives: Bool[Tensor, "n m"],
    *,
    exclude: Bool[Tensor, "n m"] | None = None,
    positive_margin: float = 0.9,
    negative_margin: float = 0.5,
    positive_weight: float = 1.0,
    negative_weight: float = 1.0,
) -> TCM:
    """Mean violation of hard positive pairs plus mean violation of hard negative ones.

        L =  w+ sum_{S+} (m+ - s) [s <= m+] / #{S+: s <= m+}  +  w- sum_{S-} (s - m-) [s >= m-] / #{S-: s >= m-}

    Means run over the hard pairs only, so the gradient does not fade as violations become rare. A part without a
    hard pair is 0. Rows and columns may be two modalities or a batch and a memory: every pair is given explicitly.

    Args:
        similarity: cosines, in [-1, 1].
        positives: which pairs belong together; the others are negative.
        exclude: pairs that are neither, such as an item with itself.
        positive_margin: m+, what a positive pair should exceed. The defaults suit embeddings of one modality; image
            and text of a CLIP-like model score 0.1 to 0.4, so take both margins from quantiles of your scores there.
        negative_margin: m-, what a negative pair should stay below.
        positive_weight: w+, 0 or more.
        negative_weight: w-, 0 or more.

    Raises:
        InputError: the shapes do not fit or an option is out of its range.
    """
    for name, margin in (("positive_margin", positive_margin), ("negative_margin", negative_margin)):
        in_range(name, margin, -1, 1)
    for name, weight in (("positive_weight", positive_weight), ("negative_weight", negative_weight)):
        in_range(name, weight, 0)
    for name, mask in (("positives", positives), ("exclude", exclude)):
        if mask is not None and (mask.shape != similarity.shape or mask.dtype != torch.bool):
            given = f"{mask.dtype} of shape {tuple(mask.shape)}"
            raise InputError(f"{name} is {given}; give torch.bool of shape {tuple(similarity.shape)}")
    with torch.autocast(similarity.device.type, enabled=False):
        scores = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
        hard_positive = positives & (scores <= positive_margin)
        hard_negative = ~positives & (scores >= negative_margin)
        if exclude is not None:
            hard_positive, hard_negative = hard_positive & ~exclude, hard_negative & ~exclude
        n_positive, n_negative = hard_positive.sum(), hard_negative.sum()
        positive = positive_weight * ((positive_margin - scores) * hard_positive).sum() / n_positive.clamp_min(1)
        negative = negative_weight * ((scores - negative_margin) * hard_negative).sum() / n_negative.clamp_min(1)
    return TCM(positive + negative, positive, negative, n_positive, n_negative)
