"""python scripts/reward_drawings.py GENERATOR [--out runs/rewards] [--seeds 3] [--steps 40]

Reward fine-tuning shown end to end without a hub, on a generator that really draws (scripts/drawing_generator.py makes
it): the cosine of image and prompt by the bundled encoder is raised through the sampler (the last two of twelve steps,
a LoRA on the UNet's convolutions), by the plain reward and by D2-Align's corrected one, everything else equal, for
several seeds. Measured at each look on prompts that were not trained on (another wording of the trained concepts; at
the end also concepts that were left out): the plain reward, a held-out reward (the cosine by the same two networks
joined another way, by ridge regression on captioned drawings of other things), and diversity (similarity of images of
one prompt by an image encoder that is not trained on, and tonal variation).

Prints both curves against the reward gained, and the difference at equal gain. OUT/table.md, OUT/rewards.png (curves),
OUT/pictures.png (the same prompts and noise, base and both), OUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from generation import D2AlignConfig, D2AlignTrainer, DRaFTConfig, DRaFTTrainer, generate, load_pipeline
from generation.prompts import read_prompts
from generation.rewards import CosineReward, Reward
from mmalign import Encoder, align, extract_features, load_encoder
from mmalign.files import whole_file
from mmalign.imaging.contact_sheet import draw_contact_sheet
from mmalign.plotting import name_axes, new_figure, save_figure

ARMS = {"plain": "plain reward", "d2": "D2-Align"}
SHOWN = {
    "probe_uncorrected": "reward",
    "probe_ridge": "held-out reward",
    "probe_within_prompt_similarity": "similarity within prompts",
    "probe_tonal_variation": "tonal variation",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generator", type=Path, help="folder made by scripts/drawing_generator.py")
    parser.add_argument("--out", type=Path, default=Path("runs/rewards"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--gradient-steps", default="last:2")
    parser.add_argument("--omega", type=float, default=1.5)
    parser.add_argument("--direction-lr", type=float, default=5e-6)
    parser.add_argument("--direction-max-norm", type=float)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    bundled = load_encoder("bundled", device="cpu")
    held_out = CosineReward(joined(given.generator, given.out))
    prompts = split_prompts(given.generator, given.out)
    runs: dict[str, list[list[dict[str, Any]]]] = {arm: [] for arm in ARMS}
    for seed in range(given.seeds):
        for arm in ARMS:
            began = time.perf_counter()
            runs[arm].append(train(arm, seed, given, prompts, bundled, held_out))
            first, last = runs[arm][-1][0], runs[arm][-1][-1]
            said = ", ".join(f"{name} {first[key]:.3f} -> {last[key]:.3f}" for key, name in SHOWN.items())
            print(f"seed {seed}, {ARMS[arm]}: {said} ({time.perf_counter() - began:.0f} s)", flush=True)
    results = {"settings": vars(given) | {"generator": str(given.generator), "out": str(given.out)}, "runs": runs}
    with whole_file(given.out / "results.json") as fresh:
        fresh.write_text(json.dumps(results, indent=1), encoding="utf-8")
    judges: dict[str, Reward] = {"reward": CosineReward(bundled), "held-out reward": held_out}
    text = table(runs) + "\n" + unseen(given, prompts[2], judges)
    with whole_file(given.out / "table.md") as fresh:
        fresh.write_text(text, encoding="utf-8")
    draw(given.out / "rewards.png", runs)
    pictures(given, prompts[1])
    print(text)


def joined(generator: Path, out: Path) -> Encoder:
    """Both bundled networks joined by ridge regression on captioned drawings: another judge of words and drawings."""
    import zipfile

    from mmalign.pairs import read_captioned

    folder = out / "ridge"
    if not (folder / "encoder.json").is_file():
        data = Path(__file__).parent.parent / "tests" / "data" / "drawings.zip"
        with zipfile.ZipFile(data) as archive:
            archive.extractall(out / "drawings")
        drawn = " ".join(read_prompts(generator / "concepts.txt"))
        rows, root = read_captioned(out / "drawings")
        rows = [row for row in rows if row.captions[0].partition(":")[0] not in drawn]
        image_encoder, text_encoder = (load_encoder(f"bundled:{side}", device="cpu") for side in ("image", "text"))
        x = extract_features(image_encoder, [root / row.file for row in rows], cache=out / "features", progress=True)
        y = extract_features(text_encoder, [row.captions[0] for row in rows], cache=out / "features", progress=True)
        align(x, y, method="ridge", device="cpu").encoder(image_encoder, text_encoder).save(folder)
    return load_encoder(folder, device="cpu")


def split_prompts(generator: Path, out: Path) -> tuple[Path, Path, Path]:
    """Four fifths of the concepts to train on; those by another wording to look at; the others, never trained on."""
    prompts = read_prompts(generator / "concepts.txt")
    order = np.random.default_rng(0).permutation(len(prompts))
    trained = [prompts[place] for place in order[: len(prompts) * 4 // 5]]
    sets = {
        "prompts": trained,
        "held_out": [re.sub(r"^a drawing of (an? )?", "", prompt) for prompt in trained],
        "unseen": [prompts[place] for place in order[len(trained) :]],
    }
    for name, lines in sets.items():
        (out / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return out / "prompts.txt", out / "held_out.txt", out / "unseen.txt"


def train(
    arm: str, seed: int, given: argparse.Namespace, prompts: Sequence[Path], bundled: Encoder, held_out: Reward
) -> list[dict[str, Any]]:
    """One run; what was logged at each look."""
    output = given.out / f"{arm}-{seed}"
    settings: dict[str, Any] = {
        "data": prompts[0], "held_out_prompts": prompts[1], "output": output, "model": given.generator,
        "resolution": 64, "device": "cpu", "sampling_steps": 12, "guidance": 3.0, "steps": given.steps,
        "batch_size": 8, "accumulation": 1, "rank": 8, "learning_rate": given.learning_rate, "weight_decay": 1e-4,
        "max_grad_norm": 1.0, "probe_every": 10, "checkpoint_every": 1000, "probe_size": 12, "probe_images": 4,
        "gradient_steps": given.gradient_steps, "reward_input": "sample", "diversity_encoder": "bundled:image",
        "seed": seed, "cache_dir": given.out / "cache", "targets": ["conv1", "conv2"],
    }  # fmt: skip
    reward = CosineReward(bundled)
    if arm == "plain":
        trainer: Any = DRaFTTrainer(DRaFTConfig(**settings), reward=reward, held_out={"ridge": held_out})
        trainer.watched = {"uncorrected": reward}
    else:
        more = {"omega": given.omega, "direction_images": 256, "direction_lr": given.direction_lr}
        more["direction_max_norm"] = given.direction_max_norm
        trainer = D2AlignTrainer(D2AlignConfig(**settings, **more), reward=reward, held_out={"ridge": held_out})
    trainer.train()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "probe_uncorrected" in row]


def at_gain(rows: Sequence[dict[str, Any]], key: str, gain: float) -> float:
    """A value where a run first has gained so much reward, between looks on a straight line."""
    gains = [row["probe_uncorrected"] - rows[0]["probe_uncorrected"] for row in rows]
    for place in range(1, len(rows)):
        if gains[place] >= gain:
            low, high = gains[place - 1], gains[place]
            share = 0.0 if high == low else min(max((gain - low) / (high - low), 0.0), 1.0)
            return float(rows[place - 1][key] + share * (rows[place][key] - rows[place - 1][key]))
    return float("nan")


def common_gain(runs: dict[str, list[list[dict[str, Any]]]], seed: int) -> float:
    """The most reward that both runs of a seed gained."""
    gained = []
    for arm in ARMS:
        rows = runs[arm][seed]
        gained.append(max(row["probe_uncorrected"] for row in rows) - rows[0]["probe_uncorrected"])
    return min(gained)


def table(runs: dict[str, list[list[dict[str, Any]]]]) -> str:
    seeds = range(len(runs["plain"]))
    gains = [common_gain(runs, seed) for seed in seeds]
    lines = [
        "| held-out prompts, mean of the seeds | base | " + " | ".join(ARMS.values()) + " | difference |",
        "|---|---|---|---|---|",
    ]
    for key, name in SHOWN.items():
        base = np.mean([runs["plain"][seed][0][key] for seed in seeds])
        found = {arm: [at_gain(runs[arm][seed], key, gains[seed]) for seed in seeds] for arm in ARMS}
        difference = np.subtract(found["d2"], found["plain"])
        spread = f" ± {difference.std(ddof=1):.3f}" if len(difference) > 1 else ""
        lines.append(
            f"| {name} at equal gain | {base:.3f} | "
            + " | ".join(f"{np.mean(found[arm]):.3f}" for arm in ARMS)
            + f" | {difference.mean():+.3f}{spread} |"
        )
    lines += ["", "| run | steps | " + " | ".join(SHOWN.values()) + " |", "|---|---|" + "---|" * len(SHOWN)]
    for arm, title in ARMS.items():
        for place in range(len(runs[arm][0])):
            rows = [runs[arm][seed][place] for seed in seeds]
            values = " | ".join(f"{np.mean([row[key] for row in rows]):.3f}" for key in SHOWN)
            lines.append(f"| {title} | {rows[0]['step']} | {values} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, runs: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Reward against steps, and everything else against the reward gained; a thin line a seed."""
    figure, axes = new_figure(len(SHOWN), 3.4, 4.0)
    for axis, (key, name) in zip(axes, SHOWN.items(), strict=True):
        for color, (arm, title) in enumerate(ARMS.items()):
            for seed, rows in enumerate(runs[arm]):
                base = rows[0]["probe_uncorrected"]
                first = key == "probe_uncorrected"
                x = [row["step"] if first else row["probe_uncorrected"] - base for row in rows]
                label = title if seed == 0 else None
                axis.plot(x, [row[key] for row in rows], ".-", color=f"C{color}", linewidth=1, alpha=0.8, label=label)
        name_axes(axis, name, "steps" if key == "probe_uncorrected" else "reward gained")
    axes[0].legend(fontsize=7, frameon=False)
    with whole_file(path) as fresh:
        save_figure(figure, fresh)


