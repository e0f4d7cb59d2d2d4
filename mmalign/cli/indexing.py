"""`mmalign index`: build and update, merge, import, export."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .options import PARTIAL, Device, IndexArgument, Objects, Out, Quiet, say

if TYPE_CHECKING:
    from retrieval import ImageIndex, UpdateReport

__all__ = ["index_app"]


class _DefaultToBuild(TyperGroup):
    """`mmalign index photos/` means `mmalign index build photos/`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands:
            args = ["build", *args]
        return super().parse_args(ctx, args)


index_app = typer.Typer(cls=_DefaultToBuild, no_args_is_help=True)


@index_app.command("build", epilog="Also: mmalign index merge | import | export, each with --help.")
def index_build(
    folder: Annotated[Path, typer.Argument(help="Images, at any depth.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the index goes. (default: FOLDER/.mmalign)")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            "-e",
            help="open_clip:MODEL/TAG, transformers:ORG/REPO, timm:MODEL, a saved folder, or bundled (small, works "
            "offline). (default: open_clip:ViT-B-32-256/datacomp_s34b_b86k, or that of the index)",
        ),
    ] = None,
    objects: Objects = None,
    device: Device = None,
    dtype: Annotated[
        str, typer.Option(help="auto (measures whether bfloat16 is faster here), float32, bfloat16, float16.")
    ] = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a forward pass. (default: 32)")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Decoding threads. (default: one a core)")] = None,
    metadata: Annotated[
        Path | None,
        typer.Option(
            help="CSV, JSONL or Parquet with a column file_name and any others, for --where. "
            "(default: metadata.csv/.jsonl/.parquet in FOLDER)"
        ),
    ] = None,
    factory: Annotated[
        str | None, typer.Option(help="FAISS factory string, e.g. HNSW32,SQfp16; auto goes back to the choice by size.")
    ] = None,
    recall: Annotated[
        float | None, typer.Option(min=0.1, max=1, help="recall@10 to tune an approximate index for. (default: 0.95)")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="I/N indexes the I-th of N parts, for N machines; join with `index merge`.")
    ] = None,
    fast_decode: Annotated[
        bool | None,
        typer.Option("--fast-decode/--exact-decode", help="Decode large JPEGs at reduced size: faster, nearly equal."),
    ] = None,
    tolerate_truncation: Annotated[
        bool | None, typer.Option("--tolerate-truncation/--no-truncated", help="Keep images whose end is missing.")
    ] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Refuse larger images. (default: 178,956,970)")] = None,
    follow_links: Annotated[
        bool | None, typer.Option("--follow-links/--no-follow-links", help="Enter linked folders too. (default: no)")
    ] = None,
    all_files: Annotated[
        bool | None,
        typer.Option("--all-files/--image-suffixes", help="Look into files of any name. (default: image suffixes)"),
    ] = None,
    hidden: Annotated[
        bool | None, typer.Option("--hidden/--no-hidden", help="Also names that start with a dot. (default: no)")
    ] = None,
    allow_removals: Annotated[
        bool, typer.Option("--allow-removals", help="Drop vanished images even if they are more than a half.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Index a folder of images. Run it again to bring the index up to date: only what changed is read.

    How files are chosen and decoded, and how FAISS is made, stays as it was unless said otherwise.

    It can be stopped at any time (Ctrl-C, kill, power): the next run goes on from the last checkpoint.
    """
    from retrieval import ImageIndex
    from retrieval.scan import parse_shard
    from retrieval.storage import DEFAULT_FOLDER, Store

    store = Store(folder / DEFAULT_FOLDER if out is None else out)
    is_new = not store.exists()
    known: set[bytes] = set()
    if objects is not None:
        encoder = _with_objects(objects, encoder, None if is_new else store.read_manifest()["encoder"]["spec"])
    with_objects = encoder is not None and encoder.startswith("objects:")
    if with_objects and not is_new:
        known = _contents(ImageIndex.open(store.folder))
    options: dict[str, Any] = {
        "fast_decode": fast_decode,
        "tolerate_truncation": tolerate_truncation,
        "max_pixels": max_pixels,
        "factory": factory,
        "recall": recall,
        "follow_links": follow_links,
        "all_files": all_files,
        "hidden": hidden,
        "shard": parse_shard(shard) if shard else None,
    }
    index, report = ImageIndex.build(
        folder,
        out,
        encoder=encoder,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        workers=workers,
        metadata=metadata,
        allow_removals=allow_removals,
        progress=not quiet,
        **{name: value for name, value in options.items() if value is not None},
    )
    if as_json:
        print(json.dumps({"index": os.fspath(index.folder), "images": len(index), **report.to_dict()}))
    else:
        _print_report(index, report, is_new)
    _say_what_boxes_miss(index, known, given=with_objects)
    if report.newly_skipped or report.withheld_removals:
        raise typer.Exit(PARTIAL)


def _with_objects(objects: str, encoder: str | None, recorded: str | None) -> str:
    """The spec of an encoder that follows objects: of the one that is given, the index's own, or the default."""
    from mmalign.encoders import DEFAULT_SPEC
    from mmalign.object_aware.specs import ObjectsSpec

    if encoder is None and recorded is not None:
        encoder = recorded.partition("|")[2] if recorded.startswith("objects:") else recorded
    return f"objects:{ObjectsSpec.parse(objects)}|{encoder or DEFAULT_SPEC}"


def _contents(index: ImageIndex) -> set[bytes]:
    """SHA-256 of the images."""
    return set(index.items.table.column("sha256").to_pylist())


def _say_what_boxes_miss(index: ImageIndex, known: set[bytes], *, given: bool) -> None:
    """Names without an image, and how many are of images `known` before; where boxes were read, or given."""
    spec, encoder = index.manifest["encoder"]["spec"], index.loaded_encoder
    if spec is None or not spec.startswith("objects:") or (encoder is None and not given):
        return
    from mmalign.object_aware.boxes import BoxesFile
    from mmalign.object_aware.specs import ObjectsSpec

    objects = ObjectsSpec.parse(spec.removeprefix("objects:").partition("|")[0])
    boxes = getattr(encoder, "detector", None) or (objects.load() if objects.of_file else None)
    if not isinstance(boxes, BoxesFile):
        return
    if missing := boxes.note_of_missing():
        say(f"  note: {missing}")
    old = sum(content.hex() in boxes for content in known & _contents(index)) if known else 0
    if old:
        say(
            f"  note: {old:,} of the images that {boxes.spec!r} names were indexed before and keep the vectors of "
            "their old boxes; to use new boxes for images that are indexed already, index them anew into another --out"
        )


def _print_report(index: ImageIndex, report: UpdateReport, is_new: bool) -> None:
    counts = {
        "new": report.added, "changed": report.changed, "moved": report.moved, "copies": report.aliases,
        "removed": report.removed, "unchanged": report.unchanged,
    }  # fmt: skip
    said = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "nothing to do"
    speed = f" ({report.encoded_per_second:,.1f} images/s)" if report.encoded_per_second else ""
    say(f"{len(index):,} images in {index.folder}: {said}; {report.seconds:,.1f} s{speed}")
    for entry in report.newly_skipped[:10]:
        say(f"  skipped ({entry['reason']}): {entry['message']}")
    listing = f"`mmalign info {shlex.quote(os.fspath(index.folder))} --skipped` lists them"
    if len(report.newly_skipped) > 10:
        say(f"  ... and {len(report.newly_skipped) - 10:,} more skipped; {listing}")
    if before := len(report.skipped) - len(report.newly_skipped):
        say(f"  {before:,} skipped as before; {listing}")
    if report.metadata_unmatched:
        say(f"  {report.metadata_unmatched:,} metadata rows name no indexed file")
    if report.withheld_removals:
        say(
            f"  {report.withheld_removals:,} images are gone from the folder but were kept: more than a half vanished "
            "at once, so a disk may be missing. If they are gone for good, run again with --allow-removals"
        )
    faiss, measured = index.manifest["faiss"], index.manifest["measured"]
    if faiss is not None and faiss["factory"] != "SQfp16":
        say(
            f"  FAISS {faiss['factory']}: recall@10 {measured['recall@10']:.3f}, "
            f"measured with {measured['kind']} queries"
        )
    if is_new and index.manifest["encoder"]["spec"] == "bundled":
        from mmalign.encoders.bundled import LIMITS

        say(f"  note: {LIMITS}")


@index_app.command("merge")
def index_merge(
    parts: Annotated[list[Path], typer.Argument(help="Indexes made with the same encoder.", show_default=False)],
    out: Out,
    factory: Annotated[str | None, typer.Option(help="FAISS factory string. (default: chosen by size)")] = None,
    quiet: Quiet = False,
) -> None:
    """Join indexes made with --shard, or any made with the same encoder, into a new one."""
    from retrieval import merge_indexes

    index = merge_indexes(parts, out, factory=factory, progress=not quiet)
    say(f"{len(index):,} images in {index.folder}")


@index_app.command("import")
def index_import(
    folder: Annotated[Path, typer.Argument(help="Output of clip-retrieval inference.", show_default=False)],
    out: Out,
    factory: Annotated[str | None, typer.Option(help="FAISS factory string. (default: chosen by size)")] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder", "-e", help="The model it was made with; without it only vectors can be searched for."
        ),
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Take over a clip-retrieval collection (npy shards and Parquet) without embedding it again."""
    from retrieval import import_clip_retrieval

    index = import_clip_retrieval(folder, out, factory=factory, encoder=encoder, device=device, progress=not quiet)
    say(f"{len(index):,} images in {index.folder}")


@index_app.command("export")
def index_export(index: IndexArgument, out: Out, quiet: Quiet = False) -> None:
    """Write vectors and metadata in clip-retrieval's layout (npy shards and Parquet)."""
    from retrieval import ImageIndex, export_clip_retrieval

    say(f"written to {export_clip_retrieval(ImageIndex.open(index), out, progress=not quiet)}")
