"""`mmalign eval diversity` and `diversity-prompts`: how diverse generated images are, and prompts to find out with."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmalign.errors import InputError, reason_of

from .options import PARTIAL, Device, Quiet, say

if TYPE_CHECKING:
    import numpy as np

    from generation.diversity import DiversityReport
    from generation.diversity.reading import ImageSet
    from mmalign.encoders import Encoder

__all__ = ["eval_diversity", "eval_diversity_prompts"]

_SHOWN = 20


class _Dimension(str, Enum):
    identity = "identity"
    style = "style"
    layout = "layout"
    tonal = "tonal"


def eval_diversity(
    images: Annotated[
        list[Path], typer.Argument(help="Folders of images, each a set; or images, one set.", show_default=False)
    ],
    against: Annotated[
        list[Path] | None,
        typer.Option(help="A folder to compare with, such as what the model drew before; may repeat."),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            "-e",
            help="Spec or folder; what similarity is measured with. none: tonal variation alone. "
            "(default: that of `mmalign index`)",
        ),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Folder of real images, for coverage: how much of it a set reaches.")
    ] = None,
    reference_test: Annotated[
        Path | None, typer.Option(help="Folder of other real images. (default: a half of --reference)")
    ] = None,
    boxes: Annotated[
        list[Path] | None,
        typer.Option(
            help="For spatial diversity: JSON lines with `file`, relative to the folder of the lines, and `boxes`, a "
            "list of lists of x0, y0, x1, y1; may repeat."
        ),
    ] = None,
    faces: Annotated[
        list[Path] | None,
        typer.Option(help="For identity similarity: face embeddings (.npy) of each set, in the order of the sets."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw how alike the images of each prompt are (.png).")] = None,
    device: Device = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a forward pass. (default: 32)")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Decoding threads. (default: one a core)")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of intervals, and of what is drawn for coverage.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure how diverse sets of images are: whether a fine-tuned model still draws more than one look.

    Images saved by `mmalign generate` are grouped by their prompt, others by
    subfolder. Compare sets of the same prompts, with as many images of each:
    [bold]mmalign eval diversity tuned/ --against base/[/bold]

    Exit code 4 says that images could not be read and were left out.
    """
    from generation.diversity import measure_diversity
    from generation.diversity.drawing import diversity_table
    from generation.diversity.measuring import embed_images
    from generation.diversity.reading import find_images, read_boxes, read_faces

    sources = _sources(images, against or [])
    if faces and len(faces) != len(sources):
        raise InputError(f"--faces are {len(faces)} for {len(sources)} sets; give one for each, in their order")
    if reference_test is not None and reference is None:
        raise InputError("--reference-test is given without --reference; give both, or --reference alone")
    _check_plot(plot, encoder)
    loaded = _encoder(encoder, device)
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": not quiet}
    detections: dict[str, np.ndarray] = {}
    for file in boxes or []:
        detections |= read_boxes(file)
    embedded = [None if faces is None else read_faces(file) for file in faces or [Path()] * len(sources)]
    sets = {name: find_images(source, workers=workers, progress=not quiet) for name, source in sources.items()}
    if boxes and not any(os.path.abspath(file) in detections for found in sets.values() for file in found.files):
        first = next(iter(detections), "nothing")
        raise InputError(
            f"--boxes name none of the images (first: {first!r}); give files relative to the lines' folder"
        )
    real: dict[str, Any] = {}
    unread: list[dict[str, Any]] = []
    for option, folder in (("reference", reference), ("reference_test", reference_test)):
        if folder is not None:
            if loaded is None:
                raise InputError(f"--{option.replace('_', '-')} needs an encoder; leave --encoder none out")
            real[option], skipped = embed_images(loaded, find_images(folder).files, **options)
            unread += skipped
    queries = min(len(found.files) for found in sets.values())
    reports = {
        name: measure_diversity(
            found.files,
            found.groups,
            encoder=loaded,
            **real,
            queries=max(queries, 2),
            boxes=[detections.get(os.path.abspath(file)) for file in found.files] if boxes else None,
            faces=rows,
            seed=seed,
            **options,
        )
        for (name, found), rows in zip(sets.items(), embedded, strict=True)
    }
    differences = _differences(reports, [str(folder) for folder in against or []], seed)
    notes = _notes(sets, reports)
    skipped = [entry for report in reports.values() for entry in report.skipped] + unread
    if as_json:
        about = {
            "sets": {name: report.to_dict() for name, report in reports.items()},
            "differences": differences,
            "notes": notes,
            "skipped": skipped,
        }
        print(json.dumps(about))
    else:
        for name, report in reports.items():
            prompts = "1 prompt" if len(report.prompts) == 1 else f"{len(report.prompts):,} prompts"
            print(f"{name}: {report.images:,} images of {prompts}")
        print("\n".join(["", *diversity_table(reports), *map(_difference_line, differences)]))
    for note in notes:
        say(f"note: {note}")
    _draw(plot, reports)
    if skipped:
        say(f"note: {len(skipped):,} images could not be read and are left out")
        for entry in skipped[:_SHOWN]:
            say(f"{entry['reason']}: {entry['message']}")
        if len(skipped) > _SHOWN:
            say(f"... and {len(skipped) - _SHOWN:,} more; --json lists all")
        raise typer.Exit(PARTIAL)


