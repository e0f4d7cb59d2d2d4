"""`mmalign generate`: prompts to images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmalign.errors import InputError

from .options import (
    Adapters,
    AdapterWeights,
    Device,
    DrawnTogether,
    Dtype,
    FirstSeed,
    GeneratorModel,
    Guidance,
    Height,
    NegativePrompt,
    Steps,
    Unet,
    Width,
    print_paths,
    say,
)

__all__ = ["generate", "refuse_grid"]


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw.", show_default=False)] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="More prompts, one a line (or JSON lines with `prompt`).")
    ] = None,
    model: GeneratorModel = None,
    unet: Unet = None,
    adapter: Adapters = None,
    adapter_weight: AdapterWeights = None,
    negative_prompt: NegativePrompt = None,
    images_per_prompt: Annotated[
        int, typer.Option("--images-per-prompt", "-k", min=1, help="Images of each prompt.")
    ] = 1,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    height: Height = None,
    width: Width = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the images.")] = Path("generated"),
    device: Device = None,
    dtype: Dtype = "auto",
    batch_size: DrawnTogether = None,
    seed: FirstSeed = None,
    grid: Annotated[Path | None, typer.Option(help="Also draw all images into this picture (.png, .jpg).")] = None,
    settings: Annotated[
        Path | None, typer.Option(help="Draw nothing: print what this saved image was made from, as JSON.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object an image: path, prompt, seed and settings.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Draw images of prompts; each is saved with everything needed to draw it again.

    The paths of the images are printed, one a line. What is already there with
    equal settings is not drawn again, so with --seed a stopped run goes on when
    it is started again.

    [bold]mmalign generate "a red bicycle in snow" -a runs/mapo/export -k 4 --seed 7[/bold]
    [bold]mmalign generate --prompts-file prompts.txt -o pictures/ --grid all.png[/bold]
    """
    if settings is not None:
        from generation import read_settings

        print(json.dumps(read_settings(settings), indent=2, ensure_ascii=False))
        return
    from generation.prompts import read_prompts

    texts = [*(prompts or []), *(read_prompts(prompts_file) if prompts_file is not None else [])]
    if not texts:
        raise InputError('there is no prompt; give one: mmalign generate "a red bicycle in snow", or --prompts-file')
    if adapter_weight and not adapter:
        raise InputError("--adapter-weight is given without an --adapter; give one, or leave the weight out")
    if grid is not None:
        refuse_grid(grid)
    from generation import generate_each
    from generation.pipelines import DEFAULT_MODEL

    weights = adapter_weight or [1.0]
    images = generate_each(
        texts,
        model=model or DEFAULT_MODEL,
        unet=unet,
        adapter=adapter,
        adapter_weight=weights[0] if len(weights) == 1 else weights,
        negative_prompt=negative_prompt,
        images_per_prompt=images_per_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        out=out,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        seed=seed,
        progress=not quiet,
    )
    drawn = []
    for image in images:
        assert image.path is not None
        drawn.append((image.prompt, image.seed, image.path))
        if as_json:
            print(json.dumps(image.to_dict()), flush=True)
        else:
            print_paths([image.path], "\n")
    if grid is not None:
        _draw_grid(drawn, images_per_prompt, grid)


def refuse_grid(grid: Path) -> None:
    """Before hours of drawing, what would only be found after them."""
    from PIL import Image

    from generation.images import refuse_folder

    known = Image.registered_extensions()
    if known.get(grid.suffix.lower()) not in Image.SAVE:
        raise InputError(f"--grid {grid} ends in {grid.suffix or 'nothing'}, which is no picture's; try .png or .jpg")
    if grid.is_dir():
        raise InputError(f"--grid {grid} is a folder; give the name of a picture in it")
    refuse_folder(grid.parent)


def _draw_grid(drawn: list[tuple[str, int, Path]], count: int, grid: Path) -> None:
    from mmalign.imaging.contact_sheet import draw_contact_sheet

    rows = []
    for start in range(0, len(drawn), count):
        of_prompt = drawn[start : start + count]
        rows.append((of_prompt[0][0], [(path, f"seed {seed}") for _, seed, path in of_prompt]))
    grid.parent.mkdir(parents=True, exist_ok=True)
    say(f"picture: {draw_contact_sheet(rows, grid)}")
