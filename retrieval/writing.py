"""Everything that changes an index, each operation under the writer's lock and on the state that is in force then."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmalign.encoders import Encoder
from mmalign.errors import InputError
from mmalign.imaging import DecodeSettings

from .draft import CHECKPOINT_SECONDS, Draft
from .finishing import AS_IT_WAS, check_type, finish
from .options import FaissOptions, UpdateOptions, faiss_options, remembered
from .recorded_encoder import describe_encoder, describe_vectors
from .report import UpdateReport
from .roots import place_of_root
from .storage import Store
from .update import add_images, update_folders

__all__ = [
    "EncoderOf",
    "add_files",
    "add_vectors",
    "build_index",
    "index_vectors",
    "rebuild_index",
    "remove_items",
    "update_index",
]

# From the manifest's entry to the encoder, checked against it.
EncoderOf = Callable[[dict[str, Any]], Encoder]


def build_index(store: Store, encoder: Encoder, root: Path, options: UpdateOptions) -> UpdateReport:
    """Make an index of a folder; see `ImageIndex.build`."""
    with store.create() as writer:
        draft = Draft.start(
            writer,
            describe_encoder(encoder),
            [root],
            decode=remembered(DecodeSettings, {}, options),
            checkpoint_seconds=options.get("checkpoint_seconds", CHECKPOINT_SECONDS),
        )
        check_type(draft, faiss_options(options))
        return update_folders(draft, lambda: encoder, [(0, root)], options)


def index_vectors(
    store: Store,
    vectors: np.ndarray,
    encoder: Encoder | None,
    options: FaissOptions,
    *,
    names: Sequence[str] | None = None,
    root: Path | None = None,
    metadata: pa.Table | None = None,
    progress: bool = False,
) -> None:
    """Make an index of vectors; see `ImageIndex.from_vectors`."""
    about = describe_encoder(encoder) if encoder is not None else describe_vectors(int(vectors.shape[-1]))
    with store.create() as writer:
        draft = Draft.start(writer, about, [root] if root is not None else [])
        check_type(draft, options)
        draft.append_vectors(vectors, names=names, root=-1 if root is None else 0, metadata=metadata)
        finish(draft, (lambda: encoder) if encoder is not None else None, options, progress=progress)


def update_index(
    store: Store,
    encoder_of: EncoderOf,
    folder: str | os.PathLike[str] | None,
    options: UpdateOptions,
    *,
    given: Encoder | None = None,
) -> UpdateReport:
    """Bring an index in line with its folders, or with one; see `ImageIndex.update`.

    Where an encoder is `given`, objects are those of its boxes from now on.
    """
    seconds = options.get("checkpoint_seconds", CHECKPOINT_SECONDS)
    with _changing(store, faiss_options(options), checkpoint_seconds=seconds) as draft:
        if given is not None:
            draft.take_objects_of(given)
        roots = draft.roots()
        if folder is None:
            if not roots:
                raise InputError("this index was made from vectors and has no folder; name one to add")
            wanted = list(enumerate(roots))
        else:
            root = Path(folder)
            number = place_of_root(root, roots)
            if number == len(roots):
                draft.add_root(root)
            wanted = [(number, root)]
        return update_folders(draft, _encoder_for(draft, encoder_of), wanted, options)


def add_files(
    store: Store, encoder_of: EncoderOf, paths: Sequence[str | os.PathLike[str]], *, progress: bool = False
) -> list[int]:
    """Add image files by path; see `ImageIndex.add`."""
    with _changing(store) as draft:
        encoder = _encoder_for(draft, encoder_of)
        ids = add_images(draft, encoder, paths, progress=progress)
        finish(draft, encoder)
    return ids


def add_vectors(
    store: Store, vectors: np.ndarray, *, names: Sequence[str] | None = None, metadata: pa.Table | None = None
) -> list[int]:
    """Add rows made elsewhere; encodes nothing. See `ImageIndex.add_vectors`."""
    with _changing(store) as draft:
        ids = draft.append_vectors(vectors, names=names, metadata=metadata)
        finish(draft)
    return ids


def remove_items(store: Store, ids: set[int]) -> None:
    """Drop items; encodes nothing. See `ImageIndex.remove`."""
    with _changing(store) as draft:
        unknown = ids - set(draft.items.id)
        if unknown:
            raise InputError(f"the index has no items with ids {sorted(unknown)[:5]}; nothing was removed")
        draft.items.keep([number not in ids for number in draft.items.id])
        draft.touch()
        finish(draft)


def rebuild_index(store: Store, encoder_of: EncoderOf, options: FaissOptions, *, progress: bool = False) -> None:
    """Make again what is derived from the vectors; see `ImageIndex.rebuild`."""
    with _changing(store, options) as draft:
        encoder = _encoder_for(draft, encoder_of) if draft.manifest["encoder"]["spec"] is not None else None
        finish(draft, encoder, options, force=True, progress=progress)


@contextmanager
def _changing(
    store: Store, options: FaissOptions = AS_IT_WAS, *, checkpoint_seconds: float = CHECKPOINT_SECONDS
) -> Iterator[Draft]:
    with store.write() as writer:
        draft = Draft(writer, store.read_manifest(), checkpoint_seconds=checkpoint_seconds)
        check_type(draft, options)
        yield draft


def _encoder_for(draft: Draft, encoder_of: EncoderOf) -> Callable[[], Encoder]:
    """Gives the draft's encoder when it is first asked for, checked against the manifest under the lock."""

    @cache
    def encoder() -> Encoder:
        found = encoder_of(draft.manifest["encoder"])
        if draft.manifest["encoder"]["spec"] is None:  # vectors of nobody knows what; from here on it is known
            draft.manifest["encoder"] = describe_encoder(found)
            draft.touch()
        return found

    return encoder
