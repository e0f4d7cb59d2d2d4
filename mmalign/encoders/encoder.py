"""`Encoder`: images and texts in, unit rows of one space out. Every method of the library makes or takes one."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from ..checks import at_least, visible_text
from ..device import fastest_cpu_dtype, resolve_device, resolve_dtype
from ..errors import InputError, MMAlignError
from ..fingerprint import digest_of
from ..imaging import DEFAULT_DECODING, DecodedImage, DecodeSettings, ImagePreprocessing
from ..progress import progress_bar
from .folder import save_folder
from .states import Layer, TokenStates, check_layer
from .stream import encode_stream

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Encoder"]


# `Encoder.source` as it stands in encoder.json -> class, for every class that has been defined.
encoder_classes: dict[str, type[Encoder]] = {}


class Encoder(ABC):
    """Maps images and texts to unit vectors of one space.

    A subclass stands for one source of weights (or, as a `JoinedEncoder`, for a way to join two encoders). It names its
    `source` and implements `image_features` and/or `text_features`, `describe`, `write` and `read`; batching, decoding,
    device, dtype, progress, normalisation, the fingerprint and the saved folder are done here.

    Attributes:
        source: name under which `load_encoder` finds the class of a saved folder.
        model: all weights; state dict and fingerprint are taken from it.
        spec: what `load_encoder` was given.
        dim: width of the space.
        preprocessing: what an image goes through before the image tower; `None` for a text-only encoder.
    """

    source: ClassVar[str]
    default_batch_size: ClassVar[int] = 32

    def __init__(self, model: Any, *, spec: str, dim: int, preprocessing: ImagePreprocessing | None = None) -> None:
        """Takes a `torch.nn.Module` in float32 on the CPU, and puts it into evaluation mode."""
        self.model = model.eval()
        self.spec = spec
        self.dim = dim
        self.preprocessing = preprocessing
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self._fingerprint: str | None = None
        self._rounded: torch.dtype | None = None  # what the weights of the image tower went through

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "source" in vars(cls):
            encoder_classes[cls.source] = cls

    # -- what a source provides ------------------------------------------------------------------------------------

    def image_features(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Raw image features, differentiable, not normalised; input as `preprocessing` leaves it."""
        raise NotImplementedError

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """Raw text features, differentiable with respect to the weights, not normalised."""
        raise NotImplementedError

    @property
    def image_module(self) -> nn.Module | None:
        """The part of `model` whose weights take the image dtype."""
        return None

    def layer_count(self, modality: str) -> int:
        """Layers of the "image" or "text" tower whose states can be had, see `states`; 0 where they cannot."""
        return 0

    def has_class_token(self, modality: str) -> bool:
        """Whether the states of a tower have a class token."""
        return False

    def tap_images(
        self, pixel_values: Float[Tensor, "batch 3 height width"], layers: Sequence[int], *, features: bool
    ) -> tuple[Float[Tensor, "batch dim"] | None, list[TokenStates]]:
        """One forward pass: `image_features` if `features` asks for them, and the states of layers in rising order."""
        raise NotImplementedError

    def tap_texts(
        self, texts: Sequence[str], layers: Sequence[int], *, features: bool
    ) -> tuple[Float[Tensor, "batch dim"] | None, list[TokenStates]]:
        """As `tap_images`, for texts."""
        raise NotImplementedError

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that changes the vectors besides weights and image preprocessing, JSON-safe and free of paths."""

    @abstractmethod
    def write(self, folder: Path) -> dict[str, Any]:
        """Write weights (see `folder.write_weights`) and side files; return, JSON-safe, what `read` needs to know."""

    @classmethod
    @abstractmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> Self:
        """Rebuild from what `write` left and returned; `preprocessing` is restored by the caller."""

    # -- what everybody calls --------------------------------------------------------------------------------------

    @property
    def modalities(self) -> frozenset[str]:
        """Which of "image" and "text" it encodes: those whose features the class implements."""
        towers = {"image": "image_features", "text": "text_features"}
        own, none = type(self), Encoder
        return frozenset(name for name, method in towers.items() if getattr(own, method) is not getattr(none, method))

    def encode_images(
        self,
        images: Iterable[Any],
        *,
        decode: DecodeSettings = DEFAULT_DECODING,
        batch_size: int | None = None,
        workers: int | None = None,
        progress: bool = False,
    ) -> Float[np.ndarray, "n dim"]:
        """Unit rows for images.

        Args:
            images: paths, bytes, Pillow images, arrays `height width 3` or tensors `3 height width`
                (uint8, or float in [0, 1]); what `mmalign.imaging.read_image` takes. One image alone is a list of one.
            decode: how files become pixels; give an index's own for what is to be compared with it.
            batch_size: images a forward pass; 32 by default.
            workers: decoding threads; one a core by default.
            progress: show a bar.

        Returns:
            float32, one row an image, each of norm 1.

        Raises:
            InputError: this encoder takes no images, or `batch_size` or `workers` is below 1.
            UnreadableImageError: an image cannot be read; `retrieval.ImageIndex` skips such files instead.
        """
        self.require("image")
        images = [images] if _is_one_image(images) else list(images)

        def load(image: Any) -> tuple[None, Tensor]:
            return None, self.load_image(image, decode)[1]

        rows = []
        with progress_bar("encoding images", len(images), enabled=progress) as advance:
            for batch in encode_stream(self, images, load, batch_size=batch_size, workers=workers):
                failure = next((outcome.error for outcome in batch.outcomes if outcome.error), None)
                if failure is not None:
                    raise failure
                rows.append(batch.vectors)
                advance(len(batch.vectors))
        return np.concatenate(rows) if rows else np.zeros((0, self.dim), np.float32)

    def load_image(
        self, image: Any, decode: DecodeSettings = DEFAULT_DECODING
    ) -> tuple[DecodedImage, Float[Tensor, "3 height width"]]:
        """An image as it was read, and as `image_features` takes it; safe to call from many threads.

        Raises:
            UnreadableImageError: it cannot be read.
        """
        assert self.preprocessing is not None
        decoded = decode.read(image, self.preprocessing.size)
        return decoded, self.preprocessing(decoded.pixels)

    @torch.inference_mode()
    def encode_texts(
        self, texts: Iterable[str] | str, *, batch_size: int | None = None, progress: bool = False
    ) -> Float[np.ndarray, "n dim"]:
        """Unit rows for texts; float32.

        Raises:
            InputError: this encoder takes no texts, an item is not a string, is blank or not valid Unicode, or
                `batch_size` is below 1.
        """
        self.require("text")
        texts = [texts] if isinstance(texts, str) else list(texts)
        for position, text in enumerate(texts):
            visible_text(f"text {position}", text)
        at_least("batch_size", batch_size)
        size = batch_size or self.default_batch_size
        rows = []
        with progress_bar("encoding texts", len(texts), unit="texts", enabled=progress) as advance:
            for start in range(0, len(texts), size):
                rows.append(unit_rows(self.text_features(texts[start : start + size])))
                advance(len(rows[-1]))
        return np.concatenate(rows) if rows else np.zeros((0, self.dim), np.float32)

    @torch.inference_mode()
    def encode_pixels(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[np.ndarray, "batch dim"]:
        """Unit rows for preprocessed pixels; one forward pass."""
        return unit_rows(self.image_features(pixel_values.to(self.device, self.dtype)))

    def image_states(
        self, pixel_values: Float[Tensor, "batch 3 height width"], layers: Sequence[Layer]
    ) -> list[TokenStates]:
        """Token states of layers of the image tower, in the order asked, by one forward pass; differentiable.

        Args:
            pixel_values: as `image_features` takes them.
            layers: from 0 to `layer_count("image") - 1`, negative from the last; "output" for `image_features`, as one
                token. See `mmalign.encoders.states` for what the numbers mean.

        Raises:
            InputError: there is no such layer.
        """
        numbers = [check_layer(self, "image", layer) for layer in layers]
        wanted = sorted({number for number in numbers if number != "output"})
        if not wanted:
            return [TokenStates.of_features(self.image_features(pixel_values))] * len(numbers)
        return _in_order(numbers, wanted, *self.tap_images(pixel_values, wanted, features="output" in numbers))

    def text_states(self, texts: Sequence[str], layers: Sequence[Layer]) -> list[TokenStates]:
        """As `image_states`, for texts; layer 0 is the embeddings.

        Raises:
            InputError: there is no such layer.
        """
        numbers = [check_layer(self, "text", layer) for layer in layers]
        wanted = sorted({number for number in numbers if number != "output"})
        if not wanted:
            return [TokenStates.of_features(self.text_features(texts))] * len(numbers)
        return _in_order(numbers, wanted, *self.tap_texts(texts, wanted, features="output" in numbers))

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Self:
        """Move to a device and set the dtype of the image tower, in place.

        Args:
            device: "cpu", "cuda", "cuda:1", "mps"; `None` takes the fastest kind present.
            dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 on CUDA, and on a CPU where a timed forward
                pass with it is faster; float32 otherwise. `None` leaves it as it is.
        """
        _ = self.fingerprint  # taken from the weights as loaded, before any cast
        self.device = resolve_device(device)
        self.model.to(self.device)
        module = self.image_module
        if dtype is not None and module is not None:
            measured = dtype == "auto" and self.device.type == "cpu" and self.preprocessing is not None
            self.dtype = self._fastest_dtype(module) if measured else resolve_dtype(dtype, self.device)
            module.to(self.dtype)
            if self.dtype != torch.float32:
                self._rounded = self.dtype
        return self

    def _fastest_dtype(self, module: nn.Module) -> torch.dtype:
        if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return torch.float32
        assert self.preprocessing is not None
        return fastest_cpu_dtype(module, self.image_features, torch.zeros(4, 3, *self.preprocessing.size))

    @property
    def fingerprint(self) -> str:
        """Hex digest of weights, preprocessing and normalisation: another one wherever vectors cannot be compared.

        It does not depend on names, paths, device or dtype. Single numbers among the weights count only as far as
        `describe` gives them, and two tensors of one shape that change places are not noticed (see
        `mmalign.fingerprint`); a `JoinedEncoder` knows its tensors by name.
        """
        if self._fingerprint is None:
            self._fingerprint = self.digest()
        return self._fingerprint

    def digest(self) -> str:
        """`fingerprint` taken anew, from the weights as they are now."""
        preprocessing = self.preprocessing.to_dict() if self.preprocessing else None
        about = {"source": self.source, "preprocessing": preprocessing, "normalise": "l2", **self.describe()}
        return digest_of(about, self.model)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write to a folder that `load_encoder(folder)` reads: json and safetensors, no pickle.

        The folder appears whole or not at all. An existing encoder folder is replaced. The fingerprint is taken anew:
        weights trained since loading are saved as what they are now.

        Raises:
            InputError: `folder` exists and is not an encoder folder, or `to` has rounded the weights.
        """
        fingerprint = self.digest()
        if self._rounded and fingerprint != self.fingerprint:
            return self._in_full().save(folder)
        self._fingerprint = fingerprint
        return save_folder(self, Path(folder))

    def _in_full(self) -> Encoder:
        """The same encoder, loaded again, where `to` has rounded the weights and nothing else has changed them."""
        from .registry import load_encoder

        with contextlib.suppress(MMAlignError):
            whole = load_encoder(self.spec, device="cpu")
            fingerprint = whole.fingerprint
            if fingerprint == self.fingerprint and whole.to("cpu", self._rounded).digest() == self.digest():
                return load_encoder(self.spec, device="cpu")
        raise InputError(
            f"the weights of {self.spec!r} were rounded to half precision, and cannot be had in full any more; make it "
            "with dtype='float32' to save it"
        )

    def note_training(self, content: Iterable[str]) -> None:  # noqa: B027
        """Know that the image tower has been trained further, on files of these SHA-256."""

    def require(self, modality: str) -> None:
        """Raise InputError unless this encoder has a tower for "image" or "text"."""
        if modality not in self.modalities:
            able = " and ".join(sorted(self.modalities))
            raise InputError(f"encoder {self.spec!r} encodes {able} only; it has no {modality} tower")

    def __repr__(self) -> str:
        able = "+".join(sorted(self.modalities))
        return f"{type(self).__name__}({self.spec!r}, dim={self.dim}, {able}, {self.dtype}, {self.device})"


def _in_order(
    layers: Sequence[Layer], tapped: Sequence[int], features: Tensor | None, states: Sequence[TokenStates]
) -> list[TokenStates]:
    found: dict[Layer, TokenStates] = dict(zip(tapped, states, strict=True))
    if features is not None:
        found["output"] = TokenStates.of_features(features)
    return [found[layer] for layer in layers]


def _is_one_image(images: Any) -> bool:
    return isinstance(images, (str, bytes, os.PathLike, Image.Image)) or (
        isinstance(images, (np.ndarray, Tensor)) and images.ndim in (2, 3)
    )


def unit_rows(features: Float[Tensor, "n dim"]) -> Float[np.ndarray, "n dim"]:
    """L2-normalise in float32 and hand over to numpy."""
    return nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