def unseen(given: argparse.Namespace, file: Path, rewards: dict[str, Reward]) -> str:
    """Concepts that were never trained on: mean rewards of four images each, base and every run's adapter."""
    prompts = read_prompts(file)
    pipeline = load_pipeline(given.generator, device="cpu")
    lines = ["| concepts never trained on | " + " | ".join(rewards) + " |", "|---|" + "---|" * len(rewards)]
    for title, adapters in (("base", [None]), *((ARMS[arm], adapters_of(given, arm)) for arm in ARMS)):
        scores: dict[str, list[float]] = {name: [] for name in rewards}
        for adapter in adapters:
            images = generate(
                prompts, model=pipeline, adapter=adapter, images_per_prompt=4, steps=12, guidance_scale=3.0, seed=99,
                height=64, width=64, batch_size=8,
            )  # fmt: skip
            for name, reward in rewards.items():
                found = reward([image.image for image in images], [image.prompt for image in images])
                scores[name].append(float(found.mean()))
        lines.append(f"| {title} | " + " | ".join(f"{np.mean(scores[name]):.3f}" for name in rewards) + " |")
    return "\n".join(lines) + "\n"


def adapters_of(given: argparse.Namespace, arm: str) -> list[Path]:
    return [given.out / f"{arm}-{seed}" / "export" for seed in range(given.seeds)]


def pictures(given: argparse.Namespace, held_out: Path) -> None:
    """The same prompts and noise by the model as it was and by both LoRAs of the first seed."""
    prompts = read_prompts(held_out)[:4]
    rows = []
    pipeline = load_pipeline(given.generator, device="cpu")
    for title, adapter in (("base", None), *((ARMS[arm], adapters_of(given, arm)[0]) for arm in ARMS)):
        images = generate(
            prompts, model=pipeline, adapter=adapter, images_per_prompt=4, steps=12, guidance_scale=3.0, seed=7,
            height=64, width=64, batch_size=8,
        )  # fmt: skip
        rows.append((title, [(image.image, image.prompt) for image in images]))
    draw_contact_sheet(rows, given.out / "pictures.png", columns=16, cell=72)


if __name__ == "__main__":
    main()
