"""The encoder's entry in the manifest: written, compared, and turned into an encoder again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from mmalign.device import resolve_dtype
from mmalign.encoders import Encoder, load_encoder
from mmalign.errors import EncoderMismatchError, InputError

__all__ = [
    "check_boxes",
    "check_encoder",
    "check_same_encoder",
    "describe_encoder",
    "describe_vectors",
    "given_encoder",
    "load_recorded",
    "recorded_dtype",
    "with_objects_of",
]

_OBJECTS = "objects:"


def describe_encoder(encoder: Encoder) -> dict[str, Any]:
    """An encoder as it stands in the manifest."""
    return {
        "spec": encoder.spec,
        "fingerprint": encoder.fingerprint,
        "dim": encoder.dim,
        "dtype": _name_of(encoder.dtype),
        "modalities": sorted(encoder.modalities),
        "preprocessing": encoder.preprocessing.to_dict() if encoder.preprocessing else None,
    }


def describe_vectors(dim: int) -> dict[str, Any]:
    """The same keys for vectors of which nobody said what made them."""
    unknown = dict.fromkeys(("spec", "fingerprint", "dtype", "preprocessing"))
    return {**unknown, "dim": dim, "modalities": []}


def given_encoder(
    encoder: str | os.PathLike[str] | Encoder, device: str | torch.device | None, dtype: str | torch.dtype
) -> Encoder:
    """What a caller named, loaded if it is not an encoder yet.

    Raises:
        InputError: `device` or `dtype` beside an encoder that is loaded already; or its spec names a file of boxes
            that is not there.
    """
    if not isinstance(encoder, Encoder):
        check_boxes(encoder)
        return load_encoder(encoder, device=device, dtype=dtype)
    if device is not None or dtype != "auto":
        raise InputError(
            f"encoder {encoder.spec!r} is loaded already, so device and dtype would do nothing; leave them out and "
            "call encoder.to(device, dtype), or give the spec instead of the encoder"
        )
    return encoder


def check_boxes(encoder: str | os.PathLike[str] | Encoder | None) -> None:
    """Whether the file of boxes that a spec names is there, which its encoder asks when it sees the first image.

    Raises:
        InputError: it is not.
    """
    spec = os.fspath(encoder) if isinstance(encoder, (str, os.PathLike)) else ""
    objects, _, inner = spec.removeprefix(_OBJECTS).partition("|")
    if spec.startswith(_OBJECTS) and objects and inner:
        from mmalign.object_aware.specs import ObjectsSpec

        ObjectsSpec.parse(objects).require_file()


def with_objects_of(about: dict[str, Any], encoder: Encoder) -> dict[str, Any] | None:
    """An entry with the spec of an encoder in place of its own; `None` where there is no reason to.

    There is one where they differ in a file of boxes alone: it is no part of a fingerprint, and the one that was given
    last names the images that were added last.

    Raises:
        InputError: that file cannot be read.
    """
    if not encoder.spec.startswith(_OBJECTS) or encoder.spec == about["spec"]:
        return None
    if encoder.fingerprint != about["fingerprint"]:
        return None
    from mmalign.object_aware.boxes import BoxesFile

    detector = getattr(encoder, "detector", None)
    if isinstance(detector, BoxesFile):
        len(detector)  # which reads it
    return {**about, "spec": encoder.spec}


def load_recorded(about: dict[str, Any], device: str | torch.device | None) -> Encoder:
    """The encoder that an index was made with.

    Raises:
        InputError: none is recorded, or the folder it was in is gone.
    """
    spec = about["spec"]
    if spec is None:
        raise InputError(
            "this index was made from vectors alone; open it with the encoder that made them, "
            "ImageIndex.open(folder, encoder=...), or search with vectors"
        )
    if Path(spec).is_absolute() and not Path(spec).is_dir():
        raise InputError(
            f"this index was made with the encoder in {spec!r}, which is not there; give --encoder FOLDER (encoder=...)"
        )
    return load_encoder(spec, device=device, dtype=about["dtype"])


def recorded_dtype(about: dict[str, Any], dtype: str | torch.dtype, folder: Path) -> str:
    """The image tower's precision that an index was made with; where that is not known, `dtype` itself.

    Raises:
        InputError: `dtype` asks for another.
    """
    recorded: str | None = about["dtype"]
    wanted = None if dtype == "auto" else _name_of(resolve_dtype(dtype))
    if wanted and recorded and wanted != recorded:
        raise InputError(
            f"index {str(folder)!r} was made with dtype {recorded}, not {wanted}; leave dtype out, or make a new index "
            "with --out (out=...)"
        )
    return recorded or wanted or "float32"


def check_encoder(about: dict[str, Any], encoder: Encoder, folder: Path) -> None:
    """Whether an encoder may be used with an index.

    Raises:
        EncoderMismatchError: the index was made with another one.
    """
    if about["spec"] is None and encoder.dim == about["dim"]:
        return
    if encoder.fingerprint != about["fingerprint"]:
        raise EncoderMismatchError(
            f"index {str(folder)!r} was made with {_named(about)}, not with {encoder.spec!r} "
            f"({encoder.fingerprint[:12]}); their vectors cannot be compared. Use the first, or make a new index with "
            "--out (out=...)"
        )


def check_same_encoder(one: dict[str, Any], folder: Path, other: dict[str, Any], other_folder: Path) -> None:
    """Whether the vectors of two indexes can be compared.

    Raises:
        EncoderMismatchError: they were made with different encoders.
    """
    if (one["fingerprint"], one["dim"]) != (other["fingerprint"], other["dim"]):
        raise EncoderMismatchError(
            f"{str(folder)!r} was made with {_named(one)}, {str(other_folder)!r} with {_named(other)}; indexes of "
            "different encoders cannot be merged"
        )


def _named(about: dict[str, Any]) -> str:
    if about["spec"] is None:
        return f"vectors of {about['dim']} dimensions, of no recorded encoder"
    return f"{about['spec']!r} (fingerprint {about['fingerprint'][:12]})"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
