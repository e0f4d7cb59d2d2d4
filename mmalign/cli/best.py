"""`mmalign best`: the best of N images of a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmalign.errors import InputError

from .generating import refuse_grid
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
    Quiet,
    Steps,
    Unet,
    Width,
    say,
)

if TYPE_CHECKING:
    from generation.best_of_n import BestOfN

__all__ = ["best"]


def best(
    prompt: Annotated[str, typer.Argument(help="What to draw.", show_default=False)],
    n: Annotated[int, typer.Option("-n", min=1, help="Images to choose from, each of a seed of its own.")] = 16,
    keep: Annotated[int, typer.Option("--keep", "-k", min=1, help="How many to keep.")] = 1,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            "-r",
            help="What is good; repeat for a sum, NAME=WEIGHT. `mmalign score --list` shows them all. "
            "(default: pickscore)",
        ),
    ] = None,
    check_at: Annotated[
        list[float] | None,
        typer.Option(
            help="Drop the worst after this share of the steps; repeat to drop in several turns. (default: 0.4)"
        ),
    ] = None,
    survivors: Annotated[
        list[int] | None,
        typer.Option(min=1, help="How many go on after it; once for each --check-at. (default: a quarter of N)"),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Finish all images: drop none.")] = False,
    scorer: Annotated[
        Path | None,
        typer.Option(help="Check by this file of `generation.latent_scorer` instead of decoding and --reward."),
    ] = None,
    preview_scale: Annotated[
        int, typer.Option(min=1, help="Check images that are smaller by this factor; 2 decodes four times as fast.")
    ] = 1,
    rounds: Annotated[
        int,
        typer.Option(
            min=1,
            help="2 and more: draw N images again with the words in front that the best one misses. How far that "
            "helps was not measured.",
        ),
    ] = 1,
    model: GeneratorModel = None,
    unet: Unet = None,
    adapter: Adapters = None,
    adapter_weight: AdapterWeights = None,
    negative_prompt: NegativePrompt = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    height: Height = None,
    width: Width = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the images that are kept.")] = Path("best"),
    device: Device = None,
    dtype: Dtype = "auto",
    batch_size: DrawnTogether = None,
    seed: FirstSeed = None,
    grid: Annotated[Path | None, typer.Option(help="Also draw the kept images into this picture (.png, .jpg).")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: images, scores of all candidates, denoiser calls.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Draw N images of a prompt and keep the best by a reward.

    Part of the way the images are scored as they will look, and only the best
    of them are finished: by default 45 % of the work is saved. Those kept are
    the same images that `mmalign generate --seed` draws, with all settings.

    [bold]mmalign best "a red bicycle in snow" -n 16 --keep 4 --grid best.png[/bold]
    [bold]mmalign best "two cats" --reward hps-v2.1=1 --reward clipscore=0.2[/bold]
    """
    if adapter_weight and not adapter:
        raise InputError("--adapter-weight is given without an --adapter; give one, or leave the weight out")
    if plain and check_at:
        raise InputError("--plain and --check-at exclude each other; give one of them")
    if grid is not None:
        refuse_grid(grid)
    from generation.best_of_n import best_of_n
    from generation.latent_scorer import LatentScorer
    from generation.pipelines import DEFAULT_MODEL
    from generation.prompt_revision import emphasise_misaligned

    weights = adapter_weight or [1.0]
    found = best_of_n(
        prompt,
        reward=reward or ["pickscore"],
        n=n,
        keep=keep,
        model=model or DEFAULT_MODEL,
        unet=unet,
        adapter=adapter,
        adapter_weight=weights[0] if len(weights) == 1 else weights,
        check_at=None if plain else check_at or 0.4,
        survivors=survivors,
        scorer=None if scorer is None else LatentScorer.load(scorer),
        preview_scale=preview_scale,
        rounds=rounds,
        revise=emphasise_misaligned if rounds > 1 else None,
        negative_prompt=negative_prompt,
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
    print(json.dumps(found.to_dict()) if as_json else _table(found))
    if grid is not None:
        grid.parent.mkdir(parents=True, exist_ok=True)
        say(f"picture: {found.draw(grid)}")
    for again in found.prompts[1:]:
        say(f"drawn again as: {again}")
    say(f"{found.calls:,} denoiser calls instead of {found.plain_calls:,}: {found.saved:.0%} saved")


def _table(found: BestOfN) -> str:
    width = max(len(found.reward), 9)
    lines = [f"rank  {found.reward:>{width}}  image"]
    for rank, (image, score) in enumerate(zip(found.images, found.scores, strict=True), 1):
        lines.append(f"{rank:>4}  {score:>{width}.4f}  {image.path}")
    return "\n".join(lines)
