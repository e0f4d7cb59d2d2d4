"""`Encoder`: images and texts in, unit rows of one space out. Every method of the library makes or takes one."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from ..device import fastest_cpu_dtype, resolve_device, resolve_dtype
from ..errors import InputError
from ..fingerprint import weights_digest
from ..imaging import ImagePreprocessing, read_image
from ..progress import progress_bar
from .hub import quiet_libraries
from .stream import checked_batch_size, encode_stream

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FORMAT_VERSION", "Encoder", "read_encoder_json"]

FORMAT_VERSION = 1


class Encoder(ABC):
    """Maps images and texts to unit vectors of one space.

    A subclass stands for one source of weights (or one way to combine encoders). It sets the attributes below and
    implements `image_features` and/or `text_features`; batching, decoding, device, dtype, progress, normalisation and
    the fingerprint are done here.

    Attributes:
        source: name under which `load_encoder` finds the class.
        spec: what `load_encoder` was given.
        dim: width of the space.
        preprocessing: what an image goes through before the image tower; `None` for a text-only encoder.
        model: all weights; state dict and fingerprint are taken from it.
    """

    source: ClassVar[str]
    spec: str
    dim: int
    preprocessing: ImagePreprocessing | None
    model: Any  # an nn.Module, with the attributes of its source
    default_batch_size: ClassVar[int] = 32

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self._fingerprint: str | None = None
        self._rounded = False

    # -- what a source provides ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def modalities(self) -> frozenset[str]:
        """Which of "image" and "text" it encodes."""

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

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that changes the vectors besides weights and image preprocessing, JSON-safe and free of paths."""

    @abstractmethod
    def write(self, folder: Path) -> dict[str, Any]:
        """Write weights (safetensors) and side files into `folder`; return what `read` needs to know."""

    @classmethod
    @abstractmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> Self:
        """Rebuild from what `write` left."""

    # -- what everybody calls --------------------------------------------------------------------------------------

    def encode_images(
        self,
        images: Iterable[Any],
        *,
        batch_size: int | None = None,
        progress: bool = False,
        workers: int | None = None,
    ) -> Float[np.ndarray, "n dim"]:
        """Unit rows for images.

        Args:
            images: paths, bytes, Pillow images, arrays `height width 3` or tensors `3 height width`
                (uint8, or float in [0, 1]); what `mmalign.imaging.read_image` takes. One image alone is a list of one.
            batch_size: images a forward pass; 32 by default.
            progress: show a bar.
            workers: decoding threads; one a core by default.

        Returns:
            float32, one row an image, each of norm 1.

        Raises:
            InputError: this encoder takes no images, or `batch_size` is below 1.
            UnreadableImageError: an image cannot be read; `retrieval.ImageIndex` skips such files instead.
        """
        self.require("image")
        preprocessing = self.preprocessing
        assert preprocessing is not None
        images = [images] if _is_one_image(images) else list(images)

        def load(image: Any) -> tuple[None, Tensor]:
            return None, preprocessing(read_image(image).pixels)

        rows = []
        with progress_bar("encoding images", len(images), enabled=progress) as advance:
            for batch in encode_stream(self, images, load, batch_size=batch_size, workers=workers):
                failure = next((outcome.error for outcome in batch.outcomes if outcome.error), None)
                if failure is not None:
                    raise failure
                rows.append(batch.vectors)
                advance(len(batch.vectors))
        return np.concatenate(rows) if rows else np.zeros((0, self.dim), np.float32)

    @torch.inference_mode()
    def encode_texts(
        self, texts: Iterable[str] | str, *, batch_size: int | None = None, progress: bool = False
    ) -> Float[np.ndarray, "n dim"]:
        """Unit rows for texts; float32.

        Raises:
            InputError: this encoder takes no texts, an item is not a string or is empty, or `batch_size` is below 1.
        """
        self.require("text")
        texts = [texts] if isinstance(texts, str) else list(texts)
        for position, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"text {position} is {text!r}; give a string with at least one visible character")
        size = checked_batch_size(batch_size, self.default_batch_size)
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

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype = "float32") -> Self:
        """Move to a device and set the dtype of the image tower, in place.

        Args:
            device: "cpu", "cuda", "cuda:1", "mps"; `None` takes the fastest kind present.
            dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 on CUDA, and on a CPU where a timed forward
                pass with it is faster; float32 otherwise.
        """
        _ = self.fingerprint  # taken from the weights as loaded, before any cast
        self.device = resolve_device(device)
        self.model.to(self.device)
        module = self.image_module
        if dtype == "auto":
            if self.device.type == "cuda":
                dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
            elif self.device.type == "cpu" and module is not None and self.preprocessing is not None:
                dtype = self._fastest_dtype(module)
            else:
                dtype = torch.float32
        self.dtype = resolve_dtype(dtype)
        if module is not None:
            module.to(self.dtype)
            self._rounded = self._rounded or self.dtype != torch.float32
        return self

    def _fastest_dtype(self, module: nn.Module) -> torch.dtype:
        if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return torch.float32
        assert self.preprocessing is not None
        return fastest_cpu_dtype(module, self.image_features, torch.zeros(4, 3, *self.preprocessing.size))

    @property
    def fingerprint(self) -> str:
        """Hex digest of weights, preprocessing and normalisation: equal exactly when vectors are comparable.

        It does not depend on names, paths, device or dtype.
        """
        if self._fingerprint is None:
            self._fingerprint = self._digest()
        return self._fingerprint

    def _digest(self) -> str:
        preprocessing = self.preprocessing.to_dict() if self.preprocessing else None
        about = {"source": self.source, "preprocessing": preprocessing, "normalise": "l2", **self.describe()}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        digest.update(weights_digest(self.model).encode())
        return digest.hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write to a folder that `load_encoder(folder)` reads: json and safetensors, no pickle.

        The folder appears whole or not at all. An existing encoder folder is replaced. The fingerprint is taken anew:
        weights trained since loading are saved as what they are now.

        Raises:
            InputError: `folder` exists and is not an encoder folder, or `to` has rounded the weights.
        """
        target = Path(folder)
        if target.exists() and not (target / "encoder.json").is_file():
            raise InputError(f"{str(target)!r} exists and is not an encoder folder; choose another path")
        fingerprint = self._digest()
        if self._rounded and fingerprint != self.fingerprint:
            raise InputError(
                f"the weights of {self.spec!r} were rounded to half precision; load it with dtype='float32' to save it"
            )
        self._fingerprint = fingerprint
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
            fresh = Path(temporary) / "fresh"
            fresh.mkdir()
            with quiet_libraries():
                config = self.write(fresh)
            for path in fresh.rglob("*.safetensors"):
                path.chmod(0o644)  # safetensors writes for the owner alone
            about = {
                "format": FORMAT_VERSION,
                "source": self.source,
                "spec": self.spec,
                "dim": self.dim,
                "fingerprint": fingerprint,
                "preprocessing": self.preprocessing.to_dict() if self.preprocessing else None,
                "config": config,
            }
            (fresh / "encoder.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
            previous = Path(temporary) / "previous"
            if target.exists():
                target.rename(previous)
            try:
                fresh.rename(target)
            except OSError:
                if previous.exists():
                    previous.rename(target)
                raise
        return target

    def require(self, modality: str) -> None:
        """Raise InputError unless this encoder has a tower for "image" or "text"."""
        if modality not in self.modalities:
            able = " and ".join(sorted(self.modalities))
            raise InputError(f"encoder {self.spec!r} encodes {able} only; it has no {modality} tower")

    def __repr__(self) -> str:
        able = "+".join(sorted(self.modalities))
        return f"{type(self).__name__}({self.spec!r}, dim={self.dim}, {able}, {self.dtype}, {self.device})"


def _is_one_image(images: Any) -> bool:
    return isinstance(images, (str, bytes, os.PathLike, Image.Image)) or (
        isinstance(images, (np.ndarray, Tensor)) and images.ndim in (2, 3)
    )


def unit_rows(features: Float[Tensor, "n dim"]) -> Float[np.ndarray, "n dim"]:
    """L2-normalise in float32 and hand over to numpy."""
    return nn.functional.normalize(features.float(), dim=-1).cpu().numpy()


def read_encoder_json(folder: Path) -> dict[str, Any]:
    """`encoder.json` of a saved folder.

    Raises:
        InputError: it is missing, unreadable, or of a newer format.
    """
    path = folder / "encoder.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        newer = about["format"] > FORMAT_VERSION
    except FileNotFoundError:
        raise InputError(f"{str(folder)!r} holds no encoder.json; give a folder made by Encoder.save") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(path)!r} is not a readable encoder description ({error}); save it again") from None
    if newer:
        raise InputError(
            f"{str(path)!r} has format {about['format']}, this mmalign reads up to {FORMAT_VERSION}; "
            "upgrade with `pip install -U mmalign`"
        )
    return about
