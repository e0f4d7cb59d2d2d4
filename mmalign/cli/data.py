"""`mmalign data`: training data looked through before anything is trained on them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from generation.data.rows import MAX_PIXELS, MIN_SIDE

from .options import PARTIAL, Device, say

if TYPE_CHECKING:
    from generation.data import Problem

__all__ = ["data_app"]

_SHOWN = 20

data_app = typer.Typer(no_args_is_help=True)


class _Kind(str, Enum):
    auto = "auto"
    pairs = "pairs"
    images = "images"


@data_app.callback()
def _data() -> None:
    pass


@data_app.command("check")
def data_check(
    data: Annotated[
        str,
        typer.Argument(
            help="Parquet files, webdataset tars, a folder with metadata.jsonl, with winner/ and loser/, or of "
            "save_to_disk, or datasets:NAME.",
            show_default=False,
        ),
    ],
    split: Annotated[
        str | None,
        typer.Option(help="Of datasets:NAME or save_to_disk (default: train), or of a folder of Parquet files."),
    ] = None,
    kind: Annotated[
        _Kind, typer.Option(help="Preference pairs, single captioned images, or what the data are.")
    ] = _Kind.auto,
    max_pixels: Annotated[int, typer.Option(min=1, help="Leave out images of more pixels.")] = MAX_PIXELS,
    min_side: Annotated[int, typer.Option(min=1, help="Leave out images with a shorter side, in pixels.")] = MIN_SIDE,
    workers: Annotated[int | None, typer.Option(min=1, help="Decoding threads. (default: one a core)")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write all problems to this file, one JSON object a line.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse data with rows that cannot be used: exit code 1.")
    ] = False,
    filter_encoder: Annotated[
        str | None, typer.Option(help="Score rows by the cosine of caption and image in this encoder (a spec).")
    ] = None,
    min_score: Annotated[float | None, typer.Option(help="Leave out rows whose winner scores less.")] = None,
    min_margin: Annotated[
        float | None, typer.Option(help="Leave out pairs whose winner scores less than this above the loser.")
    ] = None,
    device: Device = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Decode every image, look at every caption and label, and list by name what cannot be trained on.

    A line of metadata.jsonl has a caption and the image files: winner and loser;
    or jpg_0, jpg_1 and label_0 (1: image 0 is preferred, 0: image 1, 0.5: a tie);
    or file_name, for one image. The caption of winner/a.png is in winner/a.txt.

    Exit codes: 0 all rows are usable, 4 some are left out, 1 none is usable,
    or some are left out and --strict.
    """
    from generation.data import NothingUsableError, check_data
    from generation.rewards import CosineReward

    reward = None
    if filter_encoder is not None:
        from mmalign.encoders import load_encoder

        reward = CosineReward(load_encoder(filter_encoder, device=device))
    refused = None
    try:
        checked = check_data(
            data,
            split=split,
            kind=kind.value,
            max_pixels=max_pixels,
            min_side=min_side,
            reward=reward,
            min_score=min_score,
            min_margin=min_margin,
            workers=workers,
            progress=not quiet,
        )
    except NothingUsableError as error:
        checked, refused = error.checked, error
    if out is not None:
        from generation.data.memory import write_json_lines

        write_json_lines(out, map(asdict, checked.problems))
    summary = checked.to_dict()
    if as_json:
        print(json.dumps({**summary, "problems": [asdict(problem) for problem in _first_of_each(checked.problems)]}))
    else:
        _print(summary, checked.problems, out)
    sys.stdout.flush()  # before what standard error says of it
    if refused is not None:
        raise refused
    if checked.left_out:
        if strict:
            rows = "1 row" if checked.left_out == 1 else f"{checked.left_out:,} rows"
            say(f"error: {rows} cannot be used, and --strict is set")
            raise typer.Exit(1)
        raise typer.Exit(PARTIAL)


def _print(summary: dict[str, Any], problems: list[Problem], out: Path | None) -> None:
    sizes = [f"{size} ({count:,})" for size, count in summary["sizes"].items()]
    lines = {
        "source": f"{summary['source']} ({summary['kind']})",
        "rows": f"{summary['rows']:,}: {summary['usable']:,} usable, {summary['left_out']:,} left out",
        "captions": f"{summary['captions']:,} distinct",
        "images": f"{summary['images']:,} distinct",
        "sizes": ", ".join(sizes[:8]) + (f", and {len(sizes) - 8:,} more" if len(sizes) > 8 else "") or "-",
        "left out": ", ".join(f"{count:,} {reason}" for reason, count in summary["reasons"].items()) or "-",
        "notes": ", ".join(f"{count:,} {reason}" for reason, count in summary["notes"].items()) or "-",
        "fingerprint": summary["fingerprint"][:12] if summary["usable"] else "-",
    }
    for name, text in lines.items():
        print(f"{name:<11} {text}")
    shown = _first_of_each(problems)
    for problem in shown:
        name = problem.name if problem.name.isprintable() else repr(problem.name)
        print(f"{'left out' if problem.fatal else 'note'} ({problem.reason}): {name}: {problem.message}")
    if len(shown) < len(problems):
        where = f"all are in {out}" if out else "--out FILE.jsonl writes them all"
        print(f"... and {len(problems) - len(shown):,} more; {where}")


def _first_of_each(problems: list[Problem]) -> list[Problem]:
    """The first few of each reason: what leaves rows out before notes."""
    seen: Counter[str] = Counter()
    shown = []
    for problem in sorted(problems, key=lambda problem: not problem.fatal):
        seen[problem.reason] += 1
        if seen[problem.reason] <= _SHOWN:
            shown.append(problem)
    return shown
