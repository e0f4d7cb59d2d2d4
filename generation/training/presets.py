"""Batch and memory settings per card size, for SDXL at 1024 px.

For pairs with cached data, 16 a step, from arithmetic (README, "Fine-tune SDXL"): activations of a pair are 12.2 GB
without and about 0.8 GB with checkpointing; skipping checkpointing saves a third of the arithmetic, so it is off
wherever two pairs fit.

For rewards of drawn images, 32 a step, also from arithmetic: with checkpointing a graded step holds 0.94 GiB an image
and the VAE's decoder, in float32, 3.2 GiB; a reward of ViT-H takes 2.5 GB and the frozen UNet 5.1 GB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmalign.errors import InputError

__all__ = ["GRPO_CARDS", "PRESETS", "REWARD_PRESETS", "Preset", "both"]


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


def both(name: str, **settings: Any) -> Preset:
    """A preset that sets the same for a LoRA run and for a full fine-tune."""
    return Preset(name, settings, settings)


def _settings(batch_size: int, checkpointing: bool, optimizer: str = "adamw", total: int = 16) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "accumulation": total // batch_size,
        "gradient_checkpointing": checkpointing,
        "optimizer": optimizer,
    }


PRESETS = {
    "24gb": Preset("24gb", _settings(4, True), None),
    "48gb": Preset("48gb", _settings(2, False), _settings(2, True, "adamw8bit")),
    "80gb": Preset("80gb", _settings(4, False), _settings(4, True)),
}

REWARD_PRESETS = {
    "24gb": Preset("24gb", _settings(2, True, total=32), None),
    "48gb": Preset("48gb", _settings(4, True, total=32), _settings(1, True, "adamw8bit", total=32)),
    "80gb": Preset("80gb", _settings(8, True, total=32), _settings(4, True, total=32)),
}

# 144 images a step: whole groups of 8, 9 and 16.
GRPO_CARDS = {
    "24gb": Preset("24gb", _settings(2, True, total=144), None),
    "48gb": Preset("48gb", _settings(4, True, total=144), _settings(1, True, "adamw8bit", total=144)),
    "80gb": Preset("80gb", _settings(8, True, total=144), _settings(4, True, total=144)),
}
