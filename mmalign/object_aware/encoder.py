"""An encoder whose attention follows the objects that a detector sees in each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..encoders.encoder import Encoder, unit_rows
from ..encoders.folder import read_part, write_part
from ..encoders.registry import load_encoder
from ..encoders.states import TokenStates
from ..errors import InputError
from ..fingerprint import digest_of
from ..imaging import DEFAULT_DECODING, DecodedImage, DecodeSettings
from .boxes import Detector
from .detectors import ModelDetector
from .loading import ObjectLoader, from_planes, to_planes
from .perturbing import PerturbationSettings, perturbed
from .specs import ObjectsSpec

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ObjectAwareEncoder"]


class ObjectAwareEncoder(Encoder):
    """Object-aware query perturbation (Sogi et al., ECCV 2024, arXiv 2407.12346) of an encoder's image features.

    Each image is looked at by a detector when it is loaded; what it finds comes with the pixels, as one more channel an
    object, and inside the encoder attention is drawn to it. Texts are encoded as ever, and so are images in which
    nothing is found, to the bit. The paper has BLIP-2 and, without code, CoCa; for CLIP, SigLIP and timm's models it is
    an extension, and experimental.

    Boxes of a file are input, as pixels are: they are not in the fingerprint, and an index or a cache of features does
    not notice where a file of boxes says something else of an image it knows.

    Attributes:
        encoder: what is perturbed.
        detector: finds the objects.
        settings: how strongly, and of how many objects.
    """

    source: ClassVar[str] = "object_aware"

    def __init__(
        self,
        encoder: Encoder,
        detector: Detector,
        settings: PerturbationSettings | None = None,
        *,
        objects: ObjectsSpec | None = None,
    ) -> None:
        """The encoder is not copied.

        Args:
            encoder: of images, or of images and texts.
            detector: see `load_detector`. One that needs phrases serves for re-ranking only.
            settings: see `PerturbationSettings`.
            objects: what detector and settings were loaded from, for the spec.

        Raises:
            InputError: the encoder takes no images, or has no attention to perturb (the message names the families
                that have).
        """
        encoder.require("image")
        if isinstance(encoder, ObjectAwareEncoder):
            raise InputError(f"encoder {encoder.spec!r} follows objects already; give the one inside it")
        settings = PerturbationSettings() if settings is None else settings
        self.objects = objects or ObjectsSpec.of(detector, settings)
        self.loader = ObjectLoader(encoder, detector, settings.max_objects)
        spec = f"objects:{self.objects}|{encoder.spec}"
        super().__init__(encoder.model, spec=spec, dim=encoder.dim, preprocessing=encoder.preprocessing)
        self.encoder, self.detector, self.settings = encoder, detector, settings
        self.device, self.dtype, self._rounded = encoder.device, encoder.dtype, encoder._rounded

    @classmethod
    def from_spec(cls, rest: str) -> Self:
        """Load what follows `objects:` in a spec, `DETECTOR|ENCODER`.

        Settings may follow the detector, as in `boxes.json,alpha=4,energy=0.9|open_clip:...`: those of
        `PerturbationSettings`, the detector's `threshold`, and `images`, the folder of the images in a file of boxes.

        Raises:
            InputError: another form, a part that is not understood, or a detector that needs phrases.
            EncoderUnavailableError, ModelUnavailableError: weights are neither cached nor to be fetched.
        """
        text, _, inner = rest.partition("|")
        if not text or not inner:
            raise InputError(
                f"'objects:{rest}' is not objects:DETECTOR|ENCODER; give for example "
                "'objects:torchvision:fasterrcnn_resnet50_fpn_v2|open_clip:ViT-B-32/openai'"
            )
        objects = ObjectsSpec.parse(text)
        detector = objects.load("cpu")
        if detector.needs_phrases:
            raise InputError(
                f"detector {objects.detector!r} looks for phrases, which nobody knows when images are indexed; give "
                "one of fixed classes such as torchvision:fasterrcnn_resnet50_fpn_v2, or use it with search --rerank"
            )
        return cls(load_encoder(inner, device="cpu"), detector, objects.settings, objects=objects)

    # -- images ----------------------------------------------------------------------------------------------------

    def load_image(
        self, image: Any, decode: DecodeSettings = DEFAULT_DECODING, *, phrases: Sequence[str] = ()
    ) -> tuple[DecodedImage, Float[Tensor, "channels height width"]]:
        """As `Encoder.load_image`, with one channel more for each of `max_objects` objects.

        Such a channel holds the covered fraction of each patch, all over its pixels.
        """
        decoded, pixels, weights = self.loader.load(image, decode, phrases=phrases)
        height, width = pixels.shape[-2:]
        return decoded, torch.cat([pixels, to_planes(weights, self.loader.grid, (height, width))])

    def _apart(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pixels, and token weights; `None` for pixels alone, in which no object is known."""
        if pixel_values.shape[1] == 3:
            return pixel_values, None
        return pixel_values[:, :3], from_planes(pixel_values[:, 3:].float(), self.loader.grid)

    def image_features(self, pixel_values: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """The perturbed encoder's; pixels without the channels of `load_image` are encoded as by the plain one."""
        return self._features(*self._apart(pixel_values))

    def _features(self, pixels: Tensor, weights: Tensor | None) -> Tensor:
        if weights is None:
            return self.encoder.image_features(pixels)
        with perturbed(self.encoder, weights, self.settings):
            return self.encoder.image_features(pixels)

    @torch.inference_mode()
    def encode_pixels(
        self, pixel_values: Float[Tensor, "batch channels height width"]
    ) -> Float[np.ndarray, "batch dim"]:
        """As `Encoder.encode_pixels`; half precision does not touch the weights of the tokens."""
        pixels, weights = self._apart(pixel_values)
        weights = None if weights is None else weights.to(self.device)
        return unit_rows(self._features(pixels.to(self.device, self.dtype), weights))

    def tap_images(
        self, pixel_values: Float[Tensor, "batch channels height width"], layers: Sequence[int], *, features: bool
    ) -> tuple[Float[Tensor, "batch dim"] | None, list[TokenStates]]:
        """The perturbed encoder's."""
        pixels, weights = self._apart(pixel_values)
        if weights is None:
            return self.encoder.tap_images(pixels, layers, features=features)
        with perturbed(self.encoder, weights, self.settings):
            return self.encoder.tap_images(pixels, layers, features=features)

    # -- what is the encoder's own ---------------------------------------------------------------------------------

    @property
    def modalities(self) -> frozenset[str]:
        """The encoder's."""
        return self.encoder.modalities

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """The encoder's, untouched."""
        return self.encoder.text_features(texts)

    def tap_texts(
        self, texts: Sequence[str], layers: Sequence[int], *, features: bool
    ) -> tuple[Float[Tensor, "batch dim"] | None, list[TokenStates]]:
        """The encoder's."""
        return self.encoder.tap_texts(texts, layers, features=features)

    def layer_count(self, modality: str) -> int:
        """The encoder's."""
        return self.encoder.layer_count(modality)

    def has_class_token(self, modality: str) -> bool:
        """The encoder's."""
        return self.encoder.has_class_token(modality)

    @property
    def image_module(self) -> nn.Module | None:
        """The encoder's."""
        return self.encoder.image_module

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Self:
        """As `Encoder.to`, the detector included, in float32."""
        _ = self.fingerprint  # before any cast
        self.encoder.to(device, dtype)
        if isinstance(self.detector, ModelDetector):
            self.detector.to(device)
        self.device, self.dtype = self.encoder.device, self.encoder.dtype
        self._rounded = self.encoder._rounded
        return self

    # -- identity and saving ---------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """As `Encoder.fingerprint`: that of the encoder as before any cast, the detector's digest, and the settings."""
        if self._fingerprint is None:
            self._fingerprint = self._digest(self.encoder.fingerprint)
        return self._fingerprint

    def digest(self) -> str:
        """`fingerprint` taken anew, from the weights as they are now."""
        return self._digest(self.encoder.digest())

    def _digest(self, inner: str) -> str:
        return digest_of({"source": self.source, "encoder": inner, **self.describe()}, nn.Module())

    def describe(self) -> dict[str, Any]:
        """Detector and settings; the encoder is in the fingerprint by its own."""
        numbers = {name: float(getattr(self.settings, name)) for name in ("alpha", "energy")}  # 8 is 8.0
        return {"detector": self.detector.digest, "settings": asdict(self.settings) | numbers}

    def write(self, folder: Path) -> dict[str, Any]:
        """The encoder in a folder of its own; the detector by its spec, as its weights are not copied."""
        return {
            "encoder": write_part(self.encoder, folder / "encoder"),
            "objects": str(self.objects),
            "detector": self.detector.digest,
        }

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> Self:
        """Rebuild from the parts.

        Raises:
            InputError: the detector is another one than it was.
        """
        objects = ObjectsSpec.parse(config["objects"])
        detector = objects.load("cpu")
        if detector.digest != config["detector"]:
            raise InputError(
                f"detector {objects.detector!r} is another one than when the encoder in {str(folder)!r} was saved: its "
                "weights or settings differ; get the old one back, or save the encoder again"
            )
        return cls(read_part(folder / "encoder", config["encoder"]), detector, objects.settings, objects=objects)
