"""python scripts/upgrade_drawings.py [--out runs/upgrade] [--sample 800] [--splits 5] [--seed 0]

Changes the encoder of a real index while it is searched, on tests/data/drawings.zip (emoji and clip art with names and
keywords), without a hub. Both encoders join EfficientNet-Lite2 and all-MiniLM-L6-v2: the old one by ridge regression on
300 captioned drawings, the new one by shrunk CCA on 1,171. The index holds 1,644 drawings that neither has seen, each
with its caption as a query in words.

Measures on a sample, starts, and backfills in steps; after each, every query of the support set is put to the index as
it is searched, and to the old encoder alone. When all is embedded, the report is made again on all, for a few
random splits of the queries into those that fit, choose and measure. Then it switches, and the index is compared with
one built anew. OUT/table.md, OUT/upgrade.png, OUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mmalign import Encoder, align, extract_features, load_encoder
from mmalign.files import whole_file
from mmalign.pairs import read_captioned
from mmalign.partial_backfill import backfill_order, curve_area
from mmalign.plotting import name_axes, new_figure, save_figure
from retrieval import ImageIndex, IndexUpgrade, evaluate_captions, read_captions
from retrieval.upgrading.bridge import Bridge
from retrieval.upgrading.measuring import Gallery, Task, measure_kinds
from retrieval.upgrading.report import TITLES

DATA = Path(__file__).parent.parent / "tests" / "data" / "drawings.zip"
STEPS = 6
DEPTHS = ("hit@1", "hit@10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/upgrade"))
    parser.add_argument("--sample", type=int, default=800, help="images to measure on (default: 800)")
    parser.add_argument("--splits", type=int, default=5, help="of the queries, for the table (default: 5)")
    parser.add_argument("--order", default="auto", help="see `mmalign upgrade --help` (default: auto)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    out: Path = given.out
    start = time.perf_counter()
    folder, captions, training = unpack(out, given.seed)
    old, new = joined(out, "old", training[:300], "ridge"), joined(out, "new", training, "cca")
    shutil.rmtree(out / "index", ignore_errors=True)
    index, _ = ImageIndex.build(folder, out / "index", encoder=old, progress=True)
    before = through(index, captions)
    upgrade = IndexUpgrade(out / "index", new, encoder=old)
    report = upgrade.measure(captions, sample=given.sample, order=given.order, seed=given.seed, progress=True)
    print("\n".join(report.lines()), flush=True)
    upgrade.start(order=given.order, seed=given.seed, force=True, progress=True)
    steps = [look(upgrade)]
    each = -(-upgrade.status().remaining // STEPS)
    while upgrade.status().remaining:
        upgrade.backfill(limit=each, progress=True)
        steps.append(look(upgrade))
        print(json.dumps(steps[-1]), flush=True)
    splits = on_all(out / "index", old, new, captions, given.splits)
    archive = upgrade.finish(progress=True)
    after = through(ImageIndex.open(out / "index", encoder=new), captions)
    shutil.rmtree(out / "fresh", ignore_errors=True)
    fresh, _ = ImageIndex.build(folder, out / "fresh", encoder=new, progress=True)
    ends = {"old index": before, "after the switch": after, "new index": through(fresh, captions)}
    results = {"report": report.to_dict(), "steps": steps, "splits": splits, "ends": ends}
    text = table(splits, steps, ends)
    for name, content in (("results.json", json.dumps(results, indent=1)), ("table.md", text)):
        with whole_file(out / name) as path:
            path.write_text(content)
    draw(out / "upgrade.png", splits, steps)
    print(f"{text}\nthe old index is in {archive}; {time.perf_counter() - start:.0f} s in all")


def unpack(out: Path, seed: int) -> tuple[Path, Path, list[tuple[Path, str]]]:
    """A folder of drawings to index, their captions, and (file, caption) of others to fit encoders on."""
    if not (out / "data" / "captions.jsonl").is_file():
        with zipfile.ZipFile(DATA) as packed:
            packed.extractall(out / "data")
    drawings, root = read_captioned(out / "data")
    drawings = [drawing for drawing in drawings if not drawing.file.startswith("emoji/noto")]  # one style of each emoji
    known = [place for place, drawing in enumerate(drawings) if drawing.split != "test"]
    training = np.random.default_rng(seed).permutation(known)[: len(known) // 2].tolist()
    indexed = [drawing for place, drawing in enumerate(drawings) if place not in set(training)]
    shutil.rmtree(out / "images", ignore_errors=True)
    for drawing in indexed:
        (out / "images" / drawing.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / drawing.file, out / "images" / drawing.file)
    captions = out / "captions.jsonl"
    captions.write_text("\n".join(json.dumps({"file": d.file, "caption": d.captions[0]}) for d in indexed))
    return out / "images", captions, [(root / drawings[place].file, drawings[place].captions[0]) for place in training]


def joined(out: Path, name: str, pairs: list[tuple[Path, str]], method: str) -> Encoder:
    """Both networks joined on pairs, fitted once."""
    folder = out / f"{name}-{len(pairs)}-{method}"
    if not (folder / "encoder.json").is_file():
        image_encoder, text_encoder = (load_encoder(f"bundled:{side}", device="cpu") for side in ("image", "text"))
        x = extract_features(image_encoder, [path for path, _ in pairs], cache=out / "features", progress=True)
        y = extract_features(text_encoder, [text for _, text in pairs], cache=out / "features", progress=True)
        align(x, y, method=method, device="cpu").encoder(image_encoder, text_encoder).save(folder)
    return load_encoder(folder, device="cpu")


def look(upgrade: IndexUpgrade) -> dict[str, Any]:
    """How far it is, and hit@1 and hit@10 of the support set by the mode in force and by the old encoder."""
    status = upgrade.status()
    found: dict[str, Any] = {"share": status.moved / status.images}
    for kind, figures in status.checked.items():
        mode = status.modes[kind]
        found[kind] = {"mode": mode, "now": figures[mode], "old": figures["old"]}
    return found


def on_all(folder: Path, old: Encoder, new: Encoder, captions: Path, splits: int) -> dict[str, Any]:
    """Means and standard deviations over splits of what the report says, every drawing in the gallery.

    A third of the queries, and the drawings they ask for, is fitted on, a sixth chooses, half measures.
    """
    snapshot = ImageIndex.open(folder).snapshot
    live = snapshot.upgrade
    assert live is not None
    rows = np.flatnonzero(snapshot.alive)
    place_of_row = {int(row): place for place, row in enumerate(rows)}
    stored = snapshot.vectors.gather(rows), live.partition.vectors.gather(live.new_row[rows])
    gallery = Gallery(*stored, backfill_order("density", stored[0]))
    text_of = dict(read_captions(captions))
    items = [snapshot.items.item(position) for position in range(len(snapshot.items))]
    texts = [text_of[item.name][0] for item in items]
    asked = {
        "text": (
            old.encode_texts(texts),
            new.encode_texts(texts),
            np.array([place_of_row[item.row] for item in items]),
        )
    }
    crops = Bridge.read(folder, live.about["bridge"]).support["image"]
    row_of = {item.id: item.row for item in items}
    assert crops.old is not None
    asked["image"] = crops.old, crops.new, np.array([place_of_row[row_of[number]] for number, _ in crops.answers])
    runs: list[dict[str, Any]] = []
    for split in range(splits):
        part = np.random.default_rng((split, 9)).choice(3, len(rows), p=[1 / 3, 1 / 6, 1 / 2])
        tasks = {kind: Task(kind, "", *both, target, part[target]) for kind, (*both, target) in asked.items()}
        free = part == 0
        images = gallery.old[free], gallery.new[free]
        fitting = free[asked["text"][2]]
        words = asked["text"][0][fitting], asked["text"][1][fitting]
        sources = {
            "images": images,
            "texts": words,
            "both": tuple(map(np.concatenate, zip(images, words, strict=True))),
        }
        reports, _, _ = measure_kinds(gallery, tasks, sources, seed=split)  # type: ignore[arg-type]
        runs.append(
            {kind: {"figures": one.figures, "chosen": one.chosen, "curve": one.curve} for kind, one in reports.items()}
        )
    found: dict[str, Any] = {"runs": runs}
    for kind in asked:
        figures = {
            name: {k: _mean([run[kind]["figures"][name][k] for run in runs]) for k in DEPTHS}
            for name in TITLES
            if name in runs[0][kind]["figures"]
        }
        curve = {k: np.mean([run[kind]["curve"][k] for run in runs], axis=0).tolist() for k in DEPTHS}
        found[kind] = {"figures": figures, "curve": {"share": runs[0][kind]["curve"]["share"], **curve}}
        found[kind]["chosen"] = [run[kind]["chosen"] for run in runs]
        chosen = [{k: run[kind]["figures"][_figure_of(run[kind]["chosen"])][k] for k in DEPTHS} for run in runs]
        found[kind]["figures"]["chosen"] = {k: _mean([one[k] for one in chosen]) for k in DEPTHS}
    return found


def _figure_of(chosen: str) -> str:
    return "old/old" if chosen == "old" else chosen


def _mean(values: list[float]) -> list[float]:
    return [float(np.mean(values)), float(np.std(values))]


def through(index: ImageIndex, captions: Path) -> dict[str, float]:
    """hit@1 and hit@10 of all captions through the index."""
    found: dict[str, float] = evaluate_captions(index, read_captions(captions), bootstrap=0)["through_index"]
    return {k: found[k] for k in DEPTHS}


def table(splits: dict[str, Any], steps: list[dict[str, Any]], ends: dict[str, dict[str, float]]) -> str:
    """Markdown: means over the splits, the curves, and what searches of the support set found on the way."""
    kinds = [kind for kind in ("text", "image") if kind in splits]
    lines = ["| | " + " | ".join(f"{kind} R@1 | R@10" for kind in kinds) + " |", "|---|" + "---|" * (2 * len(kinds))]
    for name in ("old/old", "procrustes", "slerp", "lambda", "chosen", "forward", "new/new"):
        cells = [splits[kind]["figures"][name][k] for kind in kinds for k in DEPTHS]
        title = TITLES.get(name, "the bridge chosen by other queries")
        lines.append(f"| {title} | " + " | ".join(f"{mean:.3f} ± {std:.3f}" for mean, std in cells) + " |")
    lines += [
        "",
        "| embedded anew | " + " | ".join(f"{share:.0%}" for share in splits[kinds[0]]["curve"]["share"]) + " | mean |",
    ]
    lines.append("|---|" + "---|" * (len(splits[kinds[0]]["curve"]["share"]) + 1))
    for kind in kinds:
        for k, name in zip(DEPTHS, ("R@1", "R@10"), strict=True):
            values = splits[kind]["curve"][k]
            area, _ = curve_area(splits[kind]["curve"]["share"], values)
            lines.append(f"| {kind} {name} | " + " | ".join(f"{value:.3f}" for value in values) + f" | {area:.3f} |")
    lines += [
        "",
        "| support set, as searched | "
        + " | ".join(f"{k}: mode | R@1 | R@10 | old R@1 | old R@10" for k in kinds)
        + " |",
    ]
    lines.append("|---|" + "---|" * (5 * len(kinds)))
    for step in steps:
        row = []
        for kind in kinds:
            found = step[kind]
            row += [found["mode"], *(f"{value:.3f}" for value in (*found["now"], *found["old"]))]
        lines.append(f"| {step['share']:.0%} embedded anew | " + " | ".join(row) + " |")
    said = "; ".join(f"{name}: R@1 {found['hit@1']:.4f}, R@10 {found['hit@10']:.4f}" for name, found in ends.items())
    return "\n".join(lines) + f"\n\nall captions through the index: {said}\n"


def draw(path: Path, splits: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    """Curves of both kinds, mean over the splits, between what the old and the new encoder give alone."""
    kinds = [kind for kind in ("text", "image") if kind in splits]
    figure, axes = new_figure(len(kinds), 3.6, 4.6)
    for axis, kind in zip(axes, kinds, strict=True):
        one = splits[kind]
        for place, (k, name) in enumerate(zip(DEPTHS, ("R@1", "R@10"), strict=True)):
            shares = [100 * share for share in one["curve"]["share"]]
            axis.plot(shares, one["curve"][k], "o-", markersize=4, color=f"C{place}", label=f"{name} on the way")
            for way, style in (("old/old", ":"), ("new/new", "--")):
                axis.axhline(one["figures"][way][k][0], linestyle=style, color=f"C{place}", label=f"{name} {way}")
        name_axes(axis, f"{kind} queries", "images embedded anew, %", "")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, frameon=False)
    with whole_file(path) as fresh:
        save_figure(figure, fresh)


if __name__ == "__main__":
    main()
