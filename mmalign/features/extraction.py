"""Frozen encoder in, features of the layers asked for out: every item hashed, every content encoded once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import filelock
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ..checks import at_least, one_of, visible_text
from ..encoders import Encoder, load_encoder
from ..encoders.states import POOLINGS, Layer, check_layer, default_pooling
from ..errors import DamagedError, InputError, LockedError, UnreadableImageError, reason_of
from ..imaging import DEFAULT_DECODING, DecodeSettings
from ..prefetch import prefetch
from ..progress import progress_bar
from ..provenance import libraries, written_now
from .items import by_content, hash_items, report, unchanged
from .store import FORMAT, LOCK, Features, FeatureWriter, assemble, read_folder

__all__ = ["extract_features"]

SECONDS_BETWEEN_CHECKPOINTS = 5.0


@dataclass(frozen=True, eq=False)
class _Job:
    """All that the numbers depend on, checked."""

    encoder: Encoder
    data: list[Any]
    modality: str
    layers: list[Layer]
    pooling: str | None
    decode: DecodeSettings
    batch_size: int
    workers: int | None
    dtype: str
    progress: bool


class _MemoryWriter:
    """What `FeatureWriter` is on disk."""

    def __init__(self, rows: int, dtype: str) -> None:
        self._rows, self._dtype = rows, dtype
        self.layers: dict[Layer, np.ndarray] = {}
        self.done = 0
        self.skipped: list[dict[str, Any]] = []

    def write(self, rows: Sequence[Sequence[int]], values: Mapping[Layer, Float[np.ndarray, "batch dim"]]) -> None:
        for layer, table in values.items():
            if layer not in self.layers:
                self.layers[layer] = np.zeros((self._rows, table.shape[1]), self._dtype)
            for vector, targets in zip(table, rows, strict=True):
                self.layers[layer][targets] = vector

    def count(self, items: int, skipped: list[dict[str, Any]]) -> None:
        self.skipped += skipped

    def checkpoint(self) -> None:
        pass


def extract_features(
    encoder: str | os.PathLike[str] | Encoder,
    data: Sequence[Any],
    *,
    modality: Literal["image", "text"] | None = None,
    layers: Literal["output", "all"] | int | Sequence[int | str] = "output",
    pooling: Literal["cls", "mean"] | None = None,
    decode: DecodeSettings = DEFAULT_DECODING,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    store_dtype: Literal["float32", "float16"] = "float32",
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Features:
    """Raw features of images or texts, not normalised, from any layers of a frozen encoder; one pass for all layers.

    Items of equal content are encoded once. Images that cannot be read get a row of zeros and are reported. With a
    cache, work that was stopped at any moment goes on where it was, and ends in the same bits; what is there is not
    computed again. The cache goes by content: weights, preprocessing, the items' bytes, and the settings below.

    Args:
        encoder: an encoder, or what `load_encoder` takes.
        data: images as `Encoder.encode_images` takes them, or texts.
        modality: which tower; `None` is the only one the encoder has.
        layers: "output" (the encoder's own features), "all" (every layer inside it, without "output"), or a list of
            layers, negative from the last; see `mmalign.encoders.states` for what the numbers mean.
        pooling: how tokens become one vector: "cls", the class token, or "mean", over patches, or over all text tokens
            but padding. `None` is "cls" for images where the tower has a class token, else "mean".
        decode: how image files become pixels.
        device: where to load the encoder, if it is not loaded yet.
        batch_size: items a forward pass; 32 by default. Another size may change the last bits.
        workers: threads that read and decode images; one a core by default.
        store_dtype: of the rows; float16 halves them.
        cache: folder for all extractions, each in a folder of its own; `None` keeps the features in memory.
        progress: show bars.

    Raises:
        InputError: an argument that does not fit, no image that can be read, features that are not finite, or a full
            disk; in the last case what is done is kept.
        LockedError: another process extracts the same features into `cache`.
    """
    at_least("batch_size", batch_size)
    at_least("workers", workers)
    one_of("store_dtype", store_dtype, ("float32", "float16"))
    encoder = _loaded(encoder, device)
    tower = _modality(encoder, modality)
    chosen = _layers(encoder, tower, layers)
    items = _items(data)
    if tower == "text":
        _check_texts(items, decode, workers)
    job = _Job(
        encoder,
        items,
        tower,
        chosen,
        _pooling(encoder, tower, chosen, pooling),
        decode,
        batch_size or encoder.default_batch_size,
        workers,
        store_dtype,
        progress,
    )
    content, failures = hash_items(job.data, job.modality, decode, workers=workers, progress=progress)
    about = _describe(job, content)
    if cache is None:
        memory = _MemoryWriter(len(job.data), store_dtype)
        _fill(job, content, failures, memory)
        return assemble(memory.layers, content, memory.skipped, _named(job.encoder), job.modality, job.pooling)
    folder = Path(cache) / about["key"][:32]
    with contextlib.suppress(InputError, DamagedError):
        return read_folder(folder)
    with _locked(folder):
        with contextlib.suppress(InputError, DamagedError):
            return read_folder(folder)  # another process has made it meanwhile
        writer = FeatureWriter(folder, about, content, store_dtype)
        try:
            _fill(job, content, failures, writer)
        except BaseException:
            with contextlib.suppress(InputError):
                writer.checkpoint()
            raise
        finally:
            writer.close()
    return read_folder(folder)


def _loaded(encoder: str | os.PathLike[str] | Encoder, device: str | torch.device | None) -> Encoder:
    if not isinstance(encoder, Encoder):
        return load_encoder(encoder, device=device)
    if device is not None:
        raise InputError(
            f"encoder {encoder.spec!r} is loaded already, so device would do nothing; leave it out and call "
            "encoder.to(device), or give the spec instead of the encoder"
        )
    return encoder


def _modality(encoder: Encoder, modality: str | None) -> str:
    if modality is None:
        if len(encoder.modalities) != 1:
            raise InputError(f"encoder {encoder.spec!r} takes images and texts; give modality 'image' or 'text'")
        return next(iter(encoder.modalities))
    one_of("modality", modality, ("image", "text"))
    encoder.require(modality)
    return modality


def _layers(encoder: Encoder, modality: str, layers: Any) -> list[Layer]:
    if isinstance(layers, str) and layers == "all":
        count = encoder.layer_count(modality)
        if not count:
            check_layer(encoder, modality, 0)
        return list(range(count))
    if isinstance(layers, str) or hasattr(layers, "__index__"):
        layers = [layers]
    chosen = list(dict.fromkeys(check_layer(encoder, modality, layer) for layer in layers))
    if not chosen:
        raise InputError("layers is empty; give 'output', 'all' or a list of layers")
    return chosen


def _pooling(encoder: Encoder, modality: str, layers: list[Layer], pooling: str | None) -> str | None:
    inner = any(layer != "output" for layer in layers)
    if pooling is None:
        return default_pooling(encoder, modality) if inner else None
    one_of("pooling", pooling, POOLINGS)
    if not inner:
        raise InputError(f"pooling is {pooling!r}, and 'output' is pooled already; leave it out or give layers")
    if pooling == "cls" and not encoder.has_class_token(modality):
        raise InputError(
            f"pooling is 'cls', and the {modality} tower of {encoder.spec!r} has no class token; give 'mean'"
        )
    return pooling


def _items(data: Any) -> list[Any]:
    if isinstance(data, (str, bytes, os.PathLike, Image.Image)):
        raise InputError(f"data is one {type(data).__name__}; give a list of items")
    items = list(data)
    if not items:
        raise InputError("data holds no items; give at least one")
    return items


def _check_texts(texts: list[Any], decode: DecodeSettings, workers: int | None) -> None:
    if decode != DEFAULT_DECODING or workers is not None:
        raise InputError("decode and workers are for images, and the data are texts; leave them out")
    for position, text in enumerate(texts):
        visible_text(f"text {position}", text)


def _describe(job: _Job, content: list[str]) -> dict[str, Any]:
    """What the record says; the key is of everything that the numbers depend on."""
    image = job.modality == "image"
    settings = {
        "modality": job.modality,
        "pooling": job.pooling,
        "decode": asdict(job.decode) if image else None,
        "dtype": str(job.encoder.dtype).removeprefix("torch.") if image else "float32",
        "batch_size": job.batch_size,
        "store_dtype": job.dtype,
    }
    parts = {
        "format": FORMAT,
        "fingerprint": job.encoder.fingerprint,
        "layers": sorted(job.layers, key=str),
        "content": hashlib.sha256("\n".join(content).encode()).hexdigest(),
        **settings,
    }
    return {
        "key": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(),
        "encoder": _named(job.encoder),
        **settings,
        "items": len(by_content(content)),
        "device": str(job.encoder.device),
        "written": written_now(),
        "libraries": libraries("timm", "transformers", "open-clip-torch"),
    }


def _named(encoder: Encoder) -> dict[str, str]:
    return {"spec": encoder.spec, "fingerprint": encoder.fingerprint}


def _fill(
    job: _Job, content: list[str], failures: Mapping[int, UnreadableImageError], writer: FeatureWriter | _MemoryWriter
) -> None:
    """Encode what is not done, in batches that always begin at the same items."""
    groups = by_content(content)
    saved = time.monotonic()
    bar = progress_bar(
        "extracting features",
        len(groups),
        unit=f"{job.modality}s",
        initial=writer.done,
        enabled=job.progress,
        skipped=0,
    )
    batches = _batches(job, content, failures, groups[writer.done :])
    with contextlib.closing(cast("Any", batches)), bar as advance:
        for rows, inputs, errors in batches:
            if len(inputs):
                values = _encode(job, inputs)
                _require_finite(job, values, [group[0] for group in rows if group[0] not in errors])
                writer.write(rows, {layer: _spread(table, rows, errors) for layer, table in values.items()})
            bad = [(row, errors[group[0]]) for group in rows if group[0] in errors for row in group]
            writer.count(len(rows), [report(job.data[row], row, error) for row, error in bad])
            advance(len(rows), skipped=len(writer.skipped))
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                writer.checkpoint()
                saved = time.monotonic()
    if len(writer.skipped) == len(content):
        raise InputError(f"none of the {len(content)} images can be read; the first: {writer.skipped[0]['message']}")
    writer.checkpoint()


_Batch = tuple[list[list[int]], Any, dict[int, UnreadableImageError]]


def _batches(
    job: _Job, content: list[str], failures: Mapping[int, UnreadableImageError], groups: list[list[int]]
) -> Iterator[_Batch]:
    """The rows of each batch, its inputs without those that cannot be read, and why."""
    size = job.batch_size
    chunks = [groups[start : start + size] for start in range(0, len(groups), size)]
    if job.modality == "text":
        for rows in chunks:
            yield rows, [job.data[group[0]] for group in rows], {}
        return

    def load(row: int) -> Tensor:
        if row in failures:
            raise failures[row]
        return job.encoder.load_image(unchanged(job.data[row], content[row]), job.decode)[1]

    loaded = prefetch((group[0] for group in groups), load, ahead=3 * size, workers=job.workers)
    with contextlib.closing(cast("Any", loaded)):
        for rows in chunks:
            pixels: list[Tensor] = []
            errors: dict[int, UnreadableImageError] = {}
            for _ in rows:
                row, image = next(loaded)
                if isinstance(image, UnreadableImageError):
                    errors[row] = image
                else:
                    pixels.append(image)
            yield rows, pixels, errors


@torch.inference_mode()
def _encode(job: _Job, inputs: list[Any]) -> dict[Layer, Float[np.ndarray, "batch dim"]]:
    if job.modality == "text":
        states = job.encoder.text_states(inputs, job.layers)
    else:
        states = job.encoder.image_states(torch.stack(inputs).to(job.encoder.device, job.encoder.dtype), job.layers)
    # "output" comes as one token, which its mean leaves as it is.
    poolings = ["mean" if layer == "output" else cast("str", job.pooling) for layer in job.layers]
    rows = [state.pool(pooling).cpu().numpy() for state, pooling in zip(states, poolings, strict=True)]
    with np.errstate(over="ignore"):  # infinity is found by what comes next
        return {layer: table.astype(job.dtype) for layer, table in zip(job.layers, rows, strict=True)}


def _require_finite(job: _Job, values: Mapping[Layer, np.ndarray], rows: list[int]) -> None:
    for layer, table in values.items():
        bad = np.flatnonzero(~np.isfinite(table).all(axis=1))
        if len(bad):
            hint = (
                "store_dtype 'float32' holds larger values" if job.dtype == "float16" else "load the encoder in float32"
            )
            raise InputError(f"layer {layer!r} of {job.modality} {rows[bad[0]]} is not finite in {job.dtype}; {hint}")


def _spread(
    table: Float[np.ndarray, "encoded dim"], rows: list[list[int]], errors: Mapping[int, Any]
) -> Float[np.ndarray, "batch dim"]:
    """Zeros for what was not encoded."""
    if not errors:
        return table
    whole = np.zeros((len(rows), table.shape[1]), table.dtype)
    whole[[group[0] not in errors for group in rows]] = table
    return whole


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise LockedError(
            f"another process is extracting these features into {str(folder)!r}; wait for it to end, and run again to "
            "load them"
        ) from None
    except OSError as error:
        raise InputError(f"{str(folder)!r} cannot be written ({reason_of(error)}); choose another cache") from None
    try:
        yield
    finally:
        lock.release()
