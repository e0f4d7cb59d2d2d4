"""What a run tells while it goes: mean values of a step, the fixed probe, and when to worry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import NonFiniteLossError

from .denoiser import Batch

__all__ = ["Probe", "check_finite", "mean_of"]


@dataclass
class Probe:
    """The same samples, noise and timesteps, looked at again and again: drift without the noise of training batches.

    The winners' denoising error rising while the loss falls is how preference training fails: the margin is then won
    by making losers worse faster than winners. 20 % above the start is a proposed threshold, not a published one.
    """

    start: dict[str, float] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)

    def read(self, values: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """Record a look: its values as they will be logged, and warnings that have not been given before."""
        if not self.start:
            self.start = dict(values)
        named = {f"probe_{name}": value for name, value in values.items()}
        warnings = {}
        if "mse_w" in values and self.start["mse_w"] > 0:
            drift = values["mse_w"] / self.start["mse_w"] - 1
            named["winner_drift"] = drift
            if drift > 0.2:
                warnings["winner error"] = (
                    f"the winners' denoising error is {drift:.0%} above its start: images will fall apart soon; "
                    "stop, or start again with a lower learning rate"
                )
            elif drift > 0.02 and values.get("margin_accuracy", 0.0) == 1.0:
                warnings["saturated"] = (
                    f"every probe pair is ranked right and the winners' error rises ({drift:+.0%}): nothing is left "
                    "to learn from these pairs; an earlier checkpoint is probably better"
                )
        fresh = [kind for kind in warnings if kind not in self.warned]
        self.warned += fresh
        return named, [warnings[kind] for kind in fresh]

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"start": self.start, "warned": self.warned}


def mean_of(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean over all samples of several batches, value by value, as scalars on the device."""
    return {name: torch.cat([part[name].detach().reshape(-1) for part in parts]).mean() for name in parts[0]}


def check_finite(
    step: int,
    values: Mapping[str, float],
    parts: Sequence[Mapping[str, Tensor]],
    batches: Sequence[Batch],
    *,
    but: Sequence[str] = (),
    gather: Callable[[list[str]], list[str]] = list,
) -> None:
    """Stop at the first value that is not finite, naming the rows it came from.

    Args:
        step: for the message.
        values: means over the step; those named in `but` may be infinite.
        parts: the same values sample by sample, for each of `batches`.
        batches: of this process.
        gather: joins a list with those of all processes, which see the same `values` and so all come here.

    Raises:
        NonFiniteLossError: with step, values, rows and timesteps.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value) and name not in but]
    if not bad:
        return
    rows, suspects = [], []
    for part, batch in zip(parts, batches, strict=True):
        # The loss is of all rows together. Values that end in _pretrain are those of the second set's rows.
        own = {name: value for name, value in part.items() if name != "loss"}
        second = {name: own.pop(name) for name in list(own) if name.endswith("_pretrain")}
        for seen, found in ((batch, own), (batch.pretraining, second)):
            if seen is None:
                continue
            for place, row in enumerate(seen.names):
                named = f"{row} (timestep {int(seen.timesteps[place])})"
                rows.append(named)
                per_row = [value[place] for value in found.values() if len(value) == len(seen.names)]
                if not all(bool(torch.isfinite(value)) for value in per_row):
                    suspects.append(named)
    named_rows = gather(suspects) or gather(rows)
    shown = named_rows[:8]
    more = len(named_rows) - len(shown)
    raise NonFiniteLossError(
        f"step {step}: {', '.join(bad)} is not finite; rows: {', '.join(shown)}{f' and {more} more' if more else ''}. "
        "Nothing was updated since the last step; look at these rows, lower the learning rate, or train in bfloat16 "
        "instead of float16"
    )
