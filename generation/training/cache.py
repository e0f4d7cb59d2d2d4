"""Tensors on disk under the hash of everything that made them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from mmalign.errors import InputError, reason_of
from mmalign.files import whole_file

__all__ = ["TensorStore", "content_key"]


def content_key(**parts: object) -> str:
    """SHA-256 over named values: what is not named here must not change the tensor."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class TensorStore:
    """One safetensors file per key, in 256 folders; a file is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, key: str) -> bool:
        """Whether the file is there and as long as its header says: a power cut can leave it short."""
        try:
            with safe_open(self._path(key), framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def read(self, key: str) -> dict[str, Tensor]:
        """Raises InputError when the file is gone or damaged."""
        try:
            tensors = load_file(self._path(key))
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
                raise SafetensorError("a value is not finite, which was never written")
            return tensors
        except (OSError, SafetensorError) as error:
            self._path(key).unlink(missing_ok=True)
            raise InputError(
                f"cache file {str(self._path(key))!r} could not be read ({reason_of(error)}); "
                "run the same command again, it is then made anew"
            ) from None

    def write(self, key: str, tensors: dict[str, Tensor], dtype: torch.dtype, name: str) -> dict[str, Tensor]:
        """Store as `dtype` and return what a later `read` will.

        Raises:
            InputError: a value is not finite in `dtype` (`name` says whose), or the disk is full.
        """
        rounded = self.rounded(tensors, dtype, name)
        remedy = f"make room for the cache {str(self.folder)!r}, or set cache_dir; what is cached so far is kept"
        with whole_file(self._path(key), remedy=remedy) as fresh:
            # Not `save_file`: it makes files that only their owner can read, and a cache may be shared.
            fresh.write_bytes(save(rounded))
        return rounded

    @staticmethod
    def rounded(tensors: dict[str, Tensor], dtype: torch.dtype, name: str) -> dict[str, Tensor]:
        """The tensors as `dtype`; raises InputError naming `name` where one is not finite."""
        rounded = {key: value.to(dtype).contiguous() for key, value in tensors.items()}
        for key, value in rounded.items():
            if not torch.isfinite(value).all():
                raise InputError(
                    f"{name}: {key} is not finite in {str(dtype).removeprefix('torch.')}; a float16 VAE overflows "
                    "(give `vae`, or dtype bfloat16), and cache_dtype float32 holds larger values"
                )
        return rounded

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"
