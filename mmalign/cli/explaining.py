"""`mmalign explain` and `mmalign eval words`: which words of a caption an image contradicts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmalign.errors import InputError

from .options import PARTIAL, Device, Quiet, refuse_inputs, say

__all__ = ["eval_words", "explain"]

_SHOWN = 20

Encoder = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        "-e",
        help="A CLIP of open_clip or transformers, spec or folder; not SigLIP, CoCa or bundled. "
        "(default: open_clip:ViT-B-32-256/datacomp_s34b_b86k)",
    ),
]

Layers = Annotated[int, typer.Option(min=1, help="How many of the last text layers count.")]


def explain(
    image: Annotated[Path, typer.Argument(help="An image file.", show_default=False)],
    text: Annotated[list[str], typer.Argument(help="A caption; several are read one by one.", show_default=False)],
    encoder: Encoder = None,
    eps: Annotated[
        float | None,
        typer.Option(
            help="Words that score below are suspect; 0 or less. (default: that of --calibration, or else -5e-5, which "
            "is for LAION's ViT-H/14 alone)"
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="What `mmalign eval words --out` wrote for this encoder.")
    ] = None,
    lowest: Annotated[
        bool, typer.Option("--lowest", help="Mark the lowest word alone, as where one is known to be wrong.")
    ] = False,
    layers: Layers = 3,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw the image beside the coloured words into this .png; of a second text into NAME-2.png."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line, one for each text.")] = False,
    device: Device = None,
) -> None:
    """Mark the words of a caption that an image contradicts.

        mmalign explain cup.jpg "a cup of coke"

    A negative score means that attention to the word makes text and image
    fit less. Scores differ between encoders, so let yours be measured once
    on captions that fit:

        mmalign eval words captions.jsonl -e ENCODER --out words.json
        mmalign explain cup.jpg "a cup of coke" -e ENCODER --calibration words.json

    It is good at objects, weak at attributes, relations and counts: where
    no word is marked, the caption may still be wrong.
    """
    from mmalign.encoders import DEFAULT_SPEC, load_encoder
    from mmalign.explaining import check_picture, explain_many

    if picture is not None:
        check_picture(picture)
    pictures = [_numbered(picture, number) for number in range(1, len(text) + 1)] if picture is not None else []
    for path in pictures:
        refuse_inputs("--picture", path, [image, *([] if calibration is None else [calibration])])
    found = explain_many(
        image,
        text,
        encoder=load_encoder(encoder or DEFAULT_SPEC, device=device),
        eps=eps,
        mode="most_negative" if lowest else "threshold",
        layers=layers,
        calibration=calibration,
    )
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for one in found:
        if as_json:
            print(json.dumps({"image": os.fspath(image), **one.to_dict()}))
            continue
        print(one.marked(color=color))
        print(
            f"  cosine {one.cosine:.3f}, CLIPScore {one.clip_score:.3f}, F-CLIPScore {one.f_clip_score:.3g}, "
            + (f"suspect below {one.eps:.3g}" if one.mode == "threshold" else "lowest word")
        )
        for word in one.flagged:
            print(f"  {word.score:>10.2e}  {word.word}")
    for path, one in zip(pictures, found, strict=False):
        say(f"picture: {one.draw(path)}")
    for note in dict.fromkeys(note for one in found for note in one.notes):
        say(f"note: {note}")


def eval_words(
    data: Annotated[
        Path,
        typer.Argument(
            help="Images with captions that fit: .jsonl, .csv or .tsv with `file` and `captions`, or a folder with "
            "captions.jsonl. Lines may have `wrong_captions`, and `wrong_words`, the part of each that is wrong.",
            show_default=False,
        ),
    ],
    encoder: Encoder = None,
    flagged_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the words of captions that fit which may be marked.")
    ] = 0.05,
    layers: Layers = 3,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the calibration here (.json), for `mmalign explain`.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images, and captions, a pass. (default: 32)")] = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Calibrate an encoder's word scores; measure how well they find wrong captions.

    Finds the score below which a word is suspect, by captions that fit:

        mmalign eval words captions.jsonl -e ENCODER --out words.json
        mmalign explain photo.jpg "a caption" -e ENCODER --calibration words.json

    Where lines have wrong captions too, tells how well the cosine and
    F-CLIPScore (below the threshold, and of the lowest word) tell them
    from right ones, with chance in the same table.

    Exit code 4: some images could not be read.
    """
    from mmalign.encoders import DEFAULT_SPEC, load_encoder
    from mmalign.explaining import evaluate_words

    if out is not None and out.suffix.lower() != ".json":
        raise InputError(f"--out {str(out)!r} does not end in .json; give a name that does")
    refuse_inputs("--out", out, [*data.iterdir()] if data.is_dir() else [data])
    report = evaluate_words(
        load_encoder(encoder or DEFAULT_SPEC, device=device),
        data,
        flagged_share,
        layers=layers,
        batch_size=batch_size,
        progress=not quiet,
    )
    found = report.calibration
    if out is not None:
        say(f"calibration: {found.save(out)}")
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        print(
            f"eps {found.eps:.4g} marks {report.marked_share:.1%} of {found.words:,} words of {found.captions:,} "
            f"captions that fit, of {found.images:,} images"
        )
        for line in report.table():
            print(line)
    for one in report.left_out[:_SHOWN]:
        say(f"left out ({one['reason']}): {one['message']}")
    if report.left_out:
        say(f"note: {len(report.left_out):,} images could not be read and are left out")
        raise typer.Exit(PARTIAL)


def _numbered(path: Path, number: int) -> Path:
    return path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
