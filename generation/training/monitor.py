"""What a run tells while it goes: mean values of a step, rows that are no numbers any more, and when to worry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mmalign.errors import NonFiniteLossError

from .feed import TrainingBatch

__all__ = ["check_finite", "collapse_warnings", "mean_of", "winner_drift"]


def winner_drift(start: Mapping[str, float], values: Mapping[str, float]) -> float | None:
    """How far the winners' denoising error in the probe is above its start, relative to that; `None` without one."""
    before = start.get("probe_mse_w", 0.0)
    return values["probe_mse_w"] / before - 1 if "probe_mse_w" in values and before > 0 else None


def collapse_warnings(start: Mapping[str, float], values: Mapping[str, float]) -> dict[str, str]:
    """Why to worry about a preference run, by kind, from the first look at the probe and this one.

    The winners' denoising error rising while the loss falls is how preference training fails: the margin is then won
    by making losers worse faster than winners. 20 % above the start is a proposed threshold, not a published one.
    """
    drift = winner_drift(start, values)
    if drift is None:
        return {}
    if drift > 0.2:
        return {
            "winner error": f"the winners' denoising error is {drift:.0%} above its start: images will fall apart "
            "soon; stop, or start again with a lower learning rate"
        }
    if drift > 0.02 and values.get("probe_margin_accuracy", 0.0) == 1.0:
        return {
            "saturated": f"every probe pair is ranked right and the winners' error rises ({drift:+.0%}): nothing is "
            "left to learn from these pairs; an earlier checkpoint is probably better"
        }
    return {}


def mean_of(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean over all samples of several batches, value by value, as scalars on the device."""
    return {name: torch.cat([part[name].detach().reshape(-1) for part in parts]).mean() for name in parts[0]}


def check_finite(
    step: int,
    values: Mapping[str, float],
    parts: Sequence[Mapping[str, Tensor]],
    batches: Sequence[TrainingBatch],
    *,
    but: Sequence[str] = (),
    gather: Callable[[list[str]], list[str]] = list,
) -> None:
    """Stop at the first value that is not finite, naming the rows it came from.

    Args:
        step: of the optimiser, for the message.
        values: means over the step; those named in `but` may be infinite.
        parts: the same values sample by sample, for each of `batches`.
        batches: of this process.
        gather: joins a list with those of all processes, which see the same `values` and so all come here.

    Raises:
        NonFiniteLossError: with step, values and rows.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value) and name not in but]
    if not bad:
        return
    rows: list[str] = []
    suspects: list[str] = []
    for part, batch in zip(parts, batches, strict=True):
        labels = batch.labels()
        per_row: dict[str, list[Tensor]] = {ending: [] for ending in labels}
        for name, value in part.items():
            ending = max((ending for ending in labels if name.endswith(ending)), key=len, default=None)
            # The loss is of all rows together.
            if name != "loss" and ending is not None and value.shape == (len(labels[ending]),):
                per_row[ending].append(value)
        for ending, named in labels.items():
            rows += named
            finite = [all(bool(torch.isfinite(value[i])) for value in per_row[ending]) for i in range(len(named))]
            suspects += [row for row, fine in zip(named, finite, strict=True) if not fine]
    named_rows = gather(suspects) or gather(rows)
    shown = named_rows[:8]
    more = len(named_rows) - len(shown)
    raise NonFiniteLossError(
        f"optimiser step {step}: {', '.join(bad)} is not finite; rows: {', '.join(shown)}"
        f"{f' and {more} more' if more else ''}. Nothing was updated since the last step; look at these rows, lower "
        "the learning rate, or train in bfloat16 instead of float16"
    )
