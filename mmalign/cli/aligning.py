"""`mmalign align` and the parts of `mmalign eval` that need no index."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from mmalign.errors import InputError, reason_of

from .options import PARTIAL, Device, Quiet, end_if_left_out, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from mmalign.alignment import AlignmentRun

__all__ = ["align", "eval_captions", "eval_zero_shot", "given_of", "named_options"]

_Method = Enum(  # type: ignore[misc]
    "_Method", {name: name for name in (
        "structure", "clip", "siglip", "ape", "ridge", "cca", "procrustes", "asif", "kernel"
    )},
    type=str,
)  # fmt: skip


BatchSize = Annotated[int | None, typer.Option(min=1, help="Items a forward pass. (default: 32)")]
Workers = Annotated[int | None, typer.Option(min=1, help="Decoding threads. (default: one a core)")]
Templates = Annotated[
    str, typer.Option(help="Texts for class names: simple (7), imagenet (80), or a file with one text with {} a line.")
]


ReportFolder = Annotated[
    Path | None, typer.Option("--out", "-o", help="Write report.json and report.png into this folder.")
]


class _Pooling(str, Enum):
    cls = "cls"
    mean = "mean"


class _Score(str, Enum):
    mutual_knn = "mutual-knn"
    cka = "cka"


class _Duplicates(str, Enum):
    refuse = "refuse"
    drop = "drop"


def align(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the encoder that is made.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Captioned images: a .jsonl, .csv or .tsv file, or a folder with captions.jsonl. A line has `file` "
            "and `captions` (or `caption`), and may have `split` (train, validation, test), `group` and `label`. For "
            "kernel, a folder of images will do.",
            show_default=False,
        ),
    ] = None,
    image_encoder: Annotated[
        str | None,
        typer.Option(help="Spec or folder; its image tower is used. For kernel: what is trained.", show_default=False),
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Spec or folder; its text tower is used.", show_default=False)
    ] = None,
    image_features: Annotated[
        Path | None,
        typer.Option(help="Instead of DATA: features you have, a .npy file of one row an image.", show_default=False),
    ] = None,
    text_features: Annotated[
        Path | None, typer.Option(help="With --image-features: a .npy file of one row a text.", show_default=False)
    ] = None,
    owner: Annotated[
        Path | None,
        typer.Option(
            help="With --text-features: a .npy file of the image row that each text describes. (default: in order)"
        ),
    ] = None,
    method: Annotated[
        _Method,
        typer.Option(
            help="Trained heads (structure, clip, siglip, ape), a closed form, or kernel: an image tower trained "
            "towards a vision-only teacher."
        ),
    ] = _Method.structure,  # type: ignore[attr-defined]
    teacher: Annotated[
        str | None,
        typer.Option(
            help="For kernel: spec or folder of an image encoder. (default: timm:vit_large_patch14_reg4_dinov2.lvd142m)"
        ),
    ] = None,
    layers: Annotated[
        str,
        typer.Option(
            help="select (the pair of layers most alike), last (blocks), output (the encoders' own features), or "
            "IMAGE,TEXT such as 9,-1 or output,6."
        ),
    ] = "select",
    layer_score: Annotated[
        _Score | None, typer.Option(help="What select goes by. (default: cka)", show_choices=True)
    ] = None,
    pooling: Annotated[
        _Pooling | None, typer.Option(help="Of image tokens. (default: cls where there is a class token)")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another encoder for the table, such as an off-the-shelf CLIP.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="linear, mlp or residual. (default: linear)")] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Width of the joint space. (default: 512)")] = None,
    structure: Annotated[
        float | None, typer.Option(min=0, help="Weight of STRUCTURE's regulariser. (default: 10)")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides cosines. (default: 0.05)")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps at most. (default: 1000; kernel: two epochs)")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any other option of the method, as name=value; repeat for more. A wrong name lists them all."
        ),
    ] = None,
    validation: Annotated[
        float, typer.Option(help="Share of the training images held out while fitting, if no line says validation.")
    ] = 0.1,
    test: Annotated[float, typer.Option(help="Share of the images to measure on, if no line says test.")] = 0.1,
    duplicates: Annotated[
        _Duplicates, typer.Option(help="Copies of test images among the training images: refuse, or drop them.")
    ] = _Duplicates.refuse,
    sample: Annotated[int, typer.Option(min=10, help="Training images that layers are chosen on, at most.")] = 5000,
    templates: Templates = "simple",
    cache: Annotated[
        Path | None, typer.Option(help="Folder for features. (default: mmalign-features beside OUT; kernel keeps none)")
    ] = None,
    device: Device = None,
    dtype: Annotated[
        str, typer.Option(help="Of the image tower while features are extracted: float32, bfloat16, float16, auto.")
    ] = "float32",
    batch_size: BatchSize = None,
    workers: Workers = None,
    seed: Annotated[int, typer.Option(min=0, help="Of splits and fit.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Join an image encoder and a text encoder with your captioned images.

    Both stay as they are: small heads are fitted on their features, which
    are extracted once and cached. A stopped run goes on where it was.

        mmalign align pairs.jsonl --out mine \\
            --image-encoder timm:NAME --text-encoder transformers:ORG/NAME

        mmalign index photos/ --encoder mine

    OUT is an encoder, with report.json, report.png and layers.png inside.
    The table has chance, ridge regression and shrunk canonical correlation
    beside the fitted heads, all on images that nothing was fitted on.
    bundled:image and bundled:text are two encoders that need no network.

    Features that you have need no encoder:

        mmalign align --image-features x.npy --text-features y.npy --out heads

    kernel (KUEA, arXiv 2506.02557) takes a CLIP and images alone, trains its
    image tower towards DINOv2's similarities, and leaves its words as they
    are; the table says what it did to images held out. An index is built
    anew, or changed over with `mmalign upgrade`:

        mmalign align photos/ --out mine --method kernel \\
            --image-encoder open_clip:ViT-L-14/openai

    Exit code 4: some images could not be read and were left out.
    """
    from mmalign.alignment import METHODS, align_encoders, align_features

    if method.value == "kernel":
        from .kernel_aligning import align_kernel

        align_kernel(
            context, data, out, image_encoder, teacher, options or [], steps=steps, test=test, cache=cache,
            device=device, batch_size=batch_size, workers=workers, seed=seed, as_json=as_json, quiet=quiet,
        )  # fmt: skip
        return
    if teacher is not None:
        raise InputError(f"--teacher is for --method kernel, and the method is {method.value}; leave it out")
    given = {"head": head, "dim": dim, "structure": structure, "temperature": temperature, "steps": steps}
    own = {name: value for name, value in given.items() if value is not None}
    types = get_type_hints(METHODS[method.value].options)
    method_options = named_options(method.value, types, options or [], own)
    if image_features is not None or text_features is not None:
        features = _only_features(context, data, image_features, text_features)
        run = align_features(
            *features,
            out,
            owner=owner,
            method=method.value,
            options=method_options,
            validation=validation,
            test=test,
            image_encoder=image_encoder,
            text_encoder=text_encoder,
            device=device,
            seed=seed,
            progress=not quiet,
        )
        _report(run, as_json)
        return
    if data is None or image_encoder is None or text_encoder is None or owner is not None:
        raise InputError(
            "give DATA, --image-encoder and --text-encoder; or features that you have, --image-features and "
            "--text-features (--owner goes with these)"
        )
    run = align_encoders(
        data,
        out,
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        method=method.value,
        options=method_options,
        layers=_layers(layers),
        layer_score=None if layer_score is None else layer_score.value,
        pooling=None if pooling is None else pooling.value,
        sample=sample,
        validation=validation,
        test=test,
        duplicates=duplicates.value,
        against=against,
        templates=_templates(templates),
        cache=cache,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        progress=not quiet,
    )
    _report(run, as_json)