def eval_diversity_prompts(
    dimension: Annotated[_Dimension, typer.Argument(help="In which respect pictures should differ.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many prompts.")] = 800,
    keywords: Annotated[
        Path | None,
        typer.Option(help='Other keywords: a JSON file such as {"age": ["young", "old"]}; axes as in --json.'),
    ] = None,
    base_prompts: Annotated[Path | None, typer.Option(help="Other scenes for style and tonal, one a line.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which combinations of keywords.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line: prompt, dimension and keywords.")
    ] = False,
) -> None:
    """Print prompts whose pictures should differ in one respect, one a line; each keyword comes equally often.

    [bold]mmalign eval diversity-prompts style -n 100 > prompts.txt[/bold]
    [bold]mmalign generate --prompts-file prompts.txt -k 4 -o base/[/bold]

    Templates and counts are those of DivGenBench, whose keyword files are not
    released; the words are ours.
    """
    from generation.diversity import diversity_prompts
    from generation.prompts import read_prompts

    found = diversity_prompts(
        dimension.value,
        count,
        seed=seed,
        keywords=None if keywords is None else _keywords(keywords),
        base_prompts=None if base_prompts is None else read_prompts(base_prompts),
    )
    for prompt in found:
        print(json.dumps(prompt.to_dict(), ensure_ascii=False) if as_json else prompt.text)


def _sources(images: list[Path], against: list[Path]) -> dict[str, Path | list[Path]]:
    """Each folder is a set, named as it was given; images that are named make one."""
    sources: dict[str, Path | list[Path]] = {}
    files = [path for path in images if not path.is_dir()]
    if files:
        missing = next((path for path in files if not path.exists()), None)
        if missing is not None:
            raise InputError(f"{str(missing)!r} does not exist; give a folder of images, or images")
        sources["images"] = files
    for folder in [path for path in images if path.is_dir()] + against:
        if str(folder) in sources:
            raise InputError(f"{str(folder)!r} is given twice; give each folder once")
        sources[str(folder)] = folder
    return sources


def _encoder(spec: str | None, device: str | None) -> Encoder | None:
    from mmalign.encoders import DEFAULT_SPEC, load_encoder

    if spec == "none":
        return None
    encoder = load_encoder(spec or DEFAULT_SPEC, device=device)
    encoder.require("image")
    return encoder


def _notes(sets: dict[str, ImageSet], reports: dict[str, DiversityReport]) -> list[str]:
    of_note: dict[str, list[str]] = {}
    for name in reports:
        for note in [*sets[name].notes, *reports[name].notes]:
            of_note.setdefault(note, []).append(name)
    notes = [note if len(names) == len(reports) else f"{', '.join(names)}: {note}" for note, names in of_note.items()]
    first, *others = reports.values()
    if any(other.prompts != first.prompts for other in others):
        notes.append("the sets differ in prompts, or in images of a prompt: their figures are only roughly comparable")
    return notes


def _differences(reports: dict[str, DiversityReport], baselines: list[str], seed: int) -> list[dict[str, Any]]:
    """What each set has more than each baseline, over the prompts of both."""
    from generation.diversity import HIGHER_IS_MORE_DIVERSE, compare_prompts

    found = []
    for baseline in baselines:
        for name, report in reports.items():
            if name in baselines:
                continue
            for figure in ("within_prompt_similarity", "spatial_diversity"):
                difference = compare_prompts(report, reports[baseline], figure, seed=seed)
                if difference is None or difference.interval is None:
                    continue
                low, high = difference.interval
                found.append(
                    {
                        "set": name,
                        "against": baseline,
                        "figure": figure,
                        "value": difference.value,
                        "low": low,
                        "high": high,
                        "prompts": difference.prompts,
                        "higher_is_more_diverse": HIGHER_IS_MORE_DIVERSE[figure],
                    }
                )
    return found


def _difference_line(found: dict[str, Any]) -> str:
    about = f"{found['figure'].replace('_', ' ')} of {found['set']} minus {found['against']}"
    numbers = (
        f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}] over {found['prompts']:,} prompts of both"
    )
    if found["low"] <= 0 <= found["high"]:
        return f"{about}: {numbers}, no clear difference"
    more = (found["value"] > 0) == found["higher_is_more_diverse"]
    return f"{about}: {numbers}, {'more' if more else 'less'} diverse"


def _check_plot(plot: Path | None, encoder: str | None) -> None:
    if plot is None:
        return
    if plot.suffix.lower() != ".png":
        raise InputError(f"--plot {plot} ends in {plot.suffix or 'nothing'}; give a name that ends in .png")
    if plot.is_dir():
        raise InputError(f"--plot {plot} is a folder; give the name of a picture in it")
    if encoder == "none":
        raise InputError("--plot draws similarities, which need an encoder; leave --encoder none or --plot out")


def _draw(plot: Path | None, reports: dict[str, DiversityReport]) -> None:
    from generation.diversity.drawing import draw_diversity
    from mmalign.files import whole_file

    if plot is None:
        return
    if not any("within_prompt_similarity" in report.values for report in reports.values()):
        say("note: no prompt has two images; there is no picture to draw")
        return
    with whole_file(plot) as path:
        draw_diversity(path, reports)
    say(f"picture: {plot}")


def _keywords(file: Path) -> dict[str, list[str]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"keywords {str(file)!r} cannot be read ({reason_of(error)}); give a JSON file") from None
    if not isinstance(found, dict) or not all(isinstance(words, list) for words in found.values()):
        raise InputError(f'keywords {str(file)!r} are no lists by axis; give a JSON file such as {{"age": ["young"]}}')
    return found
