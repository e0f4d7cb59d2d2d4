"""An image encoder whose first dimensions search the index of the encoder before it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float

from ..checks import at_least
from ..errors import InputError
from ..imaging import ImagePreprocessing
from .timm import TimmEncoder

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CompatibleEncoder"]


class CompatibleEncoder(TimmEncoder):
    """A timm model that `mmalign.fine_tuning.fine_tune_compatible` has trained beside an older encoder, images only.

    Between its own rows all dimensions count. Against vectors of the older encoder the first `compatible_dim` do:

        old_index.search_vectors(new.compatible_rows(new.encode_images(queries)))

    Whether that finds more than the older encoder's own queries do is a matter of measurement: see `report`.

    Attributes:
        compatible_with: fingerprint of the older encoder.
        compatible_dim: its dimensions.
        report: what was measured after training; `{}` where that is not known.
    """

    source: ClassVar[str] = "compatible"

    def __init__(
        self,
        model: Any,
        architecture: str,
        spec: str,
        *,
        compatible_with: str,
        compatible_dim: int,
        options: dict[str, Any] | None = None,
        preprocessing: ImagePreprocessing | None = None,
    ) -> None:
        """As `TimmEncoder`; the output layer of `model` has `compatible_dim` dimensions or more."""
        super().__init__(model, architecture, spec, options=options, preprocessing=preprocessing)
        at_least("compatible_dim", compatible_dim)
        if compatible_dim > self.dim:
            raise InputError(f"compatible_dim is {compatible_dim}, and the model gives {self.dim} numbers; give less")
        self.compatible_with, self.compatible_dim = compatible_with, compatible_dim
        self.report: dict[str, Any] = {}

    def compatible_rows(self, rows: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n old_dim"]:
        """Unit rows in the space of the older encoder, float32, from rows of this one: the first dimensions.

        Raises:
            InputError: rows of another width.
        """
        rows = np.asarray(rows, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise InputError(f"rows have shape {rows.shape}; give rows of this encoder, {self.dim} numbers each")
        kept = rows[:, : self.compatible_dim]
        lengths = np.linalg.norm(kept, axis=1, keepdims=True)
        return kept / np.maximum(lengths, np.finfo(np.float32).tiny)

    def describe(self) -> dict[str, Any]:
        """As `TimmEncoder`, and what it is compatible with."""
        return {
            **super().describe(),
            "compatible_with": self.compatible_with,
            "compatible_dim": self.compatible_dim,
        }

    def write(self, folder: Path) -> dict[str, Any]:
        """As `TimmEncoder`, with the report and its pictures."""
        if self.report:
            from ..fine_tuning.oca.report import write_report

            write_report(self.report, folder)
        about = {"compatible_with": self.compatible_with, "compatible_dim": self.compatible_dim}
        return {**super().write(folder), **about}

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> Self:
        """Rebuild from name and weights."""
        from ..fine_tuning.oca.report import read_report

        tower = TimmEncoder.read(folder, config)
        encoder = cls(
            tower.model,
            tower.architecture,
            tower.spec,
            compatible_with=config["compatible_with"],
            compatible_dim=config["compatible_dim"],
            options=tower.options,
        )
        encoder.report = read_report(folder)
        return encoder
