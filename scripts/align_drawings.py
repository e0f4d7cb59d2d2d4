"""python scripts/align_drawings.py [--data emoji|clipart] [--out runs/drawings] [--pairs 250 1000] [--seeds 0 1 2]

Joins a real vision encoder (EfficientNet-Lite2, 1,280 features) and a real sentence encoder (all-MiniLM-L6-v2, 384) on
tests/data/drawings.zip, without a hub. Emoji: 1,278 of them in two styles to train on, 275 others (Fluent's drawings)
to measure on. Clip art: 1,064 and 198. What is measured on is seen by nothing before.

For each number of pairs and seed it draws the pairs, chooses layers on them (mutual kNN, CKA) and fits heads with
`align` at its defaults; means over the seeds go to OUT/table.md, everything to OUT/results.json. Features are cached in
OUT; results are kept fit by fit, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from mmalign import align, extract_features, layer_scores, load_encoder
from mmalign.features import Features
from mmalign.files import whole_file
from mmalign.metrics import image_text_retrieval
from mmalign.metrics.chance import chance_retrieval
from mmalign.pairs import read_captioned

DATA = Path(__file__).parent.parent / "tests" / "data" / "drawings.zip"
METHODS = ("clip", "structure", "ridge", "cca")
FIGURES = ("hit@1", "hit@5", "hit@10", "medr")
CHOICES = {"last": "last blocks", "mutual-knn": "most alike by mutual kNN", "cka": "most alike by CKA"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("emoji", "clipart"), default="emoji")
    parser.add_argument("--out", type=Path, default=Path("runs/drawings"))
    parser.add_argument("--pairs", type=int, nargs="+", default=[250, 1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    start = time.perf_counter()
    images, texts, training, test, groups = features(given.out, given.data)
    path = given.out / f"results-{given.data}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for pairs in given.pairs:
        for seed in given.seeds:
            rows = np.sort(np.random.default_rng(seed).permutation(training)[:pairs])
            for choice in CHOICES:
                layers = chosen(choice, images, texts, rows, seed)
                for method in METHODS:
                    name = f"{pairs}/{seed}/{choice}/{method}"
                    if name not in results:
                        results[name] = fit(method, layers, images, texts, rows, test, groups, seed)
                        with whole_file(path) as fresh:
                            fresh.write_text(json.dumps(results, indent=1))
                    found = results[name]
                    print(f"{name:<32} layers {found['layers']}  R@1 {found['image_to_text']['hit@1']:.3f} "
                          f"{found['text_to_image']['hit@1']:.3f}  {found['seconds']:.1f} s", flush=True)  # fmt: skip
    table = markdown(results, given.pairs, given.seeds, len(test))
    written = given.out / f"table-{given.data}.md"
    with whole_file(written) as fresh:
        fresh.write_text(table)
    print(f"\n{table}\n{time.perf_counter() - start:.0f} s in all; table in {written}")


def features(out: Path, data: str) -> tuple[Features, Features, np.ndarray, np.ndarray, list[str | None]]:
    """All layers of both encoders for all drawings; the rows to train and to measure on; what belongs together."""
    if not (out / "data" / "captions.jsonl").is_file():
        with zipfile.ZipFile(DATA) as packed:
            packed.extractall(out / "data")
    drawings, folder = read_captioned(out / "data")
    sides = []
    for name, items in (
        ("image", [folder / drawing.file for drawing in drawings]),
        ("text", [drawing.captions[0] for drawing in drawings]),
    ):
        encoder = load_encoder(f"bundled:{name}", device="cpu")
        layers = [*range(encoder.layer_count(name)), "output"]
        sides.append(extract_features(encoder, items, layers=layers, cache=out / "features", progress=True))
    split = np.array([drawing.split for drawing in drawings])
    ours = np.array([drawing.file.startswith(data) for drawing in drawings])
    noto = np.array([drawing.file.startswith("emoji/noto") for drawing in drawings])
    training, test = np.flatnonzero(ours & (split == "train")), np.flatnonzero(ours & (split == "test") & ~noto)
    return sides[0], sides[1], training, test, [drawing.group for drawing in drawings]


def chosen(choice: str, images: Features, texts: Features, rows: np.ndarray, seed: int) -> tuple[Any, Any]:
    names = [*images.layers], [*texts.layers]
    if choice == "last":
        return names[0][-2], names[1][-2]
    tables = [[np.asarray(side[name])[rows] for name in side.layers] for side in (images, texts)]
    best = layer_scores(*tables, score=choice, seed=seed).best
    return names[0][best[0]], names[1][best[1]]


def fit(
    method: str,
    layers: tuple[Any, Any],
    images: Features,
    texts: Features,
    rows: np.ndarray,
    test: np.ndarray,
    groups: list[str | None],
    seed: int,
) -> dict[str, Any]:
    start = time.perf_counter()
    x, y = images.only(layers[0]), texts.only(layers[1])
    # Two drawings of one emoji are on one side of the validation split.
    fitted = align(
        x.take(rows), y.take(rows), method=method, groups=[groups[row] for row in rows], device="cpu", seed=seed
    )
    seconds = time.perf_counter() - start
    encoded = fitted.encode("image", x.take(test)), fitted.encode("text", y.take(test))
    both = image_text_retrieval(*encoded, np.arange(len(test)))
    figures = {direction: {name: found[name] for name in FIGURES} for direction, found in both.items()}
    return {**figures, "layers": list(layers), "step": fitted.step, "seconds": seconds, "learned": fitted.learned}


def markdown(results: dict[str, Any], sizes: list[int], seeds: list[int], tested: int) -> str:
    chance = chance_retrieval(np.arange(tested), tested)
    lines = [
        "| pairs | layers | method | I2T R@1 | R@5 | R@10 | T2I R@1 | R@5 | R@10 |",
        "|---|---|---|---|---|---|---|---|---|",
        "| - | - | chance | " + " | ".join(f"{chance[d][k]:.3f}" for d in ("image_to_text", "text_to_image")
                                          for k in FIGURES[:3]) + " |",
    ]  # fmt: skip
    for pairs in sizes:
        for choice, title in CHOICES.items():
            for method in METHODS:
                found = [results[f"{pairs}/{seed}/{choice}/{method}"] for seed in seeds]
                mean: dict[str, float] = defaultdict(float)
                for one in found:
                    for direction in ("image_to_text", "text_to_image"):
                        for name in FIGURES[:3]:
                            mean[f"{direction}{name}"] += one[direction][name] / len(found)
                cells = " | ".join(f"{value:.3f}" for value in mean.values())
                lines.append(f"| {pairs:,} | {title} | {method} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
