"""`ImageIndex`: a folder of images that answers in images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from mmalign.device import resolve_dtype
from mmalign.encoders import DEFAULT_SPEC, Encoder, load_encoder
from mmalign.errors import EncoderMismatchError, InputError

from . import faiss_index
from .build import DecodeSettings, UpdateReport, add_images
from .change import append_vectors, apply_update, describe_encoder, draft_options
from .draft import Draft, read_skipped, store_roots
from .duplicates import find_duplicates
from .hits import Hit
from .items import Item, Items, display_path, iterate
from .query import Query, Term, as_terms, embed_query, embed_vector
from .snapshot import Snapshot
from .storage import Manifest, Store
from .vectors import Vectors

__all__ = ["DEFAULT_FOLDER", "ImageIndex", "find_index"]

DEFAULT_FOLDER = ".mmalign"


class ImageIndex:
    """A searchable index on disk.

    Make one with `ImageIndex.build`, reopen it with `ImageIndex.open`. Opening maps files and loads neither the vectors
    nor the encoder. Any number of processes may read while one writes; a reader keeps the state it opened until
    `refresh`. An instance may be searched from several threads.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        encoder: Encoder | None = None,
        device: str | None = None,
    ) -> None:
        self.store = Store(Path(folder))
        self.device = device
        self._encoder = encoder
        self.snapshot = Snapshot(self.store)
        if encoder is not None:
            self._check_encoder(encoder)

    # -- making and opening ----------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], *, encoder: Encoder | None = None, device: str | None = None
    ) -> ImageIndex:
        """Open an index, given its folder or the image folder it was made in.

        Args:
            folder: the index, or a folder that holds one as `.mmalign`.
            encoder: use this one instead of loading the recorded spec; must have the same fingerprint.
            device: where to run the encoder.

        Raises:
            InputError: no index there.
            IndexDamagedError: files are missing or cut, or the format is newer.
            EncoderMismatchError: `encoder` is another one than the index was made with.
        """
        return cls(find_index(folder), encoder=encoder, device=device)

    @classmethod
    def build(
        cls,
        folder: str | os.PathLike[str],
        out: str | os.PathLike[str] | None = None,
        *,
        encoder: str | os.PathLike[str] | Encoder | None = None,
        device: str | None = None,
        dtype: str = "auto",
        **options: Any,
    ) -> tuple[ImageIndex, UpdateReport]:
        """Index a folder of images, or bring its index up to date.

        Args:
            folder: images, at any depth.
            out: where the index goes; `FOLDER/.mmalign` by default.
            encoder: spec or encoder; for a new index `mmalign.encoders.DEFAULT_SPEC`, for an existing one its own.
            device: where to run the encoder.
            dtype: weights of the image tower; "auto" measures whether bfloat16 is faster. Recorded: later updates use
                the same.
            options: as for `update`.

        Returns:
            The index and what was done.

        Raises:
            InputError: the folder is missing, empty, or none of its images can be read.
            EncoderUnavailableError: the encoder's weights are not to be had.
            EncoderMismatchError: the index exists and was made with another encoder.
            IndexLockedError: another process is writing to it.
        """
        root = Path(folder)
        if not root.is_dir():
            kind = "is a file; give the folder it is in" if root.exists() else "does not exist; check the path"
            raise InputError(f"{str(root)!r} {kind}")
        store = Store(Path(out) if out is not None else root / DEFAULT_FOLDER)
        if dtype != "auto":
            resolve_dtype(dtype)
        if store.exists():
            index = cls(store.folder, device=device)
            if encoder is not None:
                index._encoder = encoder if isinstance(encoder, Encoder) else index._load(os.fspath(encoder))
                index._check_encoder(index._encoder)
            return index, index.update(root, **options)
        faiss_index.import_faiss()
        if not isinstance(encoder, Encoder):
            encoder = load_encoder(encoder or DEFAULT_SPEC, device=device, dtype=dtype)
        encoder.require("image")
        with store.write() as writer:
            _refuse_existing(store)
            try:
                draft = Draft.start(store, writer, describe_encoder(encoder), [root], **draft_options(options))
                report = apply_update(draft, encoder, root, 0, options)
            except BaseException:
                writer.abandon()
                raise
        return cls(store.folder, encoder=encoder), report

    @classmethod
    def from_vectors(
        cls,
        out: str | os.PathLike[str],
        vectors: Float[np.ndarray, "n dim"],
        *,
        encoder: Encoder | None = None,
        paths: Sequence[str] | None = None,
        root: str | os.PathLike[str] | None = None,
        metadata: pa.Table | None = None,
        factory: str | None = None,
        wanted_recall: float | None = None,
        text_queries: np.ndarray | None = None,
        memory_bytes: int | None = None,
        progress: bool = False,
    ) -> ImageIndex:
        """Make an index of vectors that exist already.

        Args:
            out: a new folder.
            vectors: [n, dim]; normalised if they are not; may be memory-mapped and is read in pieces.
            encoder: what made them, for queries in words and images; without it only vectors can be searched for.
            paths: a name for each; relative to `root` where that is given.
            root: folder of the files.
            metadata: further columns, n rows.
            factory: FAISS factory string instead of the choice by size.
            wanted_recall: recall@10 to tune for; 0.95 by default.
            text_queries: unit rows to tune with.
            memory_bytes: what the FAISS index may take.
            progress: show a bar.

        Raises:
            InputError: rows that are zero or not finite (named), wrong shapes, or `out` holds an index.
        """
        store = Store(Path(out))
        _refuse_existing(store)
        about = describe_encoder(encoder) if encoder is not None else {"spec": None, "dim": int(vectors.shape[-1])}
        with store.write() as writer:
            _refuse_existing(store)
            try:
                draft = Draft.start(store, writer, about, [Path(root)] if root is not None else [])
                append_vectors(draft, vectors, paths, 0 if root is not None else -1, metadata)
                draft.finish(
                    encoder,
                    factory=factory,
                    wanted_recall=wanted_recall,
                    text_queries=text_queries,
                    memory_bytes=memory_bytes,
                    progress=progress,
                )
            except BaseException:
                writer.abandon()
                raise
        return cls(store.folder, encoder=encoder)

    def refresh(self) -> None:
        """See what has been written since; searches that are running finish on the state they began with."""
        self.snapshot = Snapshot(self.store)

    # -- looking at it ---------------------------------------------------------------------------------------------

    @property
    def manifest(self) -> Manifest:
        """What `manifest.json` says; see `retrieval.storage`."""
        return self.snapshot.manifest

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.snapshot.dim

    @property
    def roots(self) -> list[Path]:
        """The indexed folders, where they are now."""
        return self.snapshot.roots

    @property
    def items(self) -> Items:
        """The item table."""
        return self.snapshot.items

    @property
    def vectors(self) -> Vectors:
        """All rows, memory-mapped."""
        return self.snapshot.vectors

    @property
    def metadata(self) -> pa.Table | None:
        """The user's columns with `id`."""
        return self.snapshot.metadata

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iterate(self.items)

    def __repr__(self) -> str:
        return f"ImageIndex({str(self.store.folder)!r}, {len(self)} images, {self.manifest['encoder']['spec']})"

    @property
    def encoder(self) -> Encoder:
        """What embeds queries; loaded when first needed, and checked against the fingerprint of the index.

        Raises:
            EncoderMismatchError: the recorded spec gives other vectors today than when the index was made.
        """
        if self._encoder is None:
            spec = self.manifest["encoder"]["spec"]
            if spec is None:
                raise InputError(
                    "this index was made from vectors alone; open it with the encoder that made them, "
                    "ImageIndex.open(folder, encoder=...), or search with vectors"
                )
            encoder = self._load(spec)
            self._check_encoder(encoder)
            self._encoder = encoder
        return self._encoder

    def info(self) -> dict[str, Any]:
        """What the index holds and how it was made, JSON-safe."""
        manifest = self.manifest
        return {
            "folder": os.fspath(self.store.folder),
            "roots": [display_path(os.fsencode(root)) for root in self.roots],
            "images": len(self),
            "distinct": self.snapshot.alive_count,
            "skipped": len(self.skipped()),
            "encoder": manifest["encoder"],
            "decode": manifest["settings"].get("decode", {}),
            "faiss": manifest["faiss"],
            "measured": manifest["measured"],
            "metadata_columns": self.metadata.column_names if self.metadata is not None else [],
            "bytes": sum(about["size"] for about in manifest["files"].values()),
            "format": manifest["format"],
            "generation": manifest["generation"],
            "written": manifest["written"],
            "libraries": manifest["libraries"],
        }

    def skipped(self) -> list[dict[str, Any]]:
        """Files that could not be read, with `path`, `reason` and `message`."""
        return read_skipped(self.store.folder, self.manifest)

    def verify(self) -> list[str]:
        """Check every file against its SHA-256 and what they say against each other; problems, or nothing."""
        return self.snapshot.verify()

    # -- searching -------------------------------------------------------------------------------------------------

    def search(
        self,
        query: Query,
        k: int = 10,
        *,
        where: str | Sequence[str] | None = None,
        min_match: float | None = None,
        min_score: float | None = None,
        exact: bool = False,
    ) -> list[Hit]:
        """The k best images for words, images, or several of both.

        Args:
            query: a string (words), a path or picture, a `Term` with weight and sign, a list of these, or a vector
                [dim] of the same space. In a list, strings are words and paths are images.
            k: at most this many hits.
            where: keep only items for which this holds, SQL or `key=value`; see `retrieval.filters.kept_ids`.
            min_match: drop hits with a lower match, in [0, 1]; an empty list then means that nothing here matches.
            min_score: drop hits with a lower cosine.
            exact: scan all vectors instead of asking FAISS.

        Returns:
            Hits in descending order of cosine; fewer than k only if fewer items pass.

        Raises:
            InputError: an empty query, k below 1, a filter that is not understood, a vector of another width or with
                values that are not finite.
            UnreadableImageError: a query image cannot be read.
        """
        if isinstance(query, np.ndarray) and query.ndim <= 2 and query.size == query.shape[-1]:
            vector, kind = embed_vector(query, self.dim), "image"
        else:
            fast = bool(self.manifest["settings"].get("decode", {}).get("fast_decode"))
            vector, kind = embed_query(self.encoder, as_terms(query), fast_decode=fast)
        snapshot = self.snapshot
        passing = snapshot.passing(where) if where is not None else None
        mask = snapshot.rows_of(passing) if passing is not None else None
        # Padding for results that cannot be is not worth the memory of a k typed with too many zeros.
        depth = min(k, max(1, snapshot.alive_count))
        scores, rows = snapshot.search_vectors(vector[None], depth, mask=mask, exact=exact)
        return snapshot.hits(scores[0], rows[0], kind, min_match=min_match, min_score=min_score, passing=passing)

    def similar(self, image: int | str | os.PathLike[str], k: int = 10, **options: Any) -> list[Hit]:
        """The images most like one of the index (by id or path) or any other image file; itself left out.

        Raises:
            InputError: no such id.
        """
        position = self.snapshot.position_of(image)
        if position is None:
            if isinstance(image, Integral):
                raise InputError(f"the index has no item with id {image}; `search` results carry ids")
            return self.search(Term(image, kind="image"), k, **options)
        if k < 1:
            raise InputError(f"k is {k}; ask for at least one result")
        row = self.items.value("row", position)
        vector = self.vectors.gather(np.array([row]))[0]
        hits = self.search(vector, k + 1, **options)
        others = [hit for hit in hits if hit.item.row != row][:k]
        return [replace(hit, rank=rank) for rank, hit in enumerate(others, 1)]

    def search_vectors(
        self,
        queries: Float[np.ndarray, "q dim"],
        k: int = 10,
        *,
        mask: Bool[np.ndarray, " rows"] | None = None,
        exact: bool = False,
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """Cosines and vector rows of the k best for each unit query, re-ranked exactly; row -1 pads short results.

        Args:
            queries: unit rows, float32.
            k: results a query.
            mask: which rows may be returned; rows that belong to no item never are.
            exact: scan all vectors instead of asking FAISS.

        Raises:
            InputError: k below 1, or queries of another shape.
        """
        return self.snapshot.search_vectors(queries, k, mask=mask, exact=exact)

    def duplicates(self, threshold: float | None = None, *, neighbours: int = 20) -> list[list[Item]]:
        """Groups of images that are the same; see `retrieval.duplicates.find_duplicates`."""
        return find_duplicates(self, threshold, neighbours=neighbours)

    # -- changing --------------------------------------------------------------------------------------------------

    def update(self, folder: str | os.PathLike[str] | None = None, **options: Any) -> UpdateReport:
        """Bring the index in line with its folder, or with a further one.

        Args:
            folder: one of the indexed folders, or a new one to add; by default all indexed folders in turn.
            options: `batch_size`, `workers`, `progress`, `allow_removals`, `metadata` (a file), `factory`,
                `wanted_recall`, `text_queries`, `memory_bytes`; `follow_links`, `all_files`, `hidden`, `shard` (i, n);
                `fast_decode`, `tolerate_truncation`, `max_pixels`, which stay as they were unless given.

        Raises:
            InputError, EncoderMismatchError, IndexLockedError: as for `build`.
        """
        encoder = self.encoder
        with self._drafting(**draft_options(options)) as draft:
            if folder is None:
                reports = [apply_update(draft, encoder, root, n, options) for n, root in enumerate(self.roots)]
                if not reports:
                    raise InputError("this index was made from vectors and has no folder; name one to add")
                return sum(reports[1:], reports[0])
            root = Path(folder)
            known = [number for number, path in enumerate(self.roots) if path.resolve() == root.resolve()]
            if not known:
                for path in self.roots:
                    if path.resolve() in root.resolve().parents or root.resolve() in path.resolve().parents:
                        raise InputError(f"{str(root)!r} and the indexed {str(path)!r} overlap; index the outer one")
                draft.manifest["roots"] += store_roots([root], self.store.folder)
                draft.touch()
            return apply_update(draft, encoder, root, known[0] if known else len(self.roots), options)

    def add(self, images: Iterable[str | os.PathLike[str]], *, progress: bool = False) -> list[int]:
        """Add image files by path; returns their ids, those of known files included.

        Raises:
            UnreadableImageError: a file cannot be read; nothing was added.
        """
        decode = DecodeSettings(**self.manifest["settings"].get("decode", {}))
        with self._drafting() as draft:
            paths = [images] if isinstance(images, (str, os.PathLike)) else list(images)
            ids = add_images(draft, self.encoder, self.roots, paths, decode=decode, progress=progress)
            draft.finish(self.encoder)
        return ids

    def add_vectors(
        self,
        vectors: Float[np.ndarray, "n dim"],
        *,
        paths: Sequence[str] | None = None,
        metadata: pa.Table | None = None,
    ) -> list[int]:
        """Add rows made elsewhere with the same encoder; returns their ids.

        Raises:
            InputError: another width, or rows that are zero or not finite.
        """
        with self._drafting() as draft:
            ids = append_vectors(draft, np.asarray(vectors), paths, -1, metadata)
            draft.finish(self._encoder)
        return ids

    def remove(self, ids: Iterable[int]) -> None:
        """Remove items by id. Image files are not touched; an update of their folder will find them again.

        Raises:
            InputError: an id is not in the index; nothing was removed.
        """
        wanted = set(ids)
        with self._drafting() as draft:
            unknown = wanted - set(draft.items.id)
            if unknown:
                raise InputError(f"the index has no items with ids {sorted(unknown)[:5]}; nothing was removed")
            draft.items.keep([number not in wanted for number in draft.items.id])
            draft.touch()
            draft.finish(self._encoder)

    def rebuild(self, **options: Any) -> None:
        """Build FAISS and calibration again from the vectors; `options` as for `update`."""
        with self._drafting() as draft:
            draft.finish(self._encoder, force=True, **options)

    @contextmanager
    def _drafting(self, **options: Any) -> Iterator[Draft]:
        with self.store.write() as writer:
            self.refresh()  # another process may have written since we opened it
            yield Draft(writer, self.store.read_manifest(), **options)
        self.refresh()

    # -- encoders --------------------------------------------------------------------------------------------------

    def _load(self, spec: str) -> Encoder:
        about = self.manifest["encoder"]
        return load_encoder(spec, device=self.device, dtype=about.get("dtype", "float32"))

    def _check_encoder(self, encoder: Encoder) -> None:
        about = self.manifest["encoder"]
        if about["spec"] is None and encoder.dim == self.dim:
            return
        if encoder.fingerprint != about.get("fingerprint"):
            raise EncoderMismatchError(
                f"index {str(self.store.folder)!r} was made with {about['spec']!r} (fingerprint "
                f"{about.get('fingerprint', '-')[:12]}), not with {encoder.spec!r} ({encoder.fingerprint[:12]}); their "
                f"vectors cannot be compared. Use the first, or make a new index with --out"
            )


def _refuse_existing(store: Store) -> None:
    """Before the encoder is loaded, and again once the lock is held: two first builds must not follow each other."""
    if store.exists():
        raise InputError(f"{str(store.folder)!r} holds an index already; choose another folder, or update that one")


def find_index(path: str | os.PathLike[str]) -> Path:
    """The index folder for a path: itself, or `.mmalign` in it.

    Raises:
        InputError: neither is an index.
    """
    given = Path(path)
    for candidate in (given, given / DEFAULT_FOLDER):
        if Store(candidate).exists():
            return candidate
    if not given.exists():
        raise InputError(f"{str(given)!r} does not exist; give an index, or a folder indexed with `mmalign index`")
    raise InputError(f"{str(given)!r} is not an index and holds none; make one with `mmalign index {given}`")
