"""`mmalign score`: images by rewards."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmalign.errors import InputError

from .generating import refuse_grid
from .options import PARTIAL, Device, Grid, Quiet, refuse_inputs, say

if TYPE_CHECKING:
    from generation.rewards import ScoreTable

__all__ = ["score"]

_SHOWN = 20


def score(
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Image files, and folders of them at any depth. (default: all that --prompts names)",
            show_default=False,
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            "-r",
            help="What to score by; repeat for more columns, the first sorts. --list shows them all. "
            "(default: clipscore)",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="One prompt for all images.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A prompt for each image: .jsonl, .csv or .tsv with `file` and `caption` on each line, or a folder "
            "with captions.jsonl; of several captions the first counts. (default: that which images drawn by "
            "`mmalign generate` carry)"
        ),
    ] = None,
    top: Annotated[int | None, typer.Option("--top", "-k", min=1, help="Print, or draw, only the K best.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write all rows to this .csv, .jsonl or .parquet instead of printing them."),
    ] = None,
    grid: Grid = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line, the best first.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Only list the rewards that there are.")] = False,
    device: Device = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of image towers: bfloat16, float16, auto (the fastest here), or float32 (alike everywhere)."
        ),
    ] = "float32",
    quiet: Quiet = False,
) -> None:
    """Score images, each with its prompt; the best come first.

    Images that `mmalign generate` drew carry their prompts:

        mmalign score generated/ --reward hps-v2.1 --reward clipscore

    Others need words:

        mmalign score a.png b.png --prompt "a red bicycle in snow"
        mmalign score --prompts captions.jsonl --grid best.png --top 12

    A function of yours that takes images and prompts and gives numbers is a
    reward, too:

        mmalign score generated/ --reward my_module:my_function

    `--reward cosine:bundled` works without a network. Rewards have units of
    their own; a higher number is better. To judge a model that was trained
    on one reward, look at another.

    Exit code 4: some images could not be read, or have no prompt.
    """
    from generation.rewards.registry import REWARDS, load_rewards
    from generation.rewards.scoring import column_names, refuse_suffix, score_files

    if listed:
        width = max(len(source.usage) for source in REWARDS.values())
        for source in REWARDS.values():
            print(f"{source.usage:<{width}}  {source.summary}".rstrip())
        print(f"{'MODULE:FUNCTION':<{width}}  a function of your own, or a Reward")
        return
    if prompt is not None and prompts is not None:
        raise InputError("--prompt and --prompts exclude each other; give one of them")
    if prompt is not None and not prompt.strip():
        raise InputError("--prompt is blank; give a prompt, or leave it out")
    if out is not None:
        refuse_suffix(out)
    if grid is not None:
        refuse_grid(grid)
    captions = _captions(prompts) if prompts is not None else None
    files, problems = _files(images or [])
    if not images and captions is not None:
        files = [*captions]
    if not files and not problems:
        raise InputError("there are no images; give files or folders: mmalign score generated/")
    read = [*files, *([] if prompts is None else [*prompts.iterdir()] if prompts.is_dir() else [prompts])]
    refuse_inputs("--out", out, read)
    refuse_inputs("--grid", grid, read)
    specs = [*dict.fromkeys(reward or ["clipscore"])]
    rewards = column_names([(spec, load_rewards(spec, device=device, dtype=dtype)) for spec in specs])
    own = prompt if captions is None else [captions.get(file.resolve()) for file in files]
    table = score_files(files, rewards, own, progress=not quiet)
    table.left_out[:0] = problems
    if not table.images:
        _refuse(table)
    if out is not None:
        say(f"table: {table.save(out)}")
    if as_json:
        for row in [*table.rows()][:top]:
            print(json.dumps(row))
    elif out is None or top is not None:
        _print(table, top)
    if grid is not None:
        say(f"picture: {table.draw(grid, top or 24)}")
    means = ", ".join(f"{name} {mean:.4g}" for name, mean in table.means().items())
    say(f"{len(table.images):,} images scored; on average {means}")
    if table.left_out:
        _say_left_out(table)
        raise typer.Exit(PARTIAL)


def _captions(source: Path) -> dict[Path, str]:
    """First caption of each image by its real path."""
    from mmalign.pairs import read_captioned

    images, root = read_captioned(source)
    return {(root / image.file).resolve(): image.captions[0] for image in images if image.captions}


def _files(images: list[Path]) -> tuple[list[Path], list[tuple[Path, str, str]]]:
    """Files as named and those of folders, each once; what of the folders could not be looked at."""
    from retrieval.scan import scan

    files: list[Path] = []
    problems: list[tuple[Path, str, str]] = []
    for path in images:
        if path.is_dir():
            found = scan(path)
            files += [path / os.fsdecode(file.path) for file in found.files]
            problems += [(path / os.fsdecode(name), reason, text) for name, reason, text in found.problems]
        else:
            files.append(path)
    once: dict[Path, Path] = {}
    for path in files:
        once.setdefault(path.absolute(), path)
    return [*once.values()], problems


def _refuse(table: ScoreTable) -> None:
    """Nothing was scored: say why."""
    count = len(table.left_out)
    if all(reason == "no_prompt" for _, reason, _ in table.left_out):
        raise InputError(
            f"none of the {count:,} images has a prompt; give --prompt TEXT, or --prompts FILE with a caption for each"
        )
    _say_left_out(table)
    raise InputError(f"none of the {count:,} images could be scored; see above")


def _say_left_out(table: ScoreTable) -> None:
    seen: Counter[str] = Counter()
    for path, reason, message in table.left_out:
        seen[reason] += 1
        if seen[reason] <= _SHOWN:
            say(f"left out ({reason}): {message if repr(os.fspath(path))[1:-1] in message else f'{path}: {message}'}")
    for reason, count in seen.items():
        if count > _SHOWN:
            say(f"... and {count - _SHOWN:,} more ({reason})")


def _print(table: ScoreTable, top: int | None) -> None:
    widths = [max(len(name), 9) for name in table.rewards]
    print(
        "rank  " + "  ".join(f"{name:>{width}}" for name, width in zip(table.rewards, widths, strict=True)) + "  image"
    )
    for rank, row in enumerate(table.images[:top], 1):
        numbers = (f"{row.scores[name]:>{width}.4f}" for name, width in zip(table.rewards, widths, strict=True))
        print(f"{rank:>4}  {'  '.join(numbers)}  {row.path}")
