"""Aligned encoders: one tower of a frozen encoder with a fitted head, and an image and a text tower joined."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from ..encoders.encoder import Encoder
from ..encoders.folder import read_part, write_part, write_weights
from ..encoders.joined import JoinedEncoder
from ..encoders.states import Layer, check_layer, default_pooling
from ..errors import InputError
from ..fingerprint import digest_of, tensor_digest
from .heads import Head, build_head, head_tensors, read_heads
from .report import read_report, write_report

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Self

__all__ = ["AlignedEncoder", "TowerEncoder"]

_FITTED_ON = "fitted_on.txt"


class TowerEncoder(Encoder):
    """One tower of an encoder, read at a layer, pooled, and taken into the joint space by a head.

    Attributes:
        encoder: the frozen one.
        modality: "image" or "text".
        layer: number of the layer, or "output" for the encoder's own features.
        pooling: "cls" or "mean"; `None` for "output".
        head: a copy of the fitted one, on the encoder's device.
    """

    source: ClassVar[str] = "tower"

    def __init__(
        self,
        encoder: Encoder,
        modality: str,
        head: Head,
        *,
        layer: Layer = "output",
        pooling: Literal["cls", "mean"] | None = None,
        spec: str = "",
    ) -> None:
        """The encoder is not copied; the head is, as it goes where the encoder goes.

        Raises:
            InputError: the encoder lacks the tower or the layer, or gives another width than the head takes.
        """
        encoder.require(modality)
        self.encoder, self.modality, self.head = encoder, modality, copy.deepcopy(head)
        self.layer = check_layer(encoder, modality, layer)
        self.pooling = None if self.layer == "output" else pooling or default_pooling(encoder, modality)
        model = nn.ModuleDict({"encoder": encoder.model, "head": self.head})
        preprocessing = encoder.preprocessing if modality == "image" else None
        super().__init__(model, spec=spec or f"tower of {encoder.spec}", dim=head.dim, preprocessing=preprocessing)
        self.device, self.dtype, self._rounded = encoder.device, encoder.dtype, encoder._rounded
        self.head.to(self.device)
        width = self._width()
        if width != head.input_dim:
            raise InputError(
                f"layer {self.layer} of {encoder.spec!r} has {width} dimensions, the head takes {head.input_dim}; give "
                "the encoder and layer that it was fitted on"
            )

    @property
    def modalities(self) -> frozenset[str]:
        """The one of this tower."""
        return frozenset((self.modality,))

    @torch.inference_mode()
    def _width(self) -> int:
        if self.modality == "text":
            return self._raw_texts(["a"]).shape[1]
        assert self.preprocessing is not None
        blank = torch.zeros(1, 3, *self.preprocessing.size, device=self.device, dtype=self.dtype)
        return self._raw_images(blank).shape[1]

    def _raw_images(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch width"]:
        if self.layer == "output":
            return self.encoder.image_features(pixel_values).float()
        return self.encoder.image_states(pixel_values, [int(self.layer)])[0].pool(str(self.pooling))

    def _raw_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch width"]:
        if self.layer == "output":
            return self.encoder.text_features(texts).float()
        return self.encoder.text_states(texts, [int(self.layer)])[0].pool(str(self.pooling))

    def image_features(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Joint coordinates of images."""
        return self.head(self._raw_images(pixel_values))

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """Joint coordinates of texts."""
        return self.head(self._raw_texts(texts))

    @property
    def image_module(self) -> nn.Module | None:
        """The encoder's; the head stays in float32."""
        return self.encoder.image_module if self.modality == "image" else None

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Self:
        """As `Encoder.to`, the encoder included."""
        _ = self.fingerprint  # before any cast
        self.encoder.to(device, dtype if self.modality == "image" else None)
        self.device, self.dtype, self._rounded = self.encoder.device, self.encoder.dtype, self.encoder._rounded
        self.head.to(self.device)
        return self

    @property
    def fingerprint(self) -> str:
        """As `Encoder.fingerprint`; the encoder answers for itself, as what it was before any cast."""
        if self._fingerprint is None:
            self._fingerprint = self._digest(self.encoder.fingerprint)
        return self._fingerprint

    def digest(self) -> str:
        """`fingerprint` taken anew, from the weights as they are now."""
        return self._digest(self.encoder.digest())

    def _digest(self, encoder: str) -> str:
        head = {name: tensor_digest(value) for name, value in self.head.state_dict().items()}
        about = {"source": self.source, "encoder": encoder, "tensors": head, **self.describe()}
        return digest_of(about, nn.Module())

    def _in_full(self) -> TowerEncoder:
        """The same tower of an encoder that was not rounded; see `Encoder._in_full`."""
        whole = self.encoder._in_full().to(self.device)
        return TowerEncoder(whole, self.modality, self.head, layer=self.layer, pooling=self.pooling)

    def describe(self) -> dict[str, Any]:
        """Modality, layer, pooling and what the head is."""
        return {
            "modality": self.modality,
            "layer": self.layer,
            "pooling": self.pooling,
            "head": self.head.settings,
        }

    def write(self, folder: Path) -> dict[str, Any]:
        """The encoder in a folder of its own, the head beside it."""
        write_weights(self.head.state_dict(), folder / "head.safetensors")
        return {**self.describe(), "encoder": write_part(self.encoder, folder / "encoder")}

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> Self:
        """Rebuild from the parts."""
        head = build_head(config["head"])
        head.load_state_dict(load_file(folder / "head.safetensors"))
        encoder = read_part(folder / "encoder", config["encoder"])
        head.eval().requires_grad_(False)
        return cls(encoder, config["modality"], head, layer=config["layer"], pooling=config["pooling"])


