"""Batch and memory settings per card size, for SDXL at 1024 px with cached data; 16 pairs a step each.

From arithmetic (README, "Fine-tune SDXL"): activations of a pair are 12.2 GB without and about 0.8 GB with
checkpointing; skipping checkpointing saves a third of the arithmetic, so it is off wherever two pairs fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmalign.errors import InputError

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """Settings for a LoRA run and for a full fine-tune; `None` where the card is too small for the latter."""

    name: str
    lora: Mapping[str, Any]
    full: Mapping[str, Any] | None

    def settings(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """What the preset sets, given what the user chose.

        Raises:
            InputError: a full fine-tune does not fit this card.
        """
        if chosen.get("adaptation") != "full":
            return dict(self.lora)
        if self.full is None:
            raise InputError(
                f"preset {self.name!r} cannot hold a full fine-tune (weights, gradients and 8-bit Adam take 26 GB); "
                "use adaptation: lora, or preset 48gb"
            )
        return dict(self.full)


def _settings(batch_size: int, checkpointing: bool, optimizer: str = "adamw") -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "accumulation": 16 // batch_size,
        "gradient_checkpointing": checkpointing,
        "optimizer": optimizer,
    }


PRESETS = {
    "24gb": Preset("24gb", _settings(4, True), None),
    "48gb": Preset("48gb", _settings(2, False), _settings(2, True, "adamw8bit")),
    "80gb": Preset("80gb", _settings(4, False), _settings(4, True)),
}
