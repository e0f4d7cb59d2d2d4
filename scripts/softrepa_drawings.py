"""python scripts/softrepa_drawings.py GENERATOR [--out runs/softrepa] [--minutes 9] [--seeds 2]

SoftREPA shown end to end without a hub, on a generator that really draws (scripts/drawing_generator.py makes it). It
was trained on captions of two wordings ("axe", "a drawing of an axe"). Here its drawings come with captions of another
wording ("the thing in this picture is called axe"), which it heeds worse, or with those of the data set ("axe: chop,
hatchet, split, wood"). Soft tokens are trained on three quarters of the concepts, and looked at on a drawing of each of
the others, which they never see.

Prints, for the same held-out pairs and the same noises, how often an image's own caption denoises it best (by chance 1
in 25), how often better than another caption (by chance one half), and its error, before and after: mean and spread
over seeds, which also choose who is held out. For comparison, what the generator does with a wording that it was
trained on, which is the most that tokens could bring back. OUT/table.md, OUT/accuracy.png (curves), OUT/results.json.
On one thread of a CPU.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from generation.methods import SoftREPAConfig, SoftREPATrainer
from generation.prompts import read_prompts
from mmalign.files import whole_file, whole_folder
from mmalign.pairs import read_captioned
from mmalign.plotting import name_axes, new_figure, save_figure

DATA = Path(__file__).parent.parent / "tests" / "data" / "drawings.zip"
HELD_OUT, LOOKS = 25, 5
SHOWN = {"match_accuracy": "own caption is best", "pair_accuracy": "better than another", "mse": "denoising error"}
WORDINGS: dict[str, tuple[str, Callable[[str, str], str]]] = {
    "known": ("trained wording, no tokens", lambda name, caption: name),
    "reworded": ("another wording", lambda name, caption: f"the thing in this picture is called {name}"),
    "dataset": ("captions of the data set", lambda name, caption: caption),
}
Looks = list[dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generator", type=Path, help="folder made by scripts/drawing_generator.py")
    parser.add_argument("--out", type=Path, default=Path("runs/softrepa"), help="of its own for each try")
    parser.add_argument("--minutes", type=float, default=9, help="for all runs, which end sooner where they must")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * given.minutes
    plan = [(wording, seed) for seed in range(given.seeds) for wording in WORDINGS]
    runs: dict[str, list[Looks]] = {wording: [] for wording in WORDINGS}
    for place, (wording, seed) in enumerate(plan):
        began = time.monotonic()
        trained = sum(other != "known" for other, _ in plan[place:])
        looks = train(given, wording, seed, began + (ends - began) / max(trained, 1))
        runs[wording].append(looks)
        said = ", ".join(f"{name} {looks[0][key]:.3f} -> {looks[-1][key]:.3f}" for key, name in SHOWN.items())
        print(f"{WORDINGS[wording][0]}, seed {seed}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    with whole_file(given.out / "results.json") as fresh:
        told = {name: str(value) for name, value in vars(given).items()}
        fresh.write_text(json.dumps({"settings": told, "runs": runs}, indent=1), encoding="utf-8")
    text = table(runs)
    with whole_file(given.out / "table.md") as fresh:
        fresh.write_text(text, encoding="utf-8")
    draw(given.out / "accuracy.png", runs)
    print(text)


def captioned(given: argparse.Namespace, wording: str) -> Path:
    """The generator's drawings in both styles, with captions of a wording."""
    images = given.out / "drawings"
    if not images.is_dir():
        with whole_folder(images) as fresh, zipfile.ZipFile(DATA) as packed:
            packed.extractall(fresh)
    prompts = read_prompts(given.generator / "concepts.txt")
    concepts = {re.sub(r"^a drawing of (an? )?", "", prompt) for prompt in prompts}
    rows, root = read_captioned(images)
    lines = []
    for row in rows:
        name = row.captions[0].partition(":")[0]
        if row.file.startswith("emoji/") and name in concepts:
            caption = WORDINGS[wording][1](name, row.captions[0])
            lines.append(json.dumps({"file_name": str((root / row.file).resolve()), "caption": caption}))
    folder = given.out / f"captions-{wording}"
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def train(given: argparse.Namespace, wording: str, seed: int, ends: float) -> Looks:
    """One run; what was seen at each look. For the trained wording, the first look alone."""

    class Timed(SoftREPATrainer):
        def enough(self) -> str | None:
            if wording == "known" or time.monotonic() > ends:
                return "time is up"
            return super().enough()

    output = given.out / f"{wording}-{seed}"
    config = SoftREPAConfig(
        data=str(captioned(given, wording)), output=output, model=str(given.generator), resolution=64, device="cpu",
        seed=seed, steps=given.steps, batch_size=6, learning_rate=given.learning_rate, stages=["down", "mid", "up"],
        time_table=False, tokens=8, probe_size=HELD_OUT, probe_draws=4, probe_every=max(given.steps // LOOKS, 1),
        checkpoint_every=10_000, cache_dtype="float32", cache_dir=given.out / "cache",
    )  # fmt: skip
    Timed(config).train()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    looks = [row for row in rows if "probe_match_accuracy" in row]
    return [{"step": row["step"], **{key: row[f"probe_{key}"] for key in SHOWN}} for row in looks]


def table(runs: dict[str, list[Looks]]) -> str:
    lines = [
        f"| {HELD_OUT} held-out pairs, 4 noises, {len(runs['known'])} seeds | " + " | ".join(SHOWN.values()) + " |",
        "|---|" + "---|" * len(SHOWN),
        f"| chance | {1 / HELD_OUT:.3f} | 0.500 | |",
    ]
    for wording, (title, _) in WORDINGS.items():
        starts, ends = ({key: np.array([looks[at][key] for looks in runs[wording]]) for key in SHOWN} for at in (0, -1))
        if wording == "known":
            lines.append(f"| {title} | " + " | ".join(f"{starts[key].mean():.3f}" for key in SHOWN) + " |")
            continue
        lines.append(f"| {title}, before | " + " | ".join(f"{starts[key].mean():.3f}" for key in SHOWN) + " |")
        lines.append(f"| {title}, after | " + " | ".join(f"{ends[key].mean():.3f}" for key in SHOWN) + " |")
        changes = [ends[key] - starts[key] for key in SHOWN]
        told = [f"{change.mean():+.3f} ± {np.std(change, ddof=min(1, len(change) - 1)):.3f}" for change in changes]
        lines.append(f"| {title}, change | " + " | ".join(told) + " |")
    return "\n".join(lines) + "\n"


def draw(path: Path, runs: dict[str, list[Looks]]) -> None:
    """Every value against steps; a line a seed."""
    figure, axes = new_figure(len(SHOWN), 3.4, 4.0)
    for axis, (key, name) in zip(axes, SHOWN.items(), strict=True):
        for color, (wording, (title, _)) in enumerate(WORDINGS.items()):
            for seed, looks in enumerate(runs[wording]):
                label = title if seed == 0 else None
                if wording == "known":
                    axis.axhline(looks[0][key], color="0.6", linewidth=0.8, label=label)
                    continue
                steps, values = [look["step"] for look in looks], [look[key] for look in looks]
                axis.plot(steps, values, ".-", color=f"C{color - 1}", linewidth=1, label=label)
        name_axes(axis, name, "steps")
    axes[0].legend(fontsize=7, frameon=False)
    with whole_file(path) as fresh:
        save_figure(figure, fresh)


if __name__ == "__main__":
    main()
