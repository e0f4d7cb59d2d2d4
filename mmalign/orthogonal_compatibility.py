"""Losses that train a new image encoder whose first dimensions search an old encoder's index: OCA. Pure functions.

"Backward-Compatible Aligned Representations via an Orthogonal Transformation Layer", arXiv 2408.08793. The new network
has the old one's dimensions and some more. Its unit rows are held to the classes' old means on the first, compatible
dimensions; a trained rotation behind them gives the classifier all dimensions to use, and is thrown away afterwards.
It takes labels, and training of the new network: for two frozen encoders see `mmalign.spherical_interpolation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, linear, normalize

from .checks import at_least, in_range
from .errors import InputError

__all__ = ["OCAForward", "OCALoss", "class_prototypes", "oca_forward", "oca_loss"]


class OCALoss(NamedTuple):
    """The loss and its three terms without their weights, scalars with gradient."""

    total: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    bct: Float[Tensor, ""]
    cos: Float[Tensor, ""]


class OCAForward(NamedTuple):
    """What becomes of a batch of the new network's features.

    `new_feature` is the representation that is kept: unit rows over all dimensions. `bct_feature` is its compatible
    part, not normalised again. The rest serves training alone.
    """

    new_feature: Float[Tensor, "batch dim"]
    bct_feature: Float[Tensor, "batch old_dim"]
    orth_output: Float[Tensor, "batch dim"]
    logits: Float[Tensor, "batch classes"]


def oca_loss(
    features: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    prototypes: Float[Tensor, "classes old_dim"],
    layer: Callable[[Float[Tensor, "batch dim"]], Float[Tensor, "batch dim"]],
    classifier_weight: Float[Tensor, "classes dim"],
    *,
    label_smoothing: float = 0.1,
    weights: tuple[float, float, float] = (5.0, 10.0, 5.0),
) -> OCALoss:
    """Classify by the rotated features, classify by the old class means, point at the own class mean.

        h = f / |f|,   u = h[:d_old] / |h[:d_old]|,   CE with smoothed labels
        ce  = CE((Q h + b) W^T, y)
        bct = CE(u P^T, y)                        no temperature: these logits are in [-|P|, |P|]
        cos = mean(1 - cos(P_y, u))               in [0, 2]
        total = w_ce ce + w_bct bct + w_cos cos

    Computed in float32 or better, with autocast off.

    Args:
        features: raw output of the new network, `dim` at least `old_dim`; a row of zeros stays zero.
        labels: class of each row, in [0, classes).
        prototypes: `class_prototypes` of the new training set; fixed.
        layer: the rotation, an `OrthogonalLinear(dim)`; any callable that maps rows to rows.
        classifier_weight: W, without a bias.
        label_smoothing: of both cross-entropies, in [0, 1]; 0.1 in the authors' code.
        weights: of ce, bct and cos; the defaults are those that the authors' trainer has written into it, whatever its
            configuration says.

    Raises:
        InputError: shapes that do not fit, or an option out of its range.
    """
    in_range("label_smoothing", label_smoothing, 0, 1)
    if len(weights) != 3:
        raise InputError(f"weights are {weights!r}; give three, of ce, bct and cos")
    for weight in weights:
        in_range("weights", weight, 0)
    if labels.shape != features.shape[:1] or len(prototypes) != len(classifier_weight):
        shapes = {"features": features, "labels": labels, "prototypes": prototypes, "classifier": classifier_weight}
        found = ", ".join(f"{name} {tuple(value.shape)}" for name, value in shapes.items())
        raise InputError(f"{found}: give a label a row, and a prototype and a row of the classifier a class")
    with torch.autocast(features.device.type, enabled=False):
        passed = oca_forward(features, layer, classifier_weight, prototypes.shape[1])
        compatible = normalize(passed.bct_feature, dim=1)
        prototypes = prototypes.to(compatible.dtype)
        ce = cross_entropy(passed.logits, labels, label_smoothing=label_smoothing)
        bct = cross_entropy(compatible @ prototypes.T, labels, label_smoothing=label_smoothing)
        cos = (1 - cosine_similarity(prototypes[labels], compatible)).mean()
        return OCALoss(weights[0] * ce + weights[1] * bct + weights[2] * cos, ce, bct, cos)


def oca_forward(
    features: Float[Tensor, "batch dim"],
    layer: Callable[[Float[Tensor, "batch dim"]], Float[Tensor, "batch dim"]],
    classifier_weight: Float[Tensor, "classes dim"],
    old_dim: int,
) -> OCAForward:
    """The parts that `oca_loss` is made of; see there.

    Raises:
        InputError: the new features have fewer dimensions than the old.
    """
    at_least("old_dim", old_dim)
    if features.ndim != 2 or features.shape[1] < old_dim:
        raise InputError(
            f"features have shape {tuple(features.shape)}; give rows of the {old_dim} old dimensions or more"
        )
    wide = features if features.dtype == torch.float64 else features.float()
    new_feature = normalize(wide, dim=1)
    turned = layer(new_feature)
    return OCAForward(new_feature, new_feature[:, :old_dim], turned, linear(turned, classifier_weight))


@torch.no_grad()
def class_prototypes(
    old_features: Float[Tensor, "n old_dim"], labels: Int[Tensor, " n"], classes: int
) -> Float[Tensor, "classes old_dim"]:
    """Mean of the old encoder's unit rows over each class of the new training set; not normalised again.

    The shorter a mean, the more its class scatters in the old space, and the less it weighs in the compatible logits.
    Classes that the old encoder was never trained on have one too. Summed in float64.

    Args:
        old_features: one row an image of the NEW training set, in any length.
        labels: its class, in [0, classes).
        classes: how many there are.

    Raises:
        InputError: a label out of range or not one a row, or a class without a row.
    """
    at_least("classes", classes)
    if old_features.ndim != 2 or labels.shape != old_features.shape[:1] or labels.is_floating_point():
        raise InputError(
            f"old_features have shape {tuple(old_features.shape)}, labels {tuple(labels.shape)} of {labels.dtype}; "
            "give one whole number a row"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(f"labels go from {int(labels.min())} to {int(labels.max())}; give numbers in [0, {classes})")
    counts = torch.bincount(labels, minlength=classes)
    if not counts.all():
        missing = int((counts == 0).nonzero()[0])
        raise InputError(f"class {missing} has no row; number the classes that there are from 0 on")
    sums = torch.zeros(classes, old_features.shape[1], dtype=torch.float64, device=old_features.device)
    sums.index_add_(0, labels, normalize(old_features.double(), dim=1))
    return (sums / counts.unsqueeze(1)).to(old_features.dtype)
