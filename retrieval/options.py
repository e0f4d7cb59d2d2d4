"""What a person may ask of an update, checked before anything is locked, loaded or read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict, TypeVar

import numpy as np

from mmalign.checks import at_least, in_range
from mmalign.encoders.hub import closest
from mmalign.errors import InputError
from mmalign.imaging import DecodeSettings

from .scan import ScanSettings

__all__ = ["FaissOptions", "UpdateOptions", "checked_options", "faiss_options", "remembered"]


class UpdateOptions(TypedDict, total=False):
    """Keyword arguments of `ImageIndex.update` and `ImageIndex.build`; each is described at `update`."""

    allow_removals: bool
    metadata: str | os.PathLike[str] | None
    follow_links: bool
    all_files: bool
    hidden: bool
    shard: tuple[int, int] | None
    fast_decode: bool
    tolerate_truncation: bool
    max_pixels: int | None
    factory: str | None
    recall: float | None
    text_queries: np.ndarray | None
    memory_bytes: int | None
    checkpoint_seconds: float
    batch_size: int | None
    workers: int | None
    progress: bool


@dataclass(frozen=True, eq=False)
class FaissOptions:
    """How the FAISS index is to be made from now on; `None` leaves a setting as it was.

    Attributes:
        factory: a FAISS factory string or a registered type, instead of the choice by size; "auto" goes back to that.
        recall: recall@10 to tune for, in [0, 1]; 0.95 unless ever given.
        text_queries: unit rows of the user's own text queries to tune with, instead of the built-in phrases.
        memory_bytes: what the FAISS index may take.
    """

    factory: str | None = None
    recall: float | None = None
    text_queries: np.ndarray | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        in_range("recall", self.recall, 0, 1)
        at_least("memory_bytes", self.memory_bytes)


def checked_options(options: Mapping[str, Any]) -> UpdateOptions:
    """The same, once names and numbers are known to be possible.

    Raises:
        InputError: a name that is none, with those it is like, or a value out of range.
    """
    known = list(UpdateOptions.__annotations__)
    for name in options:
        if name not in known:
            raise InputError(f"there is no option {name!r}{closest(name, known)}; there are {', '.join(known)}")
    for name in ("batch_size", "workers", "max_pixels"):
        at_least(name, options.get(name))
    in_range("checkpoint_seconds", options.get("checkpoint_seconds"), 0)
    remembered(ScanSettings, {}, options)
    faiss_options(options)
    return UpdateOptions(**options)  # type: ignore[typeddict-item]


def faiss_options(options: Mapping[str, Any]) -> FaissOptions:
    """Those among the options of an update."""
    return FaissOptions(**_of(FaissOptions, options))


Settings = TypeVar("Settings", ScanSettings, DecodeSettings)


def remembered(kind: type[Settings], stored: Mapping[str, Any], options: Mapping[str, Any]) -> Settings:
    """Settings as stored in the manifest, but for those given now."""
    return kind(**{**stored, **_of(kind, options)})


def _of(kind: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    return {entry.name: options[entry.name] for entry in fields(kind) if entry.name in options}