def _report(run: AlignmentRun, as_json: bool) -> None:
    for warning in run.warnings:
        say(f"note: {warning}")
    if as_json:
        print(json.dumps(run.to_dict()))
    else:
        print("\n".join(run.lines()))
        if run.encoder is None:
            say(f"the heads are in {str(run.folder)!r}; `mmalign.load_alignment` in Python encodes features with them")
        else:
            say(f"the encoder is {str(run.folder)!r}; index with `mmalign index FOLDER --encoder {run.folder}`")
    if run.report["skipped"]:
        raise typer.Exit(PARTIAL)


_FOR_DATA = ("layers", "layer_score", "pooling", "sample", "duplicates", "against", "templates", "cache", "dtype",
             "batch_size", "workers")  # fmt: skip


def _only_features(
    context: typer.Context, data: Path | None, image_features: Path | None, text_features: Path | None
) -> tuple[Path, Path]:
    """Both, and refuse what has no effect on features that are there already."""
    if image_features is None or text_features is None:
        raise InputError("--image-features and --text-features belong together; give both")
    given = given_of(context, _FOR_DATA)
    if data is not None or given:
        names = ["DATA"] * (data is not None) + [f"--{name.replace('_', '-')}" for name in given]
        raise InputError(f"{', '.join(names)}: of no effect on features that are there already; leave out")
    return image_features, text_features


