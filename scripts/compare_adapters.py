"""Pictures of a finished run: every validation prompt by the model as it was and with each exported LoRA file.

    python scripts/compare_adapters.py RUN

Loads the files of RUN/export as any application would, by `generation.generate`; leaves RUN/comparison.png and says
how far the pictures are apart. The two formats must draw the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import yaml

from generation import generate, load_pipeline
from mmalign.errors import MMAlignError
from mmalign.imaging.contact_sheet import draw_contact_sheet


def main(run: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    prompts = settings["validation_prompts"] or ["a red bicycle leaning on a wall in the snow"]
    adapters: dict[str, Path | None] = {"untrained": None}
    adapters |= {file.name: file for file in sorted((run / "export").glob("*.safetensors"))}
    if len(adapters) == 1:
        sys.exit(f"error: {run / 'export'} holds no LoRA; finish the run first")
    pipeline = load_pipeline(settings["model"])
    drawn = {
        label: generate(
            prompts, model=pipeline, adapter=file, seed=0, height=settings["resolution"], width=settings["resolution"],
            steps=settings["validation_steps"], guidance_scale=settings["validation_guidance"], batch_size=1,
            progress=sys.stderr.isatty(),
        )
        for label, file in adapters.items()
    }  # fmt: skip
    rows = [(prompt, [(images[i].image, label) for label, images in drawn.items()]) for i, prompt in enumerate(prompts)]
    draw_contact_sheet(rows, run / "comparison.png", cell=384)
    base, *others = (np.stack([np.asarray(image.image, np.float32) for image in images]) for images in drawn.values())
    for label, other in zip(list(adapters)[1:], others, strict=True):
        print(f"{label}: {np.abs(other - base).mean():.2f} of 255 away from the untrained model's pictures")
    apart = max(float(np.abs(other - others[0]).max()) for other in others)
    print(f"formats: {apart:.0f} of 255 apart at most")
    if apart > 1:
        sys.exit("error: the exported files do not draw the same; please report this")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "config.yaml").is_file():
        sys.exit(f"{__doc__}\nerror: give the folder of a run")
    try:
        main(Path(sys.argv[1]))
    except MMAlignError as error:
        sys.exit(f"error: {error}")
