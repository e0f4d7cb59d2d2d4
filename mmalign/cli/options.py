"""What the commands share: options, exit codes, and who is spoken to where."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "INTERRUPTED",
    "NO_RESULT",
    "PARTIAL",
    "AsJson",
    "AsNull",
    "AsPaths",
    "Count",
    "Device",
    "Encoder",
    "Grid",
    "IndexArgument",
    "MinMatch",
    "MinScore",
    "Out",
    "Quiet",
    "Where",
    "print_paths",
    "say",
]

NO_RESULT, PARTIAL, INTERRUPTED = 3, 4, 130

IndexArgument = Annotated[Path, typer.Argument(help="An index, or a folder that was indexed.", show_default=False)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. (default: the fastest present)")]
Encoder = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        "-e",
        help="The index's own encoder, where its folder has moved since. (default: the recorded one)",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="A new folder.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
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
MinScore = Annotated[
    float | None, typer.Option(min=-1, max=1, help="Leave out results whose cosine is lower.", show_default=False)
]
AsPaths = Annotated[bool, typer.Option("--paths", "-p", help="Print paths only, one a line, for pipes.")]
AsNull = Annotated[bool, typer.Option("--null", "-0", help="As --paths, ended by NUL, for xargs -0 and odd names.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
Grid = Annotated[Path | None, typer.Option(help="Draw the results into this picture (.png, .jpg).")]


def print_paths(paths: Iterable[Path], end: str) -> None:
    """Write paths as the file system has them, bytes that are no UTF-8 included."""
    sys.stdout.flush()
    for path in paths:
        sys.stdout.buffer.write(os.fsencode(path) + end.encode())
    sys.stdout.buffer.flush()


def say(line: str) -> None:
    """For people: standard error, so that pipes stay clean."""
    print(line, file=sys.stderr)
