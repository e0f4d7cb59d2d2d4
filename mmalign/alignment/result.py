"""`Alignment`: fitted heads with all that is known of how they came about."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float

from ..checks import at_least
from ..encoders.encoder import Encoder, unit_rows
from ..encoders.states import Layer
from ..errors import DamagedError, EncoderMismatchError, InputError, reason_of
from ..features import Features, FeatureSet, load_features
from ..files import save_tensors, whole_folder
from ..provenance import libraries, written_now
from .encoder import AlignedEncoder, TowerEncoder
from .fitting import TEXT
from .heads import Head, head_tensors, read_heads
from .report import read_report, write_report

__all__ = ["Alignment", "FeatureSource", "load_alignment"]

_FORMAT = 1
_FILE = "alignment.json"


@dataclass(frozen=True)
class FeatureSource:
    """Where features came from.

    Attributes:
        dim: their width.
        layer: number, or "output" for what the encoder itself gives.
        pooling: "cls" or "mean"; `None` for "output".
        spec: of the encoder; `None` where it is not known.
        fingerprint: of the encoder likewise.
    """

    dim: int
    layer: Layer = "output"
    pooling: Literal["cls", "mean"] | None = None
    spec: str | None = None
    fingerprint: str | None = None

    @classmethod
    def of(cls, features: Features, layer: Layer, dim: int) -> FeatureSource:
        """Of one layer of features."""
        encoder = features.encoder or {}
        pooling = None if layer == "output" else cast("Literal['cls', 'mean'] | None", features.pooling)
        return cls(dim, layer, pooling, encoder.get("spec"), encoder.get("fingerprint"))

    def require(self, features: Features, name: str) -> Layer:
        """The layer of other features of this modality; what is not known of either is not checked.

        Raises:
            InputError: they lack the layer, or have another pooling or width.
            EncoderMismatchError: they are another encoder's.
        """
        found = features.encoder if self.fingerprint else None
        if found and found["fingerprint"] != self.fingerprint:
            raise EncoderMismatchError(
                f"features are of {found['spec']!r} ({found['fingerprint'][:12]}), the head of {name} is fitted on "
                f"{self.spec!r} ({str(self.fingerprint)[:12]}); extract them with that encoder"
            )
        # A table of one's own has but one layer, whatever its name.
        layer = self.layer if found or len(features.layers) > 1 else next(iter(features.layers))
        width = features[layer].shape[1]
        if width != self.dim:
            raise InputError(f"features have width {width}, the head of {name} takes {self.dim}")
        if found and layer != "output" and features.pooling != self.pooling:
            raise InputError(
                f"features have pooling {features.pooling!r}, the head of {name} is fitted on {self.pooling!r}; "
                "extract them with that"
            )
        return layer


@dataclass
class Alignment:
    """One head a modality, "text" among them, into one space.

    Attributes:
        heads: by modality.
        method: name in `METHODS`.
        options: of the method, presets included.
        sources: what each head was fitted on.
        counts: `rows`, `texts` and `held_out` by modality.
        step: optimiser step that the heads are of; 0 for closed forms.
        stopped: steps that were made.
        learned: numbers that were fitted or chosen beside the heads.
        history: one line a look during training.
        warnings: what a person should know.
        seed: of everything random.
        report: what was measured beside baselines; JSON-safe, `{}` if nothing was.
    """

    heads: dict[str, Head] = field(repr=False)
    method: str
    options: dict[str, Any]
    sources: dict[str, FeatureSource]
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    step: int = 0
    stopped: int = 0
    learned: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list, repr=False)
    warnings: list[str] = field(default_factory=list)
    seed: int = 0
    report: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def dim(self) -> int:
        """Width of the joint space."""
        return self.heads[TEXT].dim

    @torch.inference_mode()
    def encode(self, modality: str, features: FeatureSet, *, batch_size: int = 4096) -> Float[np.ndarray, "n dim"]:
        """Features of one modality as unit rows of the joint space.

        Args:
            modality: "text", "image" or another that was aligned.
            features: raw, from the encoder and layer that the head was fitted on.
            batch_size: rows at a time.

        Raises:
            InputError: no such modality, another width, layer or pooling, or a row that could not be read.
            EncoderMismatchError: features of another encoder.
        """
        if modality not in self.heads:
            raise InputError(f"modality is {modality!r}; this alignment has {', '.join(self.heads)}")
        at_least("batch_size", batch_size)
        given, head = load_features(features), self.heads[modality]
        rows = given[self.sources[modality].require(given, modality)]
        if not given.usable.all():
            raise InputError(
                f"row {given.usable.argmin()} of {modality} could not be read and has no features; leave such rows "
                "out, as in `features.take(np.flatnonzero(features.usable))`"
            )
        starts = range(0, len(rows), batch_size)
        parts = [torch.from_numpy(np.array(rows[at : at + batch_size], np.float32)) for at in starts]
        return np.concatenate([np.zeros((0, self.dim), np.float32), *(unit_rows(head(part)) for part in parts)])

    def tower(self, modality: str, encoder: Encoder) -> TowerEncoder:
        """An encoder of one modality into the joint space: "image" or "text".

        Raises:
            InputError: no such modality, tower or layer, or other widths.
            EncoderMismatchError: not the encoder that the head was fitted on.
        """
        if modality not in self.heads:
            raise InputError(f"modality is {modality!r}; this alignment has {', '.join(self.heads)}")
        source = self.sources[modality]
        if source.fingerprint and encoder.fingerprint != source.fingerprint:
            raise EncoderMismatchError(
                f"the head of {modality} was fitted on {source.spec!r} ({source.fingerprint[:12]}), not on "
                f"{encoder.spec!r} ({encoder.fingerprint[:12]}); give that encoder"
            )
        return TowerEncoder(encoder, modality, self.heads[modality], layer=source.layer, pooling=source.pooling)

    def encoder(self, image_encoder: Encoder, text_encoder: Encoder) -> AlignedEncoder:
        """One encoder of images and texts, to be saved, loaded by its folder and indexed with.

        Raises:
            InputError, EncoderMismatchError: see `tower`.
        """
        towers = self.tower("image", image_encoder), self.tower(TEXT, text_encoder)
        return AlignedEncoder(*towers, {}, dim=self.dim, settings=self.summary())

    def summary(self) -> dict[str, Any]:
        """What was fitted, JSON-safe and without history."""
        about = {"method": self.method, "options": self.options, "counts": self.counts, "step": self.step}
        return {**about, "stopped": self.stopped, "learned": self.learned, "seed": self.seed}

    def to_dict(self) -> dict[str, Any]:
        """All but the heads' tensors, JSON-safe."""
        return {
            **self.summary(),
            "heads": {name: head.settings for name, head in self.heads.items()},
            "sources": {name: asdict(source) for name, source in self.sources.items()},
            "history": self.history,
            "warnings": self.warnings,
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write json and safetensors to a folder, which appears whole or not at all.

        Raises:
            InputError: `folder` exists and is no alignment, or it cannot be written.
        """
        target = Path(folder)
        if target.exists() and not (target / _FILE).is_file():
            raise InputError(f"{str(target)!r} exists and is not an alignment; choose another path")
        with whole_folder(target) as fresh:
            about = {"format": _FORMAT, **self.to_dict(), "libraries": libraries(), "written": written_now()}
            (fresh / _FILE).write_text(json.dumps(about, indent=1), encoding="utf-8")
            save_tensors(head_tensors(self.heads), fresh / "heads.safetensors")
            if self.report:
                write_report(self.report, fresh)
        return target


def load_alignment(folder: str | os.PathLike[str]) -> Alignment:
    """What `Alignment.save` wrote.

    Raises:
        InputError: no such folder, or of a newer format.
        DamagedError: its files are not what was written.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    if not (path / _FILE).is_file():
        raise InputError(f"{str(path)!r} holds no {_FILE}; give a folder made by Alignment.save")
    try:
        about = json.loads((path / _FILE).read_text(encoding="utf-8"))
        if about["format"] <= _FORMAT:
            own = ("method", "options", "counts", "step", "stopped", "learned", "history", "warnings", "seed")
            return Alignment(
                heads=read_heads(about["heads"], load_file(path / "heads.safetensors")),
                sources={name: FeatureSource(**source) for name, source in about["sources"].items()},
                **{name: about[name] for name in own},
                report=read_report(path),
            )
    except Exception as error:
        raise DamagedError(f"alignment {str(path)!r} cannot be read ({reason_of(error)}); fit it again") from None
    raise InputError(
        f"{str(path)!r} has format {about['format']}, this mmalign reads up to {_FORMAT}; upgrade with "
        "`pip install -U mmalign`"
    )
