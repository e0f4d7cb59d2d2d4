"""Zero-shot classification by prompt templates. Methods card STRUCTURE, section 7."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from mmalign.errors import InputError

from ._arrays import as_numpy, as_rows, unit_rows
from .ranking import score_blocks
from .retrieval import per_query_metrics


def zero_shot_classifier(
    template_text: Float[np.ndarray, "classes templates dim"],
) -> Float[np.ndarray, "classes dim"]:
    """One unit vector per class: every template's embedding normalised, averaged, normalised again."""
    embeddings = as_numpy(template_text)
    if embeddings.ndim != 3:
        raise InputError(f"template_text must have shape [classes, templates, dim], not {embeddings.shape}")
    classes, templates, dim = embeddings.shape
    rows = unit_rows(as_rows(embeddings.reshape(-1, dim), "template_text"), "template_text")
    return unit_rows(rows.reshape(classes, templates, dim).mean(axis=1), "class mean")


def zero_shot_predict(
    image_embeddings: Float[np.ndarray, "image dim"],
    class_weights: Float[np.ndarray, "classes dim"],
    *,
    chunk_size: int | None = None,
) -> Int[np.ndarray, " image"]:
    """The class of highest cosine for each image, the lower class in a tie."""
    blocks = score_blocks(None, image_embeddings, class_weights, chunk_size=chunk_size)[2]
    return np.concatenate([np.zeros(0, np.int64), *(block.argmax(axis=1) for block in blocks)])


def zero_shot_accuracy(
    image_embeddings: Float[np.ndarray, "image dim"],
    class_weights: Float[np.ndarray, "classes dim"],
    labels: Int[np.ndarray, " image"],
    *,
    ks: Sequence[int] = (1, 5),
    chunk_size: int | None = None,
) -> dict[str, float]:
    """Top-k accuracy over images ("top1_micro") and averaged over the classes that occur ("top1_macro").

    A class without an image has no accuracy and does not enter the macro average; n_class_present tells how
    many of n_class do.
    """
    true = as_numpy(labels)
    n_class = len(class_weights)
    if not np.issubdtype(true.dtype, np.integer) or true.ndim != 1 or not true.size:
        raise InputError(f"labels must be one integer class per image, not {true.dtype} of shape {true.shape}")
    if true.min() < 0 or true.max() >= n_class:
        raise InputError(f"labels run from {true.min()} to {true.max()}; there are {n_class} classes")
    values = per_query_metrics(
        queries=image_embeddings,
        gallery=class_weights,
        positives=list(true[:, None]),
        ks=ks,
        chunk_size=chunk_size,
    )
    images_of = np.bincount(true, minlength=n_class)
    present = images_of > 0
    out: dict[str, float] = {}
    for k in ks:
        right = values[f"hit@{k}"]
        out[f"top{k}_micro"] = float(right.mean())
        out[f"top{k}_macro"] = float(
            (np.bincount(true, weights=right, minlength=n_class)[present] / images_of[present]).mean()
        )
    return out | {"n_image": true.size, "n_class": n_class, "n_class_present": int(present.sum())}
