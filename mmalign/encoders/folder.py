"""Saved encoders: a folder with `encoder.json` and whatever its source wrote beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import DamagedError, InputError, MMAlignError, reason_of
from ..files import save_tensors, whole_folder
from ..imaging import ImagePreprocessing
from .hub import quiet_libraries

if TYPE_CHECKING:
    from .encoder import Encoder

__all__ = ["load_folder", "read_part", "save_folder", "write_part", "write_weights"]

_FORMAT = 1


def save_folder(encoder: Encoder, target: Path) -> Path:
    """What `Encoder.save` does: the folder appears whole or not at all, and replaces an encoder folder.

    Raises:
        InputError: `target` exists and is not an encoder folder.
    """
    if target.exists() and not (target / "encoder.json").is_file():
        raise InputError(f"{str(target)!r} exists and is not an encoder folder; choose another path")
    with whole_folder(target) as fresh:
        with quiet_libraries():
            about = {
                "format": _FORMAT,
                "spec": encoder.spec,
                "dim": encoder.dim,
                "fingerprint": encoder.fingerprint,
                **describe_part(encoder),
                "config": encoder.write(fresh),
            }
        (fresh / "encoder.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    return target


def load_folder(folder: Path) -> Encoder:
    """Load what `Encoder.save` wrote.

    Raises:
        InputError: no such folder, or a damaged or newer one.
        DamagedError: the weights are not those that were saved.
    """
    about = _read_description(folder)
    try:
        saved = about["fingerprint"]
        encoder = read_part(folder, about)
    except MMAlignError:
        raise
    except Exception as error:
        raise InputError(f"encoder folder {str(folder)!r} cannot be read ({reason_of(error)}); save it again") from None
    # An index records this, and is opened from other working directories.
    encoder.spec = str(folder.absolute())
    if encoder.fingerprint != saved:
        raise DamagedError(
            f"encoder folder {str(folder)!r} holds other weights than were saved there "
            f"(fingerprint {encoder.fingerprint[:12]}, saved {saved[:12]}); save it again"
        )
    return encoder


def write_part(encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Write an encoder inside another one's folder; returns what `read_part` needs."""
    folder.mkdir()
    return {**describe_part(encoder), "config": encoder.write(folder)}


def describe_part(encoder: Encoder) -> dict[str, Any]:
    """What says how an encoder's files are to be read, beside what its source says of them."""
    preprocessing = encoder.preprocessing.to_dict() if encoder.preprocessing else None
    return {"source": encoder.source, "preprocessing": preprocessing}


def read_part(folder: Path, about: Mapping[str, Any]) -> Encoder:
    """Read what `write_part` wrote."""
    from .registry import encoder_class

    encoder = encoder_class(about["source"]).read(folder, about["config"])
    if about["preprocessing"] is not None:
        encoder.preprocessing = ImagePreprocessing.from_dict(about["preprocessing"])
    return encoder


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as float32 safetensors, which every `read` can count on."""
    save_tensors({name: tensor.float() for name, tensor in weights.items()}, path)


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "encoder.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        newer = about["format"] > _FORMAT
    except FileNotFoundError:
        raise InputError(f"{str(folder)!r} holds no encoder.json; give a folder made by Encoder.save") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(path)!r} is not a readable encoder description ({error}); save it again") from None
    if newer:
        raise InputError(
            f"{str(path)!r} has format {about['format']}, this mmalign reads up to {_FORMAT}; "
            "upgrade with `pip install -U mmalign`"
        )
    return about