class AlignedEncoder(JoinedEncoder):
    """An image tower and a text tower that meet in a fitted space; made by `Alignment.encoder`.

    Attributes:
        baselines: heads of closed forms fitted on the same pairs, by name and modality, so that every later measurement
            can show them beside the fitted heads. Not in the fingerprint.
        report: what was measured when it was made; JSON-safe, `{}` if nothing was.
        fitted_on: SHA-256 of the image files that heads were fitted on or chosen by, so that a measurement on them can
            be told from an honest one; empty where that is not known.
    """

    source: ClassVar[str] = "aligned"
    image_encoder: TowerEncoder
    text_encoder: TowerEncoder

    def __init__(self, *towers: Any, **options: Any) -> None:
        """See `JoinedEncoder`."""
        super().__init__(*towers, **options)
        self.baselines: dict[str, dict[str, Head]] = {}
        self.report: dict[str, Any] = {}
        self.fitted_on: frozenset[str] = frozenset()

    def describe(self) -> dict[str, Any]:
        """Nothing: the towers say all that changes the vectors, the settings how the heads came about."""
        return {}

    def _in_full(self) -> AlignedEncoder:
        """See `Encoder._in_full`; a text tower may be rounded too, where both towers are of one encoder."""
        image, text = (
            tower._in_full() if tower.encoder._rounded else tower for tower in (self.image_encoder, self.text_encoder)
        )
        whole = AlignedEncoder(image, text, {}, dim=self.dim, settings=self.settings)
        whole.baselines, whole.report, whole.fitted_on = self.baselines, self.report, self.fitted_on
        return whole

    def heads(self) -> dict[str, dict[str, Head]]:
        """The baselines' heads by name, then the own ones under the method's name."""
        own = {"image": self.image_encoder.head, "text": self.text_encoder.head}
        return {**self.baselines, str(self.settings.get("method", "aligned")): own}

    def variant(self, name: str) -> AlignedEncoder:
        """The same towers with a baseline's heads; itself for its own method's name.

        Raises:
            InputError: no such baseline.
        """
        if name not in self.baselines:
            if name in self.heads():
                return self
            raise InputError(f"baseline is {name!r}; this encoder has {', '.join(self.baselines) or 'none'}")
        image, text = (
            TowerEncoder(tower.encoder, side, self.baselines[name][side], layer=tower.layer, pooling=tower.pooling)
            for side, tower in (("image", self.image_encoder), ("text", self.text_encoder))
        )
        return AlignedEncoder(image, text, {}, dim=image.dim, settings={"method": name})

    def note_training(self, content: Iterable[str]) -> None:
        """Forget what was measured and fitted beside the heads, as the tower below is another now."""
        self.baselines, self.report = {}, {}
        self.fitted_on |= frozenset(content)

    def write(self, folder: Path) -> dict[str, Any]:
        """As `JoinedEncoder`, with the baselines, the report and its pictures."""
        tensors = {f"{name}.{key}": value for name, heads in self.baselines.items()
                   for key, value in head_tensors(heads).items()}  # fmt: skip
        if tensors:
            write_weights(tensors, folder / "baselines.safetensors")
        if self.report:
            write_report(self.report, folder)
        if self.fitted_on:
            (folder / _FITTED_ON).write_text("".join(f"{digest}\n" for digest in sorted(self.fitted_on)))
        baselines = {
            name: {side: head.settings for side, head in heads.items()} for name, heads in self.baselines.items()
        }
        return {**super().write(folder), "baselines": baselines}

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> Self:
        """Rebuild from the parts."""
        encoder = super().read(folder, config)
        if config["baselines"]:
            tensors = load_file(folder / "baselines.safetensors")
            for name, settings in config["baselines"].items():
                own = {key.removeprefix(f"{name}."): value for key, value in tensors.items()
                       if key.startswith(f"{name}.")}  # fmt: skip
                encoder.baselines[name] = read_heads(settings, own)
        encoder.report = read_report(folder)
        with contextlib.suppress(OSError):
            encoder.fitted_on = frozenset((folder / _FITTED_ON).read_text().splitlines())
        return encoder

    def join_images(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The image tower ends in the joint space."""
        return features

    def join_texts(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The text tower ends in the joint space."""
        return features
