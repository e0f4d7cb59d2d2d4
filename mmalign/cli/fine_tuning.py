"""`mmalign train oca`: a new image encoder whose queries search the index of the old one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Quiet, end_if_left_out, say

__all__ = ["train_oca"]


def train_oca(
    data: Annotated[
        Path,
        typer.Argument(
            help="Labelled images: a folder with one subfolder a class, or a .jsonl, .csv or .tsv file with `file` and "
            "`label`, and perhaps `split` (train, test) and `group` (stays on one side).",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the encoder that is made.", show_default=False)],
    old_encoder: Annotated[
        str,
        typer.Option("--old", help="Spec or folder of the encoder whose index stays.", show_default=False),
    ],
    backbone: Annotated[
        str, typer.Option(help="A timm model, such as resnet50 or resnet18.a1_in1k.", show_default=False)
    ],
    pretrained: Annotated[
        bool,
        typer.Option(
            "--pretrained/--no-pretrained", help="Begin with its published weights; --no-pretrained: at random."
        ),
    ] = True,
    extra_dim: Annotated[int, typer.Option(help="Dimensions beside those of the old encoder.")] = 32,
    epochs: Annotated[int, typer.Option(help="Times that every image is seen.")] = 100,
    warmup_epochs: Annotated[
        int, typer.Option(help="Epochs until the full learning rate; half a cosine afterwards.")
    ] = 5,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Of Adam, highest.")] = 1e-3,
    weight_decay: Annotated[
        float, typer.Option(help="Of Adam, for all but the rotation. (default: 2^-15)", show_default=False)
    ] = 2**-15,
    label_smoothing: Annotated[float, typer.Option(help="Of both cross-entropies.")] = 0.1,
    weights: Annotated[
        tuple[float, float, float],
        typer.Option(
            metavar="CE BCT COS",
            help="Of the three losses: classes by all dimensions, classes by old means, nearness to the own mean.",
        ),
    ] = (5.0, 10.0, 5.0),
    orthogonal_map: Annotated[
        str,
        typer.Option(
            help="How the rotation is trained: cayley, householder, or matrix_exp, as published, slow beyond 512 "
            "dimensions."
        ),
    ] = "cayley",
    image_size: Annotated[
        int, typer.Option(help="Side of the square that is seen: shorter side resized, centre cut out.")
    ] = 224,
    flip: Annotated[
        bool, typer.Option("--flip/--no-flip", help="Mirror every other training image; or --no-flip.")
    ] = True,
    test: Annotated[float, typer.Option(help="Share of the images to measure on, if no line says test.")] = 0.1,
    device: Device = None,
    workers: Annotated[int | None, typer.Option(help="Decoding threads. (default: one a core)")] = None,
    seed: Annotated[int, typer.Option(help="Of split, initial weights, order and flips.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a timm backbone so that it searches an old encoder's index.

    With labelled images of yours: OCA, arXiv 2408.08793. The new encoder has
    the old one's dimensions and some more; its first ones fit the old index,
    all of them a new one. The table says, on images held out, whether new
    queries find more in the old index than old ones do.

        mmalign train oca products/ new --old old-encoder --backbone resnet50

    Without weights on this machine or a GPU, to see that it works:

        mmalign train oca products/ try --old bundled:image --no-pretrained \\
            --backbone resnet18 --epochs 2 --warmup-epochs 0 --image-size 64

    OUT is an encoder, with report.json, report.png and curves.png inside.
    Ctrl-C keeps a checkpoint in OUT.training; the same command goes on.

    Exit code 4: some images could not be read and were left out.
    """
    from mmalign.fine_tuning import fine_tune_compatible

    report = fine_tune_compatible(
        data,
        out,
        old_encoder=old_encoder,
        backbone=backbone,
        pretrained=pretrained,
        extra_dim=extra_dim,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        weights=weights,
        orthogonal_map=orthogonal_map,  # type: ignore[arg-type]
        image_size=image_size,
        flip=flip,
        test=test,
        device=device,
        workers=workers,
        seed=seed,
        progress=not quiet,
    )
    for warning in report.warnings:
        say(f"note: {warning}")
    print(json.dumps(report.to_dict()) if as_json else "\n".join(report.table()))
    say(f"the encoder is {report.folder!r}; its `compatible_rows` (Python) are queries for the old index")
    end_if_left_out(report.skipped)
