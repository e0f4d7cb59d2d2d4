"""The encoders of an open index: one that was given, and those that its manifest records, loaded when first needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from mmalign.encoders import Encoder

from .recorded_encoder import check_encoder, given_encoder, load_recorded, recorded_dtype
from .storage import Manifest

__all__ = ["IndexEncoders"]


class IndexEncoders:
    """By fingerprint; an index that is upgraded has two.

    Attributes:
        given: what the caller named instead of the recorded spec, if anything.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        encoder: str | os.PathLike[str] | Encoder | None,
        device: str | torch.device | None,
        dtype: str | torch.dtype,
    ) -> None:
        """As `ImageIndex.open`; raises what that says."""
        self.folder, self.given = (
            folder,
            None if encoder is None else _checked(folder, manifest, encoder, device, dtype),
        )
        self._device = device
        self._loaded: dict[str | None, Encoder] = {}
        self._specs: dict[str | None, str] = {}  # which other writers may change to ones of other boxes
        about = manifest["encoder"]
        recorded_dtype(about, dtype, folder)
        if self.given is not None:
            self._loaded[self.given.fingerprint if about["spec"] is not None else None] = self.given

    def loaded(self, about: dict[str, Any]) -> Encoder | None:
        """What an entry of the manifest stands for, if it was given or needed before."""
        return self._loaded.get(about["fingerprint"])

    def of(self, about: dict[str, Any], manifest: Manifest) -> Encoder:
        """What an entry of the manifest, as it is now, stands for.

        Raises:
            EncoderMismatchError: the recorded spec gives other vectors today.
        """
        fingerprint = about["fingerprint"]
        encoder = self._loaded.get(fingerprint)
        if encoder is None or self._specs.get(fingerprint, about["spec"]) != about["spec"]:
            if self.given is not None and not (manifest.get("upgrade") or manifest.get("upgraded")):
                check_encoder(about, self.given, self.folder)  # it is another index by now, and was never upgraded
            encoder = load_recorded(about, self._device)
            self._loaded[fingerprint], self._specs[fingerprint] = encoder, about["spec"]
        check_encoder(about, encoder, self.folder)
        return encoder


def _checked(
    folder: Path,
    manifest: Manifest,
    encoder: str | os.PathLike[str] | Encoder,
    device: str | torch.device | None,
    dtype: str | torch.dtype,
) -> Encoder | None:
    """A given encoder, which must be the index's own or the one that is replacing it; `None` for a recorded spec."""
    about = manifest["encoder"]
    new = manifest["upgrade"]["encoder"] if manifest.get("upgrade") else None
    recorded = recorded_dtype(about, dtype, folder)
    if not isinstance(encoder, Encoder):
        if os.fspath(encoder) in (about["spec"], new and new["spec"]):
            return None  # as if nothing were given: loaded when needed
        dtype = recorded
    found = given_encoder(encoder, device, dtype)
    if not (new and found.fingerprint == new["fingerprint"]):
        check_encoder(about, found, folder)
    return found
