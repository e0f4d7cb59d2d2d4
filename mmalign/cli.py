"""The `mmalign` command. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from mmalign.errors import InputError, MMAlignError

if TYPE_CHECKING:
    from retrieval import Hit, ImageIndex, UpdateReport

__all__ = ["main"]

NO_RESULT, PARTIAL, INTERRUPTED = 3, 4, 130

app = typer.Typer(
    name="mmalign",
    help="Search folders of images in any words, keep them searchable as models change.",
    epilog=(
        "Start with:  mmalign index photos/   then   mmalign search photos/ 'red bicycle in snow'.  "
        "Exit codes: 0 done, 1 error, 2 wrong usage, 3 nothing found, 4 done but some files were skipped."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class _DefaultToBuild(TyperGroup):
    """`mmalign index photos/` means `mmalign index build photos/`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands:
            args = ["build", *args]
        return super().parse_args(ctx, args)


index_app = typer.Typer(cls=_DefaultToBuild, no_args_is_help=True)
app.add_typer(
    index_app, name="index", help="Index a folder of images, or bring its index up to date; merge, import, export."
)
eval_app = typer.Typer(no_args_is_help=True)
app.add_typer(eval_app, name="eval", help="Measure an index on your own captions.")

IndexArgument = Annotated[Path, typer.Argument(help="An index, or a folder that was indexed.", show_default=False)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. (default: the fastest present)")]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        "-w",
        help="Keep only images for which this holds: SQL such as \"width > 1000 AND city = 'Rome'\", or key=value. "
        "Repeat to narrow down.",
    ),
]
Count = Annotated[int, typer.Option("--count", "-k", min=1, help="How many results.")]
MinMatch = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Leave out results whose match is lower; 0.8 keeps what clearly stands out from this index. "
        "Exit code 3 says that nothing is left.",
    ),
]
AsPaths = Annotated[bool, typer.Option("--paths", "-p", help="Print paths only, one a line, for pipes.")]
AsNull = Annotated[bool, typer.Option("--null", "-0", help="As --paths, ended by NUL, for xargs -0 and odd names.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
Grid = Annotated[Path | None, typer.Option(help="Draw the results into this picture (.png, .jpg).")]


@index_app.command("build", epilog="Also: mmalign index merge | import | export, each with --help.")
def index_build(
    folder: Annotated[Path, typer.Argument(help="Images, at any depth.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Where the index goes. (default: FOLDER/.mmalign)")] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            "-e",
            help="open_clip:MODEL/TAG, transformers:ORG/REPO, timm:MODEL, a saved folder, or bundled (small, works "
            "offline). (default: open_clip:ViT-B-32-256/datacomp_s34b_b86k, or that of the index)",
        ),
    ] = None,
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
        str | None, typer.Option(help="FAISS factory string, e.g. HNSW32,SQfp16. (default: chosen by size)")
    ] = None,
    recall: Annotated[float, typer.Option(min=0.1, max=1, help="recall@10 to tune an approximate index for.")] = 0.95,
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
    follow_links: Annotated[bool, typer.Option("--follow-links", help="Enter linked folders too.")] = False,
    all_files: Annotated[bool, typer.Option("--all-files", help="Look into files without an image suffix.")] = False,
    hidden: Annotated[bool, typer.Option("--hidden", help="Also names that start with a dot.")] = False,
    allow_removals: Annotated[
        bool, typer.Option("--allow-removals", help="Drop vanished images even if they are more than a half.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Index a folder of images. Run it again to bring the index up to date: only what changed is read.

    It can be stopped at any time (Ctrl-C, kill, power): the next run goes on from the last checkpoint.
    """
    from retrieval import ImageIndex
    from retrieval.scan import parse_shard

    options: dict[str, Any] = {
        "fast_decode": fast_decode,
        "tolerate_truncation": tolerate_truncation,
        "max_pixels": max_pixels,
        "factory": factory,
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
        wanted_recall=recall,
        shard=parse_shard(shard) if shard else None,
        follow_links=follow_links,
        all_files=all_files,
        hidden=hidden,
        allow_removals=allow_removals,
        progress=not quiet,
        **{name: value for name, value in options.items() if value is not None},
    )
    _print_report(index, report)
    if report.skipped or report.withheld_removals:
        raise typer.Exit(PARTIAL)


def _print_report(index: ImageIndex, report: UpdateReport) -> None:
    counts = {
        "new": report.added, "changed": report.changed, "moved": report.moved, "copies": report.aliases,
        "removed": report.removed, "unchanged": report.unchanged,
    }  # fmt: skip
    said = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "nothing to do"
    speed = f" ({report.encoded_per_second:,.1f} images/s)" if report.encoded_per_second else ""
    _say(f"{len(index):,} images in {index.store.folder}: {said}; {report.seconds:,.1f} s{speed}")
    for entry in report.skipped[:10]:
        _say(f"  skipped ({entry['reason']}): {entry['message']}")
    if len(report.skipped) > 10:
        _say(
            f"  ... and {len(report.skipped) - 10:,} more skipped; "
            f"`mmalign info {index.store.folder} --skipped` lists them"
        )
    if report.metadata_unmatched:
        _say(f"  {report.metadata_unmatched:,} metadata rows name no indexed file")
    if report.withheld_removals:
        _say(
            f"  {report.withheld_removals:,} images are gone from the folder but were kept: more than a half vanished "
            "at once, so a disk may be missing. If they are gone for good, run again with --allow-removals"
        )
    faiss, measured = index.manifest["faiss"], index.manifest["measured"]
    if faiss is not None and faiss["factory"] != "SQfp16":
        _say(
            f"  FAISS {faiss['factory']}: recall@10 {measured['recall@10']:.3f}, "
            f"measured with {measured['kind']} queries"
        )
    if index.manifest["encoder"]["spec"] == "bundled":
        from mmalign.encoders.bundled import LIMITS

        _say(f"  note: {LIMITS}")


@index_app.command("merge")
def index_merge(
    out: Annotated[Path, typer.Argument(help="The new index.", show_default=False)],
    parts: Annotated[list[Path], typer.Argument(help="Indexes made with the same encoder.", show_default=False)],
    factory: Annotated[str | None, typer.Option(help="FAISS factory string. (default: chosen by size)")] = None,
) -> None:
    """Join indexes made with --shard, or any made with the same encoder, into a new one."""
    from retrieval import merge_indexes

    index = merge_indexes(out, parts, factory=factory, progress=True)
    _say(f"{len(index):,} images in {index.store.folder}")


@index_app.command("import")
def index_import(
    folder: Annotated[Path, typer.Argument(help="Output of clip-retrieval inference.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The new index.", show_default=False)],
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder", "-e", help="The model it was made with; without it only vectors can be searched for."
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Take over a clip-retrieval collection (npy shards and Parquet) without embedding it again."""
    from mmalign.encoders import load_encoder
    from retrieval import import_clip_retrieval

    loaded = load_encoder(encoder, device=device) if encoder else None
    index = import_clip_retrieval(folder, out, encoder=loaded, progress=True)
    _say(f"{len(index):,} images in {index.store.folder}")


@index_app.command("export")
def index_export(
    index: IndexArgument,
    folder: Annotated[Path, typer.Argument(help="Where to write.", show_default=False)],
) -> None:
    """Write vectors and metadata in clip-retrieval's layout (npy shards and Parquet)."""
    from retrieval import ImageIndex, export_clip_retrieval

    _say(f"written to {export_clip_retrieval(ImageIndex.open(index), folder, progress=True)}")


@app.command()
def search(
    terms: Annotated[
        list[str],
        typer.Argument(
            help="The index (may be left out inside an indexed folder), then words or image files. Several terms are "
            "added up; a weight goes in front, as in 2:red. text: or image: in front says which is meant.",
            show_default=False,
        ),
    ],
    minus: Annotated[
        list[str] | None, typer.Option("--minus", "-m", help="Words or an image to move away from; may repeat.")
    ] = None,
    count: Count = 10,
    where: Where = None,
    min_match: MinMatch = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every vector instead of asking FAISS.")] = False,
    paths: AsPaths = False,
    null: AsNull = False,
    as_json: AsJson = False,
    grid: Grid = None,
    device: Device = None,
) -> None:
    """Find images by words, by an image, or by several of both.

    [bold]mmalign search photos/ "red bicycle in snow"[/bold]
    [bold]mmalign search photos/ beach.jpg "at night" --minus people[/bold]
    [bold]mmalign search photos/ "2:a dog" "1:on the beach" --where "width > 1000" --grid hits.png[/bold]
    """
    from retrieval.query import parse_term

    index, words = _index_and_terms(terms, device)
    query = [parse_term(word) for word in words] + [parse_term(word, -1.0) for word in minus or []]
    hits = index.search(query, count, where=where, min_match=min_match, exact=exact)
    title = " + ".join(words) + "".join(f" - {word}" for word in minus or [])
    _print_hits(title, hits, paths, null, as_json, grid)


def _index_and_terms(terms: list[str], device: str | None) -> tuple[ImageIndex, list[str]]:
    """The first term may name the index; otherwise it is looked for here."""
    from retrieval import ImageIndex
    from retrieval.index import find_index

    try:
        folder, words = find_index(terms[0]), terms[1:]
    except InputError:
        try:
            folder, words = find_index("."), terms
        except InputError:
            raise InputError(
                f"{terms[0]!r} is not an index and there is none here; make one with `mmalign index FOLDER` and name "
                'it first: mmalign search FOLDER "words"'
            ) from None
    if not words:
        raise InputError('what to look for is missing; give words or an image: mmalign search INDEX "a red bicycle"')
    return ImageIndex.open(folder, device=device), words


@app.command()
def similar(
    index: IndexArgument,
    image: Annotated[
        str, typer.Argument(help="An image file, indexed or not, or the id of an item.", show_default=False)
    ],
    count: Count = 10,
    where: Where = None,
    min_match: MinMatch = None,
    paths: AsPaths = False,
    null: AsNull = False,
    as_json: AsJson = False,
    grid: Grid = None,
    device: Device = None,
) -> None:
    """Find the images most like one."""
    from retrieval import ImageIndex

    opened = ImageIndex.open(index, device=device)
    wanted = int(image) if image.isdigit() and not Path(image).exists() else image
    hits = opened.similar(wanted, count, where=where, min_match=min_match)
    _print_hits(f"like {image}", hits, paths, null, as_json, grid)


@app.command()
def duplicates(
    index: IndexArgument,
    near: Annotated[
        float | None,
        typer.Option(
            min=-1,
            max=1,
            help="Also group different files from this cosine on, e.g. 0.98. (default: files of equal content only)",
        ),
    ] = None,
    paths: AsPaths = False,
    as_json: AsJson = False,
) -> None:
    """List images that are the same: groups of equal files, and with --near of nearly equal pictures.

    With --paths all but the first of each group are printed.
    """
    from retrieval import ImageIndex

    groups = ImageIndex.open(index).duplicates(near)
    for number, group in enumerate(groups, 1):
        if as_json:
            print(json.dumps({"group": number, "paths": [os.fspath(item.path) for item in group]}))
        elif paths:
            _print_paths((item.path for item in group[1:]), "\n")
        else:
            print(f"{number}  {len(group)} images")
            for item in group:
                print(f"   {item.name}  {item.width}x{item.height}  {item.size:,} bytes")
    if not groups:
        _say("no duplicates")
        raise typer.Exit(NO_RESULT)


@app.command()
def info(
    index: IndexArgument,
    skipped: Annotated[bool, typer.Option("--skipped", help="List the files that could not be read.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what an index holds and how it was made."""
    from retrieval import ImageIndex

    opened = ImageIndex.open(index)
    if skipped:
        for entry in opened.skipped():
            print(json.dumps(entry) if as_json else f"{entry['reason']}: {entry['message']}")
        return
    about = opened.info()
    if as_json:
        print(json.dumps(about))
        return
    encoder, faiss, measured = about["encoder"], about["faiss"], about["measured"]
    lines = {
        "index": about["folder"],
        "folders": ", ".join(about["roots"]) or "-",
        "images": f"{about['images']:,} ({about['distinct']:,} distinct, {about['skipped']:,} skipped)",
        "encoder": f"{encoder['spec']}  {encoder['dim']} dimensions, {encoder.get('dtype', '-')}, "
        f"fingerprint {str(encoder.get('fingerprint'))[:12]}",
        "faiss": f"{faiss['factory']} over {faiss['rows']:,} vectors, {faiss['parameters'] or 'no parameters'}, "
        f"{faiss['candidates']} candidates a result"
        if faiss
        else "-",
        "recall@10": f"{measured['recall@10']} {measured['interval95']} on {measured['queries']} "
        f"{measured['kind']} queries"
        if measured
        else "-",
        "metadata": ", ".join(about["metadata_columns"]) or "-",
        "size": f"{about['bytes'] / 1e6:,.1f} MB",
        "written": f"{about['written']}, generation {about['generation']}, format {about['format']}",
    }
    for name, text in lines.items():
        print(f"{name:<10} {text}")


@app.command()
def verify(
    index: IndexArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Rebuild what can be derived from the stored vectors.")
    ] = False,
) -> None:
    """Check every file of an index against its checksum; name what is damaged and the remedy."""
    from retrieval.repair import diagnose
    from retrieval.repair import repair as repair_index

    if repair:
        for line in repair_index(index):
            _say(line)
    problems = diagnose(index)
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(1)
    _say("all files are as they were written")


@app.command()
def encoders(
    source: Annotated[str | None, typer.Argument(help="open_clip, timm or transformers: list its models.")] = None,
    only_cached: Annotated[bool, typer.Option("--cached", help="Only what can be loaded without a network.")] = False,
) -> None:
    """List what can be loaded, and what of it is on this machine."""
    from mmalign.encoders.catalogue import entries, overview

    for line in overview() if source is None else entries(source, only_cached=only_cached):
        print(line)


@eval_app.command("retrieval")
def eval_retrieval(
    index: IndexArgument,
    captions: Annotated[
        Path, typer.Option(help="JSON lines with `file` and `captions` (or `caption`).", show_default=False)
    ],
    as_json: AsJson = False,
    device: Device = None,
) -> None:
    """Measure text-to-image and image-to-text retrieval on your own captions."""
    from retrieval import ImageIndex
    from retrieval.evaluate import evaluate_captions, read_captions

    pairs = read_captions(captions)
    result = evaluate_captions(ImageIndex.open(index, device=device), pairs, progress=not as_json)
    if as_json:
        print(json.dumps(result))
        return
    print(
        f"{result['captions']:,} captions of {result['images']:,} images, chance "
        + ", ".join(f"{name} {value:.3f}" for name, value in result["chance"].items())
    )
    for direction in ("text_to_image", "image_to_text"):
        figures = result[direction]
        hits = "  ".join(
            f"{name} {figures[name]:.3f} [{figures[name + '_low']:.3f}, {figures[name + '_high']:.3f}]"
            for name in result["chance"]
        )
        print(f"{direction:<14} {hits}  median rank {figures['medr']:g}")
    print(
        f"{'through index':<14} " + "  ".join(f"{name} {value:.3f}" for name, value in result["through_index"].items())
    )
    if result["unmatched"]:
        _say(f"{len(result['unmatched'])} captioned files are not in the index (first: {result['unmatched'][0]!r})")


def _print_hits(title: str, hits: list[Hit], paths: bool, null: bool, as_json: bool, grid: Path | None) -> None:
    if grid is not None:
        from retrieval import draw_grid

        _say(f"picture: {draw_grid([(title, hits)], grid)}")
    if as_json:
        for hit in hits:
            print(json.dumps(hit.to_dict()))
    elif paths or null:
        _print_paths((hit.path for hit in hits), "\0" if null else "\n")
    elif hits:
        print("rank  match  cosine  image")
        for hit in hits:
            match = "  -  " if hit.match is None else f"{hit.match:5.2f}"
            copies = f"  (+{len(hit.aliases)} copies)" if hit.aliases else ""
            print(f"{hit.rank:>4}  {match}  {hit.score:6.3f}  {hit.item.name}{copies}")
    if not hits:
        _say("nothing here matches")
        raise typer.Exit(NO_RESULT)


def _print_paths(paths: Iterable[Path], end: str) -> None:
    sys.stdout.flush()
    for path in paths:
        sys.stdout.buffer.write(os.fsencode(path) + end.encode())
    sys.stdout.buffer.flush()


def _say(line: str) -> None:
    """For people: standard error, so that pipes stay clean."""
    print(line, file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        from mmalign import __version__

        print(f"mmalign {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; errors of ours become one line and exit code 1."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        app()
    except MMAlignError as error:
        _say(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        _say("stopped; what was done is kept, run the same command again to go on")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