def given_of(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Those of the parameters that were given."""
    # By name: typer has a click of its own.
    sources = {name: context.get_parameter_source(name) for name in names}
    return [name for name, source in sources.items() if source is not None and source.name != "DEFAULT"]


def eval_captions(
    data: Annotated[Path, typer.Argument(help="Captioned images, as for `mmalign align`.", show_default=False)],
    encoder: Annotated[
        list[str], typer.Option("--encoder", "-e", help="Spec or folder; repeat to compare.", show_default=False)
    ],
    split: Annotated[str | None, typer.Option(help="Measure on the lines of this split alone.")] = None,
    out: ReportFolder = None,
    device: Device = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling behind the intervals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure encoders on captioned images, with chance in the same table.

    Every image is in the gallery once. An encoder made by `mmalign align`
    brings ridge regression and canonical correlation of its own pairs, and
    a note if it was fitted on any of these images.
    """
    from mmalign.alignment import evaluate_on_captions
    from mmalign.alignment.drawing import draw_report
    from mmalign.encoders import load_encoder

    _check_report_folder(out)
    encoders = {name: load_encoder(name, device=device) for name in encoder}
    comparison, skipped = evaluate_on_captions(
        encoders, data, split=split, batch_size=batch_size, workers=workers, seed=seed, progress=not quiet
    )
    about = {
        "retrieval": comparison.to_dict(),
        "encoders": {name: found.fingerprint for name, found in encoders.items()},
        "data": str(data.absolute()),
        "split": split,
        "skipped": skipped,
    }
    _show(about, comparison.table(), comparison.notes, as_json)
    _save_report(out, about, lambda path: draw_report(path, comparison))
    end_if_left_out(skipped)


def eval_zero_shot(
    folder: Annotated[
        Path, typer.Argument(help="Images in one subfolder a class, named as the class.", show_default=False)
    ],
    encoder: Annotated[
        list[str], typer.Option("--encoder", "-e", help="Spec or folder; repeat to compare.", show_default=False)
    ],
    templates: Templates = "simple",
    out: ReportFolder = None,
    device: Device = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Classify images by the texts of their class names; accuracy over images (micro) and over classes (macro)."""
    from mmalign.alignment import evaluate_zero_shot
    from mmalign.alignment.drawing import draw_zero_shot
    from mmalign.encoders import load_encoder

    _check_report_folder(out)
    encoders = {name: load_encoder(name, device=device) for name in encoder}
    result, skipped = evaluate_zero_shot(
        encoders, folder, templates=_templates(templates), batch_size=batch_size, workers=workers, progress=not quiet
    )
    title = f"{result.images:,} images of {len(result.classes):,} classes, {len(result.templates)} texts a class"
    about = {
        **result.to_dict(),
        "encoders": {name: found.fingerprint for name, found in encoders.items()},
        "data": str(folder.absolute()),
        "skipped": skipped,
    }
    _show(about, [title, *result.table()], result.notes, as_json)
    _save_report(out, about, lambda path: draw_zero_shot(path, result))
    end_if_left_out(skipped)


def _show(about: dict[str, Any], lines: list[str], notes: list[str], as_json: bool) -> None:
    print(json.dumps(about) if as_json else "\n".join(lines))
    for note in notes:
        say(f"note: {note}")


def _check_report_folder(out: Path | None) -> None:
    if out is None:
        return
    if out.is_file():
        raise InputError(f"{str(out)!r} is a file; choose another folder")
    for name, what in (("encoder.json", "an encoder"), ("alignment.json", "an alignment")):
        if (out / name).exists():
            raise InputError(f"{str(out)!r} is {what} with a report of its own; choose another folder")


def _save_report(out: Path | None, about: dict[str, Any], draw: Callable[[Path], None]) -> None:
    from mmalign.files import whole_file

    if out is None:
        return
    with whole_file(out / "report.json") as path:
        path.write_text(json.dumps(about, indent=1), encoding="utf-8")
    with whole_file(out / "report.png") as path:
        draw(path)


def _layers(text: str) -> str | tuple[int | str, int | str]:
    if text in ("select", "last", "output"):
        return text
    parts = [part.strip() for part in text.split(",")]
    try:
        image, words = (part if part == "output" else int(part) for part in parts)
    except ValueError:
        raise InputError(
            f"layers is {text!r}; give select, last, output, or IMAGE,TEXT such as 9,-1 or output,6"
        ) from None
    return image, words


def _templates(text: str) -> str | list[str]:
    path = Path(text)
    if not path.is_file():
        return text
    try:
        return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"templates {text!r} cannot be read ({reason_of(error)}); check the path") from None


def named_options(method: str, types: Mapping[str, Any], given: list[str], own: Mapping[str, Any]) -> dict[str, Any]:
    """`name=value` as the method's options have them, beside those with an option of their `own`."""
    from pydantic import TypeAdapter, ValidationError

    options = dict(own)
    for entry in given:
        name, equals, value = entry.partition("=")
        name = name.strip().replace("-", "_")
        if not types:
            raise InputError(f"--set {entry!r}: {method} has no options; leave it out")
        if name not in types:
            raise InputError(f"--set {entry!r} names no option of {method}; give name=value of {', '.join(types)}")
        if not equals:
            raise InputError(f"--set {entry!r} has no value; give {name}=VALUE")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        try:
            checked = TypeAdapter(types[name]).validate_python(parsed)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Input ")
            raise InputError(f"--set {entry!r} has no value for {name}: it {reason}") from None
        if name in options:
            raise InputError(f"--set {entry!r}: {name} is given twice; give it once")
        options[name] = checked
    return options
