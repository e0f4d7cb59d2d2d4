"""Saved encoders: a folder with `encoder.json` and whatever its source wrote beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import IndexDamagedError, InputError, MMAlignError
from ..imaging import ImagePreprocessing
from .encoder import Encoder, read_encoder_json
from .hub import one_line

__all__ = ["load_folder", "read_part", "write_part"]


def load_folder(folder: Path) -> Encoder:
    """Load what `Encoder.save` wrote.

    Raises:
        InputError: no such folder, or a damaged or newer one.
        IndexDamagedError: the weights are not those that were saved.
    """
    about = read_encoder_json(folder)
    try:
        saved = about["fingerprint"]
        encoder = read_part(folder, about)
    except MMAlignError:
        raise
    except Exception as error:
        raise InputError(f"encoder folder {str(folder)!r} cannot be read ({one_line(error)}); save it again") from None
    encoder.spec = str(folder)
    if encoder.fingerprint != saved:
        raise IndexDamagedError(
            f"encoder folder {str(folder)!r} holds other weights than were saved there "
            f"(fingerprint {encoder.fingerprint[:12]}, saved {saved[:12]}); save it again"
        )
    return encoder


def write_part(encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Write an encoder inside another one's folder; returns what `read_part` needs."""
    folder.mkdir()
    preprocessing = encoder.preprocessing.to_dict() if encoder.preprocessing else None
    return {"source": encoder.source, "preprocessing": preprocessing, "config": encoder.write(folder)}


def read_part(folder: Path, about: dict[str, Any]) -> Encoder:
    """Read what `write_part`, or `Encoder.save`, wrote."""
    from .registry import source_class

    encoder = source_class(about["source"]).read(folder, about["config"])
    if about["preprocessing"] is not None:
        encoder.preprocessing = ImagePreprocessing.from_dict(about["preprocessing"])
    return encoder
