"""`mmalign info`, `verify`, `encoders` and `eval`: what there is and how good it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    NO_RESULT,
    AsJson,
    Device,
    Encoder,
    IndexArgument,
    IndexOrHere,
    Quiet,
    index_here,
    say,
    say_if_unfinished,
)

__all__ = ["encoders", "eval_app", "info", "verify"]


def info(
    index: IndexOrHere = None,
    skipped: Annotated[bool, typer.Option("--skipped", help="List the files that could not be read.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what an index holds and how it was made."""
    from retrieval import ImageIndex

    opened = ImageIndex.open(index or index_here())
    say_if_unfinished(opened)
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
        "encoder": f"{encoder['spec'] or 'not recorded'}  {encoder['dim']} dimensions, {encoder['dtype'] or '-'}, "
        f"fingerprint {(encoder['fingerprint'] or '-')[:12]}",
        "faiss": f"{faiss['factory']} over {faiss['rows']:,} vectors, {faiss['parameters'] or 'no parameters'}, "
        f"{faiss['candidates']} candidates a result"
        if faiss
        else "-",
        "recall@10": f"{measured['recall@10']} {measured['interval95']} on {measured['queries']} "
        f"{measured['kind']} queries"
        if measured
        else "-",
        "upgrade": _upgrade_line(about["upgrade"]),
        "metadata": ", ".join(about["metadata_columns"]) or "-",
        "size": f"{about['bytes'] / 1e6:,.1f} MB",
        "written": f"{about['written']}, generation {about['generation']}, format {about['format']}",
    }
    for name, text in lines.items():
        if text:
            print(f"{name:<10} {text}")


def _upgrade_line(about: dict[str, Any] | None) -> str:
    if about is None:
        return ""
    modes = ", ".join(f"{kind} queries {mode}" for kind, mode in about["modes"].items())
    if about["stage"] == "finished":
        return f"finished; the index before it is in {about['archive']}"
    moved = f"{about['moved']:,} of {about['images']:,} images embedded"
    return f"{about['stage']}: to {about['new']}, {moved}" + (f" ({modes})" if modes else "")


def verify(
    index: IndexOrHere = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Rebuild what can be derived from the stored vectors.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Check every file of an index against its checksum; name what is damaged and the remedy."""
    from retrieval import diagnose
    from retrieval import repair as repair_index

    folder = index or index_here()
    done = repair_index(folder, progress=not quiet) if repair else []
    # A repair has compared every file with its checksum.
    problems = diagnose(folder, contents=not repair, progress=not quiet)
    if as_json:
        print(json.dumps({"repaired": done, "problems": [problem.to_dict() for problem in problems]}))
    else:
        for line in done:
            say(line)
        for problem in problems:
            print(problem)
    if problems:
        raise typer.Exit(1)
    if not as_json:
        say("all files are as they were written")


def encoders(
    source: Annotated[str | None, typer.Argument(help="open_clip, timm or transformers: list its models.")] = None,
    only_cached: Annotated[bool, typer.Option("--cached", help="Only what can be loaded without a network.")] = False,
) -> None:
    """List what can be loaded, and what of it is on this machine."""
    from mmalign.encoders.catalogue import entries, overview

    lines = list(overview() if source is None else entries(source, only_cached=only_cached))
    for line in lines:
        print(line)
    if not lines:
        say(f"no model of {source} is cached here")
        raise typer.Exit(NO_RESULT)


eval_app = typer.Typer(no_args_is_help=True)


@eval_app.command("retrieval")
def eval_retrieval(
    index: IndexArgument,
    captions: Annotated[
        Path, typer.Option(help="JSON lines with `file` and `captions` (or `caption`).", show_default=False)
    ],
    encoder: Encoder = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling behind the intervals.")] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure text-to-image and image-to-text retrieval on your own captions."""
    from retrieval import ImageIndex, evaluate_captions, read_captions

    pairs = read_captions(captions)
    opened = ImageIndex.open(index, encoder=encoder, device=device)
    result = evaluate_captions(opened, pairs, seed=seed, progress=not quiet)
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
        say(f"{len(result['unmatched'])} captioned files are not in the index (first: {result['unmatched'][0]!r})")
