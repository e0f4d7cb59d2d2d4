"""`mmalign align --method kernel`: the image tower of a CLIP towards a vision-only teacher."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mmalign.errors import InputError

from .aligning import given_of, named_options
from .options import end_if_left_out, say

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["align_kernel"]

_OF_OTHERS = (
    "text_encoder", "image_features", "text_features", "owner", "layers", "layer_score", "pooling", "against", "head",
    "dim", "structure", "temperature", "validation", "duplicates", "sample", "templates", "dtype",
)  # fmt: skip


def align_kernel(
    context: typer.Context,
    data: Path | None,
    out: Path,
    student: str | None,
    teacher: str | None,
    options: Sequence[str],
    *,
    as_json: bool,
    quiet: bool,
    **own: Any,
) -> None:
    """What `mmalign align` does for this method; `own` are options with a name of their own."""
    from typing import Literal, get_type_hints

    from mmalign.fine_tuning import align_to_teacher
    from mmalign.fine_tuning.kernel.recipe import Recipe

    if others := given_of(context, _OF_OTHERS):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise InputError(f"{names}: of no effect with --method kernel, which takes images and one encoder; leave out")
    if data is None or student is None:
        raise InputError("give DATA (a folder of images) and --image-encoder, whose image tower is to be trained")
    given = {name: value for name, value in own.items() if value is not None}
    if teacher is not None:
        given["teacher"] = teacher
    types = {**get_type_hints(Recipe), "teacher_size": int | None, "teacher_view": Literal["own", "student"]}
    named = named_options("kernel", types, list(options), given)
    report = align_to_teacher(data, out, student=student, progress=not quiet, **named)
    if int(os.environ.get("RANK", "0")):  # one of several processes speaks
        return
    for warning in report.warnings:
        say(f"note: {warning}")
    print(json.dumps(report.to_dict()) if as_json else "\n".join(report.table()))
    say(f"the encoder is {report.folder!r}; index with `mmalign index FOLDER --encoder {report.folder}`")
    end_if_left_out(report.skipped)
