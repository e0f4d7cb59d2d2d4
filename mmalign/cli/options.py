"""What the commands share: options, exit codes, and who is spoken to where."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmalign.errors import InputError

if TYPE_CHECKING:
    from retrieval import ImageIndex

__all__ = [
    "INTERRUPTED",
    "NO_RESULT",
    "PARTIAL",
    "AdapterWeights",
    "Adapters",
    "AsJson",
    "AsNull",
    "AsPaths",
    "Count",
    "Device",
    "DrawnTogether",
    "Dtype",
    "Encoder",
    "FirstSeed",
    "GeneratorModel",
    "Grid",
    "Guidance",
    "Height",
    "IndexArgument",
    "IndexOrHere",
    "MinMatch",
    "MinScore",
    "NegativePrompt",
    "Objects",
    "Out",
    "Quiet",
    "Steps",
    "Unet",
    "Where",
    "Width",
    "end_if_left_out",
    "index_here",
    "one_output",
    "print_paths",
    "refuse_inputs",
    "say",
    "say_if_unfinished",
]

NO_RESULT, PARTIAL, INTERRUPTED = 3, 4, 130

IndexArgument = Annotated[Path, typer.Argument(help="An index, or a folder that was indexed.", show_default=False)]
IndexOrHere = Annotated[
    Path | None,
    typer.Argument(
        help="An index, or a folder that was indexed. (may be left out inside an indexed folder)", show_default=False
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. (default: the fastest present)")]
Encoder = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        "-e",
        help="The index's own encoder, where its folder has moved since. (default: the recorded one)",
    ),
]
Objects = Annotated[
    str | None,
    typer.Option(
        help="Turn attention to objects: torchvision:NAME, transformers:ORG/REPO (a detector), or a file of boxes "
        "(.json, .jsonl). Settings may follow, as in boxes.json,alpha=4,max_objects=3. Experimental.",
        show_default=False,
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
        "Repeat to narrow down. Columns: path, width, height, size (bytes), format, flags, time, id, and those of your "
        "metadata.",
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


# Of drawing.
GeneratorModel = Annotated[
    str | None,
    typer.Option(
        help="A hub id, a pipeline's folder, a .safetensors file, or tiny:sdxl (random weights, to try things "
        "out). (default: SDXL base 1.0 of stabilityai)",
    ),
]
Unet = Annotated[
    str | None, typer.Option(help="Another UNet: the export/unet folder of `mmalign train --adaptation full`.")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", help="A LoRA or soft tokens: file, folder, run or hub id; may repeat."),
]
AdapterWeights = Annotated[
    list[float] | None, typer.Option(help="How strongly to apply it; once for all or once each. (default: 1)")
]
NegativePrompt = Annotated[str | None, typer.Option(help="What to move away from.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. (default: the model's own)")]
Guidance = Annotated[float | None, typer.Option(help="How strongly to follow the prompt. (default: the model's own)")]
Height = Annotated[int | None, typer.Option(help="In pixels. (default: the model's own)")]
Width = Annotated[int | None, typer.Option(help="In pixels. (default: the model's own)")]
DrawnTogether = Annotated[int | None, typer.Option(min=1, help="Images drawn together. (default: 4)")]
FirstSeed = Annotated[
    int | None, typer.Option(min=0, help="Seed of the first image, the next ones count on. (default: random)")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


def print_paths(paths: Iterable[Path], end: str) -> None:
    """Write paths as the file system has them, bytes that are no UTF-8 included."""
    sys.stdout.flush()
    for path in paths:
        sys.stdout.buffer.write(os.fsencode(path) + end.encode())
    sys.stdout.buffer.flush()


def refuse_inputs(option: str, written: Path | None, inputs: Iterable[Path]) -> None:
    """Refuse to write over what is read."""
    if written is not None and written.resolve() in {path.resolve() for path in inputs}:
        raise InputError(f"{option} {written} is one of the inputs, which would be lost; give another name")


def say(line: str) -> None:
    """For people: standard error, so that pipes stay clean."""
    print(line, file=sys.stderr)


def index_here(problem: str = "there is no index here") -> Path:
    """The index of this folder or the nearest above; where there is none, an error that begins with `problem`."""
    from retrieval.storage import find_index_above

    folder = find_index_above()
    if folder is None:
        raise InputError(
            f'{problem}; make one with `mmalign index FOLDER` and name it first, as in `mmalign search FOLDER "words"`'
        )
    if folder.is_absolute():
        say(f"note: the index is {os.fspath(folder)!r}")
    return folder


def one_output(paths: bool, null: bool, as_json: bool) -> None:
    """Refuse two forms of output at once."""
    if as_json and (paths or null):
        raise InputError(f"--json and {'--paths' if paths else '--null'} exclude each other; give one of them")


def end_if_left_out(skipped: Sequence[Mapping[str, Any]]) -> None:
    """Say how many images could not be read, and end with the exit code for that; nothing where there are none."""
    if skipped:
        first = skipped[0]["name"]
        say(f"note: {len(skipped):,} images could not be read and are left out (first: {first!r})")
        raise typer.Exit(PARTIAL)


def say_if_unfinished(index: ImageIndex) -> None:
    """Warn that an index does not hold all images yet."""
    if (counts := index.snapshot.unfinished) is not None:
        from retrieval.remedies import index_commands

        numbers = {int(number) for number in index.manifest["unfinished"]}
        say(
            f"note: {counts[0]:,} of {counts[1]:,} images are indexed so far; run "
            f"{index_commands(index.manifest, index.folder, numbers)} to go on"
        )
