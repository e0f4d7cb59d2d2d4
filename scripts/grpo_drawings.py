"""python scripts/grpo_drawings.py GENERATOR [--out runs/grpo] [--seeds 3] [--steps 40] [--arms plain guard ...]

GRPO shown end to end without a hub, on a generator that really draws (scripts/drawing_generator.py makes it). A cheap
reward that can be exploited, the redness of the pictures, is raised; the cosine of picture and prompt by the bundled
encoder is held out, and falls as the pictures turn red. Everything else is equal:

- plain: Flow-GRPO's ratio and clip, no weights of steps; guard: GRPO-Guard's. Groups of 8.
- mean4: groups of 4, centred at their mean; median4: MC-GRPO, 5 drawn of which the median trains nothing.
- tree: BranchGRPO, 8 leaves a prompt (3 splits), as many images as `guard`; denoiser calls are counted.

Prints what each comes to at the reward that all arms of a seed reached. OUT/table.md, OUT/grpo.png (curves),
OUT/results.json, OUT/pictures.png (the same prompts and noise, by the model before training and by each arm).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from reward_drawings import at_gain, split_prompts

from generation import GRPOConfig, GRPOTrainer, generate, load_pipeline
from generation.prompts import read_prompts
from generation.rewards import CosineReward, load_reward
from mmalign import load_encoder
from mmalign.files import whole_file
from mmalign.imaging.contact_sheet import draw_contact_sheet
from mmalign.plotting import name_axes, new_figure, save_figure

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Flow-GRPO", {"ratio": "plain", "step_weight": "none"}),
    "guard": ("GRPO-Guard", {}),
    "mean4": ("mean, groups of 4", {"group_size": 4}),
    "median4": ("median, groups of 4 (+1)", {"group_size": 5, "batch_size": 20, "advantage": "median"}),
    "tree": ("tree, 8 leaves", {"rollout": "tree", "split_steps": "0,2,4"}),
}
PAIRS = (("plain", "guard"), ("mean4", "median4"), ("guard", "tree"))
SHOWN = {
    "probe_uncorrected": "reward",
    "probe_cosine": "held-out reward",
    "probe_within_prompt_similarity": "similarity within prompts",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generator", type=Path, help="folder made by scripts/drawing_generator.py")
    parser.add_argument("--out", type=Path, default=Path("runs/grpo"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--reward", default="redness")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    held_out = CosineReward(load_encoder("bundled", device="cpu"))
    prompts = split_prompts(given.generator, given.out)
    runs: dict[str, list[list[dict[str, Any]]]] = {arm: [] for arm in given.arms}
    for seed in range(given.seeds):
        for arm in given.arms:
            began = time.perf_counter()
            runs[arm].append(train(arm, seed, given, prompts, held_out))
            looks = [row for row in runs[arm][-1] if "probe_uncorrected" in row]
            said = ", ".join(f"{name} {looks[0][key]:.3f} -> {looks[-1][key]:.3f}" for key, name in SHOWN.items())
            print(f"seed {seed}, {ARMS[arm][0]}: {said} ({time.perf_counter() - began:.0f} s)", flush=True)
    results = {"settings": {name: str(value) for name, value in vars(given).items()}, "runs": runs}
    with whole_file(given.out / "results.json") as fresh:
        fresh.write_text(json.dumps(results), encoding="utf-8")
    text = table(runs)
    with whole_file(given.out / "table.md") as fresh:
        fresh.write_text(text, encoding="utf-8")
    draw(given.out / "grpo.png", runs)
    pictures(given, prompts[1])
    print(text)


def train(
    arm: str, seed: int, given: argparse.Namespace, prompts: Sequence[Path], held_out: CosineReward
) -> list[dict[str, Any]]:
    """One run; all that was logged."""
    output = given.out / f"{arm}-{seed}"
    settings: dict[str, Any] = {
        "data": prompts[0], "held_out_prompts": prompts[1], "output": output, "model": given.generator,
        "resolution": 64, "device": "cpu", "sampling_steps": 8, "steps": given.steps, "batch_size": 16,
        "accumulation": 2, "group_size": 8, "updates": 2, "rank": 8, "alpha": None, "max_grad_norm": 1.0,
        "learning_rate": given.learning_rate, "probe_every": 5, "checkpoint_every": 1000, "probe_size": 12,
        "probe_images": 4, "probe_sampling_steps": 12, "diversity_encoder": "bundled:image", "seed": seed,
        "cache_dir": given.out / "cache", "targets": ["conv1", "conv2"], **ARMS[arm][1],
    }  # fmt: skip
    reward = load_reward(given.reward)
    trainer = GRPOTrainer(GRPOConfig(**settings), reward=reward, held_out={"cosine": held_out})
    trainer.watched = {"uncorrected": reward}
    trainer.train()
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def looks_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "probe_uncorrected" in row]


def table(runs: dict[str, list[list[dict[str, Any]]]]) -> str:
    """Pairs of arms at the gain that both reached; then each arm at its end."""
    seeds = range(len(next(iter(runs.values()))))
    lines = [
        "| at equal gain, mean of the seeds | gain | before | first | second | difference |",
        "|---|---|---|---|---|---|",
    ]
    for first, second in PAIRS:
        if not {first, second} <= set(runs):
            continue
        both = [(looks_of(runs[first][seed]), looks_of(runs[second][seed])) for seed in seeds]
        gains = [min(most_gained(rows) for rows in pair) for pair in both]
        for key, name in list(SHOWN.items())[1:]:
            found = np.array(
                [[at_gain(rows, key, gain) for rows in pair] for pair, gain in zip(both, gains, strict=True)]
            )
            difference = found[:, 1] - found[:, 0]
            spread = f" ± {difference.std(ddof=1):.3f}" if len(difference) > 1 else ""
            before = np.mean([pair[0][0][key] for pair in both])
            lines.append(
                f"| {name}: {ARMS[first][0]}, {ARMS[second][0]} | {np.mean(gains):.3f} | {before:.3f} | "
                f"{found[:, 0].mean():.3f} | {found[:, 1].mean():.3f} | {difference.mean():+.3f}{spread} |"
            )
    heads = [
        "reward gained",
        "held-out reward",
        "similarity within prompts",
        "clipped high / low",
        "denoiser calls a step",
    ]
    lines += ["", f"| at the end | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for arm, of in runs.items():
        ends = [looks_of(rows)[-1] for rows in of]
        starts = [looks_of(rows)[0] for rows in of]
        trained = [row for rows in of for row in rows if "clipped_high" in row]
        gains = [end["probe_uncorrected"] - start["probe_uncorrected"] for end, start in zip(ends, starts, strict=True)]
        told = [f"{np.mean(gains):.3f} ({min(gains):.3f} to {max(gains):.3f})"]
        told += [f"{np.mean([end[key] for end in ends]):.3f}" for key in list(SHOWN)[1:]]
        high, low = (np.mean([row[name] for row in trained]) for name in ("clipped_high", "clipped_low"))
        told += [f"{high:.2f} / {low:.2f}", f"{np.mean([row['denoiser_calls'] for row in trained]):.0f}"]
        lines.append(f"| {ARMS[arm][0]} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def most_gained(rows: Sequence[dict[str, Any]]) -> float:
    return float(max(row["probe_uncorrected"] for row in rows) - rows[0]["probe_uncorrected"])


def draw(path: Path, runs: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Reward against steps, and everything else against the reward gained; a thin line a seed."""
    figure, axes = new_figure(len(SHOWN), 3.6, 4.0)
    for axis, (key, name) in zip(axes, SHOWN.items(), strict=True):
        for color, (arm, of) in enumerate(runs.items()):
            for seed, rows in enumerate(map(looks_of, of)):
                base, first = rows[0]["probe_uncorrected"], key == "probe_uncorrected"
                x = [row["step"] if first else row["probe_uncorrected"] - base for row in rows]
                label = ARMS[arm][0] if seed == 0 else None
                axis.plot(x, [row[key] for row in rows], ".-", color=f"C{color}", linewidth=1, alpha=0.8, label=label)
        name_axes(axis, name, "steps" if key == "probe_uncorrected" else "reward gained")
    axes[0].legend(fontsize=7, frameon=False)
    with whole_file(path) as fresh:
        save_figure(figure, fresh)


def pictures(given: argparse.Namespace, held_out: Path) -> None:
    """The same prompts and noise by the model as it was and by the LoRA of each arm's first seed."""
    prompts = read_prompts(held_out)[:4]
    pipeline = load_pipeline(given.generator, device="cpu")
    rows = []
    adapters = [("base", None), *((ARMS[arm][0], given.out / f"{arm}-0" / "export") for arm in given.arms)]
    for title, adapter in adapters:
        images = generate(
            prompts, model=pipeline, adapter=adapter, images_per_prompt=4, steps=12, guidance_scale=1.0, seed=7,
            height=64, width=64, batch_size=8,
        )  # fmt: skip
        rows.append((title, [(image.image, image.prompt) for image in images]))
    draw_contact_sheet(rows, given.out / "pictures.png", columns=16, cell=72)


if __name__ == "__main__":
    main()
