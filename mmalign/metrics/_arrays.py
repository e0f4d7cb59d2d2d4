"""The edge of the metrics: whatever comes in leaves as a checked numpy array."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from mmalign.errors import InputError


def as_numpy(values: Any) -> np.ndarray:
    """A numpy array from an array, a list or a torch tensor on any device (bfloat16 becomes float32)."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":
            values = values.float()
    return np.asarray(values)


def as_rows(values: Any, name: str) -> Float[np.ndarray, "row dim"]:
    """A matrix of embeddings, float32 or float64, without NaN."""
    rows = as_numpy(values)
    if rows.ndim != 2:
        raise InputError(f"{name} must be a matrix with one row per item, not of shape {rows.shape}")
    if rows.dtype not in (np.float32, np.float64):
        rows = rows.astype(np.float32 if rows.dtype == np.float16 else np.float64)
    bad = np.isnan(rows).any(axis=1)
    if bad.any():
        raise InputError(f"{name} row {int(bad.argmax())} contains NaN; encode that item again or leave it out")
    return rows


def unit_rows(rows: Float[np.ndarray, "row dim"], name: str) -> Float[np.ndarray, "row dim"]:
    """Each row divided by its Euclidean norm."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    if not norm.all():
        raise InputError(f"{name} row {int((norm == 0).argmax())} is all zero and has no direction; leave it out")
    return rows / norm
