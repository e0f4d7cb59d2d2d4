"""What the writing operations of `ImageIndex` share: options in, a draft brought up to date."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from mmalign.encoders import Encoder
from mmalign.errors import InputError

from .build import DecodeSettings, ScanSettings, UpdateReport, update_folder
from .draft import Draft
from .faiss_index import choose_plan
from .items import NO_HASH
from .metadata import concat_metadata, number_rows
from .vectors import checked_rows

__all__ = ["append_vectors", "apply_update", "describe_encoder", "draft_options"]


def describe_encoder(encoder: Encoder) -> dict[str, Any]:
    """The encoder as it stands in the manifest."""
    return {
        "spec": encoder.spec,
        "fingerprint": encoder.fingerprint,
        "dim": encoder.dim,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "modalities": sorted(encoder.modalities),
        "preprocessing": encoder.preprocessing.to_dict() if encoder.preprocessing else None,
    }


_FINISH_OPTIONS = ("factory", "wanted_recall", "text_queries", "memory_bytes")


def draft_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take what `Draft` wants to know out of the options of an update."""
    seconds = options.pop("checkpoint_seconds", None)
    return {} if seconds is None else {"checkpoint_seconds": seconds}


def apply_update(draft: Draft, encoder: Encoder, root: Path, number: int, options: dict[str, Any]) -> UpdateReport:
    """Bring a draft in line with one folder, then finish it. `options` as for `ImageIndex.update`."""
    options = dict(options)
    finishing = {name: options.pop(name) for name in _FINISH_OPTIONS if name in options}
    settings = draft.manifest["settings"]
    scans = settings.setdefault("scan", {})
    scanning = _remembered(ScanSettings, scans.get(str(number), {}), options)
    scans[str(number)] = asdict(scanning)
    decode = _remembered(DecodeSettings, settings.get("decode", {}), options)
    settings["decode"] = asdict(decode)
    if finishing.get("factory") not in (None, "auto"):
        choose_plan(sys.maxsize, draft.dim, factory=finishing["factory"])  # a typing error costs no hours of encoding
    started = time.perf_counter()
    report = update_folder(draft, encoder, root, number, decode=decode, scanning=scanning, **options)
    draft.checkpoint()
    draft.finish(encoder, progress=bool(options.get("progress")), **finishing)
    report.seconds = time.perf_counter() - started
    return report


Settings = TypeVar("Settings", ScanSettings, DecodeSettings)


def _remembered(kind: type[Settings], stored: dict[str, Any], options: dict[str, Any]) -> Settings:
    """Settings as stored, but for those given now, which are taken out of `options`."""
    given = {entry.name: options.pop(entry.name) for entry in fields(kind) if entry.name in options}
    # JSON has no tuples.
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in {**stored, **given}.items()}
    return kind(**values)


def append_vectors(
    draft: Draft, vectors: np.ndarray, paths: Sequence[str] | None, root: int, metadata: pa.Table | None
) -> list[int]:
    """Enter rows made elsewhere; returns the ids of their items.

    Raises:
        InputError: shapes or lengths that do not fit, rows that are zero or not finite.
    """
    if vectors.ndim != 2:
        raise InputError(f"vectors have shape {vectors.shape}; give [n, dim]")
    for name, given in (("paths", paths), ("metadata", metadata)):
        if given is not None and len(given) != len(vectors):
            raise InputError(f"{len(given)} {name} for {len(vectors)} vectors; give one a vector")
    first = draft.rows
    starts = range(0, len(vectors), 65_536)
    pieces = (checked_rows(vectors[start : start + 65_536], draft.dim, first=start) for start in starts)
    draft.stream_rows(pieces, len(vectors))
    ids = []
    for number in range(len(vectors)):
        name = paths[number] if paths is not None else f"vector-{first + number}"
        ids.append(
            draft.add_item(
                row=first + number,
                root=root,
                raw_path=os.fsencode(name),
                size=0,
                mtime_ns=0,
                sha256=NO_HASH,
                width=0,
                height=0,
                format="",
                flags="",
            )
        )
    if metadata is not None:
        table = number_rows(metadata, ids)
        stored = draft.metadata()
        draft.set_metadata(concat_metadata([stored, table]) if stored is not None else table)
    return ids
