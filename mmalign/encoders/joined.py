"""Two encoders made one: images through the first, texts through the second, and what brings them together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..fingerprint import digest_of, tensor_digest
from .encoder import Encoder
from .folder import read_part, write_part, write_weights
from .states import TokenStates

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["JoinedEncoder"]


class JoinedEncoder(Encoder):
    """An image encoder and a text encoder, joined by fitted weights into one space.

    A subclass names its `source` and implements `join_images` and `join_texts`; it is saved with both parts inside, and
    its weights and settings are in the fingerprint.

    Attributes:
        image_encoder: its raw `image_features` go into `join_images`.
        text_encoder: its raw `text_features` go into `join_texts`.
        weights: fitted tensors, float32, on the device.
        settings: numbers and names beside the weights, JSON-safe.
    """

    def __init__(
        self,
        image_encoder: Encoder,
        text_encoder: Encoder,
        weights: Mapping[str, Tensor],
        *,
        dim: int,
        settings: Mapping[str, Any] | None = None,
        spec: str = "",
    ) -> None:
        """Both encoders are moved to the first one's device; they are not copied.

        Args:
            image_encoder: encodes images.
            text_encoder: encodes texts.
            weights: fitted tensors by name; kept in float32.
            dim: width of the joined space.
            settings: see the class.
            spec: for messages and index manifests; the folder, once it is saved and loaded.

        Raises:
            InputError: an encoder lacks its tower.
        """
        image_encoder.require("image")
        text_encoder.require("text")
        model = nn.ModuleDict({"image": image_encoder.model, "text": text_encoder.model})
        super().__init__(model, spec=spec or self.source, dim=dim, preprocessing=image_encoder.preprocessing)
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.settings = dict(settings or {})
        self.weights = {name: value.detach().float() for name, value in weights.items()}
        self.to(image_encoder.device, image_encoder.dtype)

    @abstractmethod
    def join_images(self, features: Float[Tensor, "batch image_dim"]) -> Float[Tensor, "batch dim"]:
        """Image features, float32, into the joined space."""

    @abstractmethod
    def join_texts(self, features: Float[Tensor, "batch text_dim"]) -> Float[Tensor, "batch dim"]:
        """Text features, float32, into the joined space."""

    def image_features(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """The image encoder's features, joined."""
        return self.join_images(self.image_encoder.image_features(pixel_values).float())

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """The text encoder's features, joined."""
        return self.join_texts(self.text_encoder.text_features(texts).float())

    def layer_count(self, modality: str) -> int:
        """That of the part that encodes `modality`, whose states are had unjoined."""
        return self._part(modality).layer_count(modality)

    def has_class_token(self, modality: str) -> bool:
        """Whether the part has one."""
        return self._part(modality).has_class_token(modality)

    def tap_images(
        self, pixel_values: Float[Tensor, "batch 3 height width"], layers: Sequence[int], *, features: bool
    ) -> tuple[Float[Tensor, "batch dim"] | None, list[TokenStates]]:
        """The image encoder's states; its features, joined."""
        found, states = self.image_encoder.tap_images(pixel_values, layers, features=features)
        return None if found is None else self.join_images(found.float()), states

    def tap_texts(
        self, texts: Sequence[str], layers: Sequence[int], *, features: bool
    ) -> tuple[Float[Tensor, "batch dim"] | None, list[TokenStates]]:
        """The text encoder's states; its features, joined."""
        found, states = self.text_encoder.tap_texts(texts, layers, features=features)
        return None if found is None else self.join_texts(found.float()), states

    def _part(self, modality: str) -> Encoder:
        return self.image_encoder if modality == "image" else self.text_encoder

    @property
    def image_module(self) -> nn.Module | None:
        """The image encoder's; fitted weights stay in float32."""
        return self.image_encoder.image_module

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Self:
        """As `Encoder.to`, both parts included."""
        _ = self.fingerprint  # before any cast
        self.text_encoder.to(device)
        self.image_encoder.to(device, dtype)
        self.device, self.dtype = self.image_encoder.device, self.image_encoder.dtype
        self.weights = {name: value.to(self.device) for name, value in self.weights.items()}
        self._rounded = self.image_encoder._rounded
        return self

    @property
    def fingerprint(self) -> str:
        """As `Encoder.fingerprint`; the parts answer for themselves, as what they were before any cast."""
        if self._fingerprint is None:
            self._fingerprint = self._digest(self.image_encoder.fingerprint, self.text_encoder.fingerprint)
        return self._fingerprint

    def digest(self) -> str:
        """`fingerprint` taken anew, from the weights as they are now."""
        return self._digest(self.image_encoder.digest(), self.text_encoder.digest())

    def _digest(self, image: str, text: str) -> str:
        weights = {name: tensor_digest(value) for name, value in self.weights.items()}
        about = {"source": self.source, "image": image, "text": text, "weights": weights, **self.describe()}
        return digest_of(about, nn.Module())

    def describe(self) -> dict[str, Any]:
        """The settings; the parts are in the fingerprint by their own."""
        return {"settings": self.settings}

    def write(self, folder: Path) -> dict[str, Any]:
        """Both parts in folders of their own, the fitted weights beside them."""
        write_weights(self.weights, folder / "joined.safetensors")
        return {
            "dim": self.dim,
            "settings": self.settings,
            "image": write_part(self.image_encoder, folder / "image"),
            "text": write_part(self.text_encoder, folder / "text"),
        }

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> Self:
        """Rebuild from the parts."""
        from safetensors.torch import load_file

        return cls(
            read_part(folder / "image", config["image"]),
            read_part(folder / "text", config["text"]),
            load_file(folder / "joined.safetensors"),
            dim=config["dim"],
            settings=config["settings"],
        )
