"""`ImageIndex`: a folder of images that answers in images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int

from mmalign.checks import at_least, one_of
from mmalign.device import resolve_dtype
from mmalign.encoders import DEFAULT_SPEC, Encoder
from mmalign.errors import InputError

from . import writing
from .duplicates import find_duplicates
from .faiss_module import import_faiss
from .hits import Hit
from .index_encoders import IndexEncoders
from .items import Item, Items, display_path, iterate
from .options import FaissOptions, UpdateOptions, checked_options
from .query import Query, Term, as_terms, as_vector, embed_query, kind_of
from .query_rows import QueryRows
from .recorded_encoder import check_boxes, given_encoder
from .report import UpdateReport
from .reranked import reranked, words_of
from .snapshot import Snapshot
from .storage import DEFAULT_FOLDER, Manifest, Store, find_index
from .vectors import Vectors, as_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mmalign.object_aware.reranking import Reranker

__all__ = ["ImageIndex"]


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
        encoder: str | os.PathLike[str] | Encoder | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
    ) -> None:
        """As `open`, for the folder of the index itself."""
        self.store = Store(Path(folder))
        self.snapshot = Snapshot(self.store)
        self._encoders = IndexEncoders(self.folder, self.manifest, encoder, device, dtype)

    # -- making and opening ----------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        encoder: str | os.PathLike[str] | Encoder | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
    ) -> ImageIndex:
        """Open an index, given its folder or the image folder it was made in.

        Args:
            folder: the index, or a folder that holds one as `.mmalign`.
            encoder: use this one (a spec, the folder of a saved encoder, or an encoder) instead of the recorded spec,
                for example where an encoder's folder has moved; must have the same fingerprint. While the encoder is
                being replaced it may be either of the two.
            device: where to run the encoder.
            dtype: only what the index was made with, which is the default.

        Raises:
            InputError: no index there, another `dtype`, or a `device` beside an encoder that is loaded already.
            IndexDamagedError: files are missing or cut, or the format is newer.
            EncoderMismatchError: `encoder` is another one than the index was made with.
        """
        return cls(find_index(folder), encoder=encoder, device=device, dtype=dtype)

    @classmethod
    def build(
        cls,
        folder: str | os.PathLike[str],
        out: str | os.PathLike[str] | None = None,
        *,
        encoder: str | os.PathLike[str] | Encoder | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        **options: Unpack[UpdateOptions],
    ) -> tuple[ImageIndex, UpdateReport]:
        """Index a folder of images, or bring its index up to date.

        Args:
            folder: images, at any depth.
            out: where the index goes; `FOLDER/.mmalign` by default.
            encoder: spec, folder or encoder; `mmalign.encoders.DEFAULT_SPEC` for a new index, else its own. Of one that
                differs in its file of boxes alone the spec is recorded; images that are known keep their vectors.
            device: where to run the encoder.
            dtype: weights of the image tower; "auto" measures whether bfloat16 is faster. Recorded: later updates use
                the same.
            options: as for `update`.

        Returns:
            The index and what was done.

        Raises:
            InputError: the folder is missing, empty, or none of its images can be read; an option that does not exist
                or is out of range; a file of boxes that cannot be read; `device` or `dtype` beside an encoder that is
                loaded already, or another `dtype` than the existing index was made with.
            EncoderUnavailableError: the encoder's weights are not to be had.
            EncoderMismatchError: the index exists and was made with another encoder.
            IndexLockedError: another process is writing to it.
        """
        wanted = checked_options(options)
        root = Path(folder)
        if not root.is_dir():
            kind = "is a file; give the folder it is in" if root.exists() else "does not exist; check the path"
            raise InputError(f"{str(root)!r} {kind}")
        store = Store(Path(out) if out is not None else root / DEFAULT_FOLDER)
        if dtype != "auto":
            resolve_dtype(dtype)
        check_boxes(encoder)
        if store.exists():
            index = cls(store.folder, encoder=encoder, device=device, dtype=dtype)
            return index, index.update(root, **wanted)
        import_faiss()
        made_with = given_encoder(encoder if encoder is not None else DEFAULT_SPEC, device, dtype)
        made_with.require("image")
        report = writing.build_index(store, made_with, root, wanted)
        return cls(store.folder, encoder=made_with), report

    @classmethod
    def from_vectors(
        cls,
        vectors: Float[np.ndarray, "n dim"],
        out: str | os.PathLike[str],
        *,
        paths: Sequence[str] | None = None,
        root: str | os.PathLike[str] | None = None,
        metadata: pa.Table | None = None,
        factory: str | None = None,
        recall: float | None = None,
        text_queries: np.ndarray | None = None,
        memory_bytes: int | None = None,
        encoder: str | os.PathLike[str] | Encoder | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        progress: bool = False,
    ) -> ImageIndex:
        """Make an index of vectors that exist already.

        Args:
            vectors: [n, dim]; normalised if they are not; may be memory-mapped and is read in pieces.
            out: a new folder.
            paths: a name for each; relative to `root`, the folder of the files, where that is given.
            root: see `paths`.
            metadata: further columns, n rows.
            factory, recall, text_queries, memory_bytes: see `retrieval.options.FaissOptions`.
            encoder: what made them (spec, folder or encoder), for queries in words and images; without it only vectors
                can be searched for.
            device: where to run the encoder.
            dtype: weights of the image tower, recorded.
            progress: show a bar.

        Raises:
            InputError: rows that are zero or not finite (named), wrong shapes, or `out` holds an index.
        """
        options = FaissOptions(factory, recall, text_queries, memory_bytes)
        if encoder is None and (device is not None or dtype != "auto"):
            raise InputError("device and dtype are for an encoder, and none is given; leave them out or give encoder")
        made_with = None if encoder is None else given_encoder(encoder, device, dtype)
        store = Store(Path(out))
        writing.index_vectors(
            store,
            as_rows(vectors),
            made_with,
            options,
            names=paths,
            root=Path(root) if root is not None else None,
            metadata=metadata,
            progress=progress,
        )
        return cls(store.folder, encoder=made_with)

    def refresh(self) -> None:
        """See what has been written since; searches that are running finish on the state they began with."""
        self.snapshot = Snapshot(self.store)

    # -- looking at it ---------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Where the index is."""
        return self.store.folder

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
        return f"ImageIndex({str(self.folder)!r}, {len(self)} images, {self.manifest['encoder']['spec']})"

    @property
    def encoder(self) -> Encoder:
        """What embeds queries; loaded when first needed, and checked against the fingerprint of the index.

        While it is being replaced this is the old one, of `vectors`; see `new_encoder`.

        Raises:
            EncoderMismatchError: the recorded spec gives other vectors today than when the index was made.
        """
        return self._encoder_of(self.manifest["encoder"])

    @property
    def loaded_encoder(self) -> Encoder | None:
        """`encoder` where it was given or needed before; `None` where it would have to be loaded."""
        return self._encoders.loaded(self.manifest["encoder"])

    @property
    def new_encoder(self) -> Encoder | None:
        """What is replacing `encoder` (`retrieval.IndexUpgrade`); `None` where nothing is.

        Raises:
            EncoderMismatchError: the recorded spec gives other vectors today than when the upgrade was begun.
        """
        upgrade = self.manifest.get("upgrade")
        return self._encoder_of(upgrade["encoder"]) if upgrade else None

    def _encoder_of(self, about: dict[str, Any]) -> Encoder:
        """What an entry of the manifest stands for, loaded when first needed."""
        return self._encoders.of(about, self.manifest)

    def info(self) -> dict[str, Any]:
        """What the index holds and how it was made, JSON-safe."""
        snapshot = self.snapshot
        manifest = snapshot.manifest
        return {
            "folder": os.fspath(self.folder),
            "roots": [display_path(os.fsencode(root)) for root in snapshot.roots],
            "images": len(snapshot.items),
            "distinct": snapshot.alive_count,
            "skipped": len(snapshot.skipped()),
            "complete": snapshot.unfinished is None,
            "encoder": manifest["encoder"],
            "decode": manifest["settings"]["decode"],
            "faiss": manifest["faiss"],
            "measured": manifest["measured"],
            "upgrade": self._upgrade_info(),
            "metadata_columns": snapshot.metadata.column_names if snapshot.metadata is not None else [],
            "bytes": sum(about["size"] for about in manifest["files"].values()),
            "format": manifest["format"],
            "generation": manifest["generation"],
            "written": manifest["written"],
            "libraries": manifest["libraries"],
        }

    def _upgrade_info(self) -> dict[str, Any] | None:
        """See `retrieval.upgrading.upgrade.UpgradeStatus`."""
        from .upgrading.upgrade import status_of

        status = status_of(self.snapshot)
        return None if status.stage == "none" else status.to_dict()

    def skipped(self) -> list[dict[str, Any]]:
        """Files that could not be read, with `path`, `reason` and `message`."""
        return self.snapshot.skipped()

    def verify(self, *, progress: bool = False) -> list[str]:
        """Check every file against its SHA-256 and what they say against each other; problems, or nothing."""
        return [f"{name} {problem}" for name, problem in self.snapshot.problems(progress=progress)]

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
        kind: Literal["text", "image"] | None = None,
        rerank: Reranker | None = None,
        rerank_depth: int = 64,
        progress: bool = False,
    ) -> list[Hit]:
        """The k best images for words, images, or several of both.

        Args:
            query: a string (words), a path or picture, a `Term` with weight and sign, a list of these, or a vector
                [dim] of the same space (while the encoder is being replaced, of the old one). In a list, strings are
                words and paths are images. Images are decoded as
                those of the index were.
            k: at most this many hits.
            where: keep only items for which this holds, SQL or `key=value`; see `retrieval.filters.kept_ids`.
            min_match: drop hits with a lower match, in [0, 1]; an empty list then means that nothing here matches.
            min_score: drop hits with a lower cosine, in [-1, 1].
            exact: scan all vectors instead of asking FAISS.
            kind: what a vector stands for when matches are reckoned, "image" by default; only for vectors.
            rerank: puts the best hits for one text in its own order (`Hit.rerank_score`), reading their files again;
                see `mmalign.object_aware.reranking`. Hits whose file is gone, changed or unreadable come last, without
                such a score.
            rerank_depth: so many hits are read again, but never fewer than k; 64 in the paper for Flickr30k.
            progress: show a bar while they are.

        Returns:
            Hits in descending order of cosine, or as re-ranked; fewer than k only if fewer items pass.

        Raises:
            InputError: an empty query, a number out of range, a filter that is not understood, a vector that is none;
                `rerank` for anything but one text.
            UnreadableImageError: a query image cannot be read.
        """
        at_least("k", k)
        at_least("rerank_depth", rerank_depth)
        snapshot = self.snapshot
        vector = as_vector(query, snapshot.dim)
        terms = as_terms(query) if vector is None else None
        text = words_of(terms) if rerank is not None else ""
        if terms is not None:
            if kind is not None:
                raise InputError("kind says what a vector stands for; words and images need no kind, leave it out")
            rows = self._embedded(snapshot, terms)
        else:
            assert vector is not None
            meant = kind or "image"
            one_of("kind", meant, ("text", "image"))
            rows = QueryRows(meant, vector[None])
        depth = k if rerank is None else max(k, rerank_depth)
        hits = snapshot.search(rows, depth, where=where, min_match=min_match, min_score=min_score, exact=exact)
        if rerank is None:
            return hits
        found = reranked(hits, rerank, text, items=snapshot.items, decode=snapshot.decode, progress=progress)
        return found[:k]

    def _embedded(self, snapshot: Snapshot, terms: Sequence[Term]) -> QueryRows:
        """A query by the encoders that are needed."""
        kind = kind_of(terms)
        needs_old, needs_new = snapshot.upgrade.needs(kind) if snapshot.upgrade else (True, False)
        old = self._encoder_of(snapshot.manifest["encoder"]) if needs_old else None
        new = self._encoder_of(snapshot.manifest["upgrade"]["encoder"]) if needs_new else None
        both = [None if one is None else embed_query(one, terms, snapshot.decode)[None] for one in (old, new)]
        return QueryRows(kind, *both)

    def find_texts(
        self, texts: Sequence[str], k: int, *, old: Float[np.ndarray, "q dim"] | None = None
    ) -> Int[np.ndarray, "q k"]:
        """Vector rows of the k best for each of many texts; `old` where the index's own encoder has embedded them."""
        snapshot = self.snapshot
        needs_old, needs_new = snapshot.upgrade.needs("text") if snapshot.upgrade else (True, False)
        if needs_old and old is None:
            old = self._encoder_of(snapshot.manifest["encoder"]).encode_texts(texts)
        new = self._encoder_of(snapshot.manifest["upgrade"]["encoder"]).encode_texts(texts) if needs_new else None
        return snapshot.find(QueryRows("text", old, new), k).rows

    def similar(
        self,
        image: int | str | os.PathLike[str],
        k: int = 10,
        *,
        where: str | Sequence[str] | None = None,
        min_match: float | None = None,
        min_score: float | None = None,
        exact: bool = False,
    ) -> list[Hit]:
        """The images most like one of the index (by id or path) or any other image file; itself left out.

        Raises:
            InputError: no such id, or as for `search`.
        """
        at_least("k", k)
        snapshot = self.snapshot
        position = snapshot.position_of(image)
        row = None
        if position is not None:
            row = snapshot.items.value("row", position)
            stored = snapshot.vectors.gather(np.array([row]))
            query = QueryRows("image", stored, snapshot.upgrade.stored(row) if snapshot.upgrade else None)
        elif isinstance(image, Integral):
            raise InputError(f"the index has no item with id {image}; `search` results carry ids")
        else:
            query = self._embedded(snapshot, [Term(image, kind="image")])
        hits = snapshot.search(query, k + 1, where=where, min_match=min_match, min_score=min_score, exact=exact)
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
        """Cosines and vector rows of the k best for each unit query, scored exactly; row -1 pads short results.

        Args:
            queries: unit rows, float32.
            k: results a query.
            mask: which rows may be returned; rows that belong to no item never are.
            exact: scan all vectors instead of asking FAISS.

        Raises:
            InputError: k below 1, or queries of another shape.
        """
        return self.snapshot.search_vectors(queries, k, mask=mask, exact=exact)

    def duplicates(
        self, near: float | None = None, *, neighbours: int = 20, progress: bool = False
    ) -> list[list[Item]]:
        """Groups of images that are the same; see `retrieval.duplicates.find_duplicates`."""
        return find_duplicates(self.snapshot, near, neighbours=neighbours, progress=progress)

    # -- changing --------------------------------------------------------------------------------------------------

    def update(self, folder: str | os.PathLike[str] | None = None, **options: Unpack[UpdateOptions]) -> UpdateReport:
        """Bring the index in line with its folder, or with a further one.

        Only what changed is read; the encoder is loaded only if there is something to encode.

        Args:
            folder: one of the indexed folders, or a new one to add; by default all indexed folders in turn.
            options: by keyword (`retrieval.options.UpdateOptions`).
                For this update: `allow_removals` (drop vanished images even if they are more than a half),
                `batch_size` (images a forward pass), `workers` (decoding threads), `checkpoint_seconds` (between
                states that cannot be lost, at least), `progress` (show a bar).
                As it was unless given: `metadata` (a CSV, JSONL or Parquet file), `follow_links`, `all_files`,
                `hidden`, `shard` (i, n) (see `retrieval.scan.ScanSettings`), `fast_decode`, `tolerate_truncation`,
                `max_pixels` (see `mmalign.imaging.DecodeSettings`), `factory`, `recall`, `text_queries`,
                `memory_bytes` (see `retrieval.options.FaissOptions`).

        Raises:
            InputError, EncoderMismatchError, IndexLockedError: as for `build`.
        """
        wanted = checked_options(options)
        report = writing.update_index(self.store, self._encoder_of, folder, wanted, given=self._encoders.given)
        self.refresh()
        return report

    def add(
        self, images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, progress: bool = False
    ) -> list[int]:
        """Add image files by path; returns their ids, those of known files included.

        Raises:
            UnreadableImageError: a file cannot be read; nothing was added.
        """
        paths = [images] if isinstance(images, (str, os.PathLike)) else list(images)
        ids = writing.add_files(self.store, self._encoder_of, paths, progress=progress)
        self.refresh()
        return ids

    def add_vectors(
        self,
        vectors: Float[np.ndarray, "n dim"],
        *,
        paths: Sequence[str] | None = None,
        metadata: pa.Table | None = None,
    ) -> list[int]:
        """Add rows made elsewhere with the same encoder; returns their ids. Nothing is encoded.

        Raises:
            InputError: another width, or rows that are zero or not finite.
        """
        ids = writing.add_vectors(self.store, as_rows(vectors), names=paths, metadata=metadata)
        self.refresh()
        return ids

    def remove(self, ids: int | Iterable[int]) -> None:
        """Remove items by id. Image files are not touched; an update of their folder will find them again.

        Nothing is encoded.

        Raises:
            InputError: an id is not in the index; nothing was removed.
        """
        wanted = [ids] if isinstance(ids, Integral) else list(ids)  # type: ignore[arg-type]
        for number in wanted:
            at_least("id", number, 0)
        writing.remove_items(self.store, {int(number) for number in wanted})
        self.refresh()

    def rebuild(
        self,
        *,
        factory: str | None = None,
        recall: float | None = None,
        text_queries: np.ndarray | None = None,
        memory_bytes: int | None = None,
        progress: bool = False,
    ) -> None:
        """Build FAISS and calibration again from the vectors.

        The encoder is loaded only if the index has one that takes text and its reference queries are missing, or fewer
        than an index of this size is tuned with.

        What is given holds from now on; see `retrieval.options.FaissOptions`.

        Raises:
            InputError: the factory is not known, or does not fit the vectors; a number out of range.
        """
        options = FaissOptions(factory, recall, text_queries, memory_bytes)
        writing.rebuild_index(self.store, self._encoder_of, options, progress=progress)
        self.refresh()
