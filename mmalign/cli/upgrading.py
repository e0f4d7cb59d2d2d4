"""`mmalign upgrade`: another encoder for an index that stays searchable."""

from __future__ import annotations

import json
import os
import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmalign.errors import InputError

from .options import PARTIAL, Device, IndexArgument, Quiet, say

if TYPE_CHECKING:
    from retrieval import IndexUpgrade, UpgradeReport

__all__ = ["upgrade"]


class _Gone(str, Enum):
    map = "map"
    drop = "drop"


# What each step takes beside what all of them do; options that would have no effect are refused.
_STEPS = {
    "measure": {"support", "sample", "order", "out", "batch_size", "workers", "seed", "dtype"},
    "finish": {"delete_old", "gone", "force"},
    "roll_back": {"force"},
    "status": set(),
    "left_out": set(),
}
_GOING_ON = {"limit", "batch_size", "workers"}
_STARTING = {"order", "seed", "force"} | _GOING_ON


def upgrade(
    context: typer.Context,
    index: IndexArgument,
    to: Annotated[
        str | None,
        typer.Option("--to", "-t", help="The new encoder, as for `mmalign index --encoder`; once begun, it is known."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Only the report: embed a sample, fit bridges, advise. Changes no search.")
    ] = False,
    support: Annotated[
        Path | None,
        typer.Option(
            help="Captions of images of the index (.jsonl, .csv, as for `mmalign eval captions`): queries in words "
            "whose answer is known. Or texts (.txt, one a line) or a folder of images, to fit bridges on.",
        ),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(min=2, help="Images to measure on. (default: 1,000 or 5 for each dimension, whichever is more)"),
    ] = None,
    order: Annotated[
        str,
        typer.Option(
            help="What is embedded first: density (what has few neighbours), random, class-mean:COLUMN (what is far "
            "from its class), access:COLUMN (what is used most); COLUMN is of your metadata. "
            "(auto: density up to 100,000 images)"
        ),
    ] = "auto",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Embed so many images and stop; run it again to go on.")
    ] = None,
    finish: Annotated[
        bool, typer.Option("--finish", help="Switch to the new encoder; the index as it was is archived inside.")
    ] = False,
    delete_old: Annotated[
        bool, typer.Option("--delete-old", help="With --finish: delete the old vectors instead. No way back.")
    ] = False,
    gone: Annotated[
        _Gone,
        typer.Option(
            help="With --finish: images that could not be embedded keep their old vectors, mapped to the new space "
            "(flag `mapped`), or are dropped from the index."
        ),
    ] = _Gone.map,
    roll_back: Annotated[
        bool, typer.Option("--roll-back", help="Undo it, at any stage: the index is as it was.")
    ] = False,
    status: Annotated[bool, typer.Option("--status", help="How far it is, and what searches do meanwhile.")] = False,
    left_out: Annotated[
        bool, typer.Option("--left-out", help="List the images that could not be embedded, and why.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Also against the advice of the report.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write report.json and report.png into this folder.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", "-e", help="The index's own encoder, where its folder has moved since.")
    ] = None,
    device: Device = None,
    dtype: Annotated[
        str, typer.Option(help="Of the new image tower: auto (measures), float32, bfloat16, float16.")
    ] = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a forward pass. (default: 32)")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Decoding threads. (default: one a core)")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample and of a random order.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found or done as one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Replace the encoder of an index while it is searched.

        mmalign upgrade photos/ --to open_clip:ViT-L-14/TAG --measure

    says what it would bring and cost. Then

        mmalign upgrade photos/ --to open_clip:ViT-L-14/TAG

    starts and embeds image after image, for as long as it takes; stop it
    with Ctrl-C, run it again to go on. Searches use both encoders on the
    way, for each kind of query in the best manner that was measured to lose
    nothing. Others may search, add and remove meanwhile. In the end

        mmalign upgrade photos/ --finish        or        --roll-back

    Exit code 4: some images could not be embedded (--left-out lists them).
    """
    from retrieval import IndexUpgrade

    steps = {"measure": measure, "finish": finish, "roll_back": roll_back, "status": status, "left_out": left_out}
    chosen = [name for name, wanted in steps.items() if wanted]
    if len(chosen) > 1:
        raise InputError(f"{_option(chosen[0])} and {_option(chosen[1])} exclude each other; give one of them")
    run = IndexUpgrade(index, to, encoder=encoder, device=device, dtype=dtype)
    embed: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": not quiet}
    stage = run.status().stage
    measuring = not chosen and (stage in ("none", "finished", "measuring") or support is not None)
    _refuse_idle(context, chosen[0] if chosen else "", stage, measuring)
    if status:
        _print_status(run, as_json)
    elif left_out:
        for entry in run.left_out():
            print(json.dumps(entry) if as_json else f"{entry['reason']}: {entry['path']}: {entry['message']}")
    elif roll_back:
        run.roll_back(force=force)
        if as_json:
            print(json.dumps(run.status().to_dict()))
        else:
            say("rolled back: the index is as it was")
    elif finish:
        before = run.status()
        archive = run.finish(gone=gone.value, keep_old=not delete_old, force=force, progress=not quiet)
        if as_json:
            print(json.dumps(run.status().to_dict()))
        else:
            _say_finished(before.new, before.left_out, archive, gone.value)
    else:
        if measure or measuring:
            if stage in ("none", "finished") and to is None:
                raise InputError("name the new encoder: mmalign upgrade INDEX --to ENCODER")
            report = run.measure(support, sample=sample, order=order, seed=seed, **embed)
            _print_report(report, as_json and measure, as_json and not measure, out)
        if not measure:
            _go_on(run, order, seed, force, limit, embed, as_json)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse_idle(context: typer.Context, step: str, stage: str, measuring: bool) -> None:
    """Refuse options that the step which is taken would not look at."""
    always = {"index", "to", "encoder", "device", "quiet", "as_json", *_STEPS}
    if step:
        able = _STEPS[step]
    elif stage == "running":
        able = _GOING_ON
    else:
        able = _STARTING | (_STEPS["measure"] if measuring else set())
    given = [
        name
        for name in context.params
        if name not in always | able and str(context.get_parameter_source(name)).endswith("COMMANDLINE")
    ]
    if given:
        what = (
            f"with {_option(step)}"
            if step
            else "once the upgrade is running"
            if stage == "running"
            else "at this stage"
        )
        raise InputError(f"{_option(given[0])} has no effect {what}; leave it out")


def _go_on(
    run: IndexUpgrade, order: str, seed: int, force: bool, limit: int | None, embed: dict[str, Any], as_json: bool
) -> None:
    if run.status().stage == "measured":
        run.start(order=order, seed=seed, force=force, progress=embed["progress"])
    run.backfill(limit=limit, **embed)
    _print_status(run, as_json)
    if run.status().left_out:
        raise typer.Exit(PARTIAL)


def _print_report(report: UpgradeReport, as_json: bool, later: bool, out: Path | None) -> None:
    """Print it, unless one JSON object is to come `later`."""
    if as_json:
        print(json.dumps(report.to_dict()))
    elif not later:
        print("\n".join(report.lines()))
    if out is not None:
        from mmalign.files import whole_file

        with whole_file(out / "report.json") as path:
            path.write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
        report.draw(out / "report.png")
        say(f"written to {out}")


def _print_status(run: IndexUpgrade, as_json: bool) -> None:
    status = run.status()
    if as_json:
        print(json.dumps(status.to_dict()))
        return
    where = shlex.quote(os.fspath(run.folder))
    if status.stage == "none":
        say("no upgrade of this index is under way")
    elif status.stage == "finished":
        say(
            f"the index is one of {status.old}; what it was before is in {status.archive}, delete that or go back with "
            f"`mmalign upgrade {where} --roll-back`"
        )
    else:
        print(f"{status.stage}: {status.old} -> {status.new}")
        print(f"{status.moved:,} of {status.images:,} images embedded, {status.left_out:,} could not be")
        for kind, mode in status.modes.items():
            found = status.checked[kind]
            old = f", {found['old'][0]:.3f} with the old encoder" if "old" in found else ""
            print(f"{kind} queries: {_MODES[mode]} (R@1 of the support set {found[mode][0]:.3f}{old})")
        if status.stage == "running" and not status.remaining:
            say(f"all done: `mmalign upgrade {where} --finish` switches, --roll-back goes back")
        elif status.stage != "running":
            say(f"`mmalign upgrade {where}` starts it, --roll-back forgets it")
        else:
            say(f"`mmalign upgrade {where}` goes on")


_MODES = {
    "old": "by the old encoder",
    "bridged": "by the new encoder, bridged to the old vectors",
    "merged": "by both kinds of vectors",
}


def _say_finished(encoder: str | None, left_out: int, archive: Path | None, gone: str) -> None:
    say(f"done: the index is one of {encoder}")
    if left_out:
        became = (
            "were dropped" if gone == "drop" else "keep mapped vectors (flag `mapped`); an update embeds what is back"
        )
        say(f"{left_out:,} images could not be embedded and {became}")
    if archive is not None:
        say(f"what it was before is in {archive}; delete that, or go back with --roll-back")
