"""python scripts/upgrade_drawings.py [--out runs/upgrade] [--images 1500] [--seed 0]

Changes the encoder of a real index while it is searched, on tests/data/drawings.zip (emoji and clip art with names and
keywords), without a hub. Old: `bundled`, EfficientNet-Lite2's ImageNet classes bridged to all-MiniLM-L6-v2. New: the
same two networks joined by shrunk CCA on their features of the training drawings, which knows drawings better. The
index holds drawings that the new encoder was not fitted on, and as many others as --images asks for; queries are names
of the former.

Prints the compatibility report, then backfills in ten steps. After each, all queries whose answer is known are put to
the index as it is searched, on the way that was chosen for it, and to the old one. OUT/table.md, OUT/upgrade.png and
OUT/results.json; a stopped run goes on.
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

from mmalign import Encoder, load_encoder
from mmalign.alignment import align_encoders
from mmalign.files import whole_file
from mmalign.pairs import read_captioned
from retrieval import ImageIndex, IndexUpgrade

DATA = Path(__file__).parent.parent / "tests" / "data" / "drawings.zip"
STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/upgrade"))
    parser.add_argument("--images", type=int, default=1500, help="in the index (default: 1500)")
    parser.add_argument("--order", default="auto", help="see `mmalign upgrade --help` (default: auto)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    out: Path = given.out
    start = time.perf_counter()
    folder, captions, training = unpack(out, given.images, given.seed)
    old = load_encoder("bundled", device="cpu")
    new = joined(out, training)
    index, _ = ImageIndex.build(folder, out / "index", encoder=old, progress=True)
    if index.manifest["upgrade"] or index.manifest["encoder"]["fingerprint"] != old.fingerprint:
        IndexUpgrade(out / "index").roll_back()
    upgrade = IndexUpgrade(out / "index", new, encoder=old)
    report = upgrade.measure(captions, order=given.order, seed=given.seed, progress=True)
    print("\n".join(report.lines()), flush=True)
    upgrade.start(order=given.order, seed=given.seed, force=True, progress=True)
    images = upgrade.status().images
    steps: list[dict[str, Any]] = []
    for step in range(STEPS + 1):
        wanted = round(images * step / STEPS)
        if wanted > (moved := upgrade.status().moved):
            upgrade.backfill(limit=wanted - moved, progress=True)
        steps.append(look(upgrade))
        print(json.dumps(steps[-1]), flush=True)
    finished = upgrade.finish(progress=True)
    print(f"archived in {finished}")
    after = through(ImageIndex.open(out / "index", encoder=new), captions)
    fresh, _ = ImageIndex.build(folder, out / "fresh", encoder=new, progress=True)
    whole = through(fresh, captions)
    results = {"report": report.to_dict(), "steps": steps, "finished": after, "fresh": whole}
    text = table(report.markdown(), steps, after, whole)
    for name, content in (("results.json", json.dumps(results, indent=1)), ("table.md", text)):
        with whole_file(out / name) as path:
            path.write_text(content)
    draw(out / "upgrade.png", steps, after)
    print(f"{text}\n{time.perf_counter() - start:.0f} s in all")


def unpack(out: Path, images: int, seed: int) -> tuple[Path, Path, Path]:
    """The folder to index, captions of what queries ask for, and captioned drawings to fit on."""
    if not (out / "data" / "captions.jsonl").is_file():
        with zipfile.ZipFile(DATA) as packed:
            packed.extractall(out / "data")
    drawings, root = read_captioned(out / "data")
    unseen = [drawing for drawing in drawings if drawing.split == "test"]
    others = [drawing for drawing in drawings if drawing.split != "test"]
    kept = np.random.default_rng(seed).permutation(len(others))[: max(0, images - len(unseen))]
    folder = out / "images"
    shutil.rmtree(folder, ignore_errors=True)
    for drawing in [*unseen, *(others[place] for place in kept)]:
        (folder / drawing.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / drawing.file, folder / drawing.file)
    captions, training = out / "queries.jsonl", out / "data" / "training.jsonl"
    lines = [json.dumps({"file": one.file, "caption": one.captions[0]}) for one in unseen]
    captions.write_text("\n".join(lines))
    lines = [json.dumps({"file": one.file, "captions": one.captions, "group": one.group}) for one in others]
    training.write_text("\n".join(lines))
    return folder, captions, training


def joined(out: Path, training: Path) -> Encoder:
    """The new encoder, fitted once."""
    if not (out / "new" / "encoder.json").is_file():
        towers = {f"{side}_encoder": load_encoder(f"bundled:{side}", device="cpu") for side in ("image", "text")}
        align_encoders(
            training, out / "new", **towers, method="cca", layers="output", options={"shrinkage": 0.3}, progress=True
        )
    return load_encoder(out / "new", device="cpu")


def look(upgrade: IndexUpgrade) -> dict[str, Any]:
    """How far it is, and hit@1 and hit@10 of the support set by the mode in force and by the old encoder."""
    status = upgrade.status()
    found: dict[str, Any] = {"share": status.moved / status.images}
    for kind, figures in status.checked.items():
        mode = status.modes[kind]
        found[kind] = {"mode": mode, "now": figures[mode], "old": figures["old"]}
    return found


def through(index: ImageIndex, captions: Path) -> list[float]:
    """hit@1 and hit@10 of all captions through the index."""
    from retrieval import evaluate_captions, read_captions

    found = evaluate_captions(index, read_captions(captions), bootstrap=0)["through_index"]
    return [found["hit@1"], found["hit@10"]]


def table(report: str, steps: list[dict[str, Any]], after: list[float], whole: list[float]) -> str:
    """Markdown: what was measured before, and what searches found on the way."""
    kinds = [kind for kind in ("text", "image") if kind in steps[0]]
    lines = ["| embedded anew | " + " | ".join(f"{k}: mode | R@1 | R@10 | old R@1 | old R@10" for k in kinds) + " |"]
    lines.append("|" + "---|" * (1 + 5 * len(kinds)))
    for step in steps:
        cells = []
        for kind in kinds:
            found = step[kind]
            cells += [found["mode"], *(f"{value:.3f}" for value in (*found["now"], *found["old"]))]
        lines.append(f"| {step['share']:.0%} | " + " | ".join(cells) + " |")
    ends = f"all captions: R@1 {after[0]:.4f}, R@10 {after[1]:.4f} after the switch; a new index of the new encoder: "
    return f"{report}\n" + "\n".join(lines) + f"\n\n{ends}R@1 {whole[0]:.4f}, R@10 {whole[1]:.4f}\n"


def draw(path: Path, steps: list[dict[str, Any]], after: list[float]) -> None:
    """R@1 and R@10 of searches while it goes on, and of the old encoder."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in ("text", "image") if kind in steps[0]]
    figure = Figure(figsize=(4.6 * len(kinds), 3.6), layout="constrained")
    shares = [100 * step["share"] for step in steps]
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for place, name in enumerate(("R@1", "R@10")):
            axis.plot(shares, [s[kind]["now"][place] for s in steps], "o-", markersize=4, color=f"C{place}", label=name)
            axis.plot(
                shares, [s[kind]["old"][place] for s in steps], ":", color=f"C{place}", label=f"{name}, old encoder"
            )
        axis.set_title(f"{kind} queries", fontsize=9)
        axis.set_xlabel("images embedded anew, %", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, frameon=False)
    with whole_file(path) as fresh:
        figure.savefig(fresh, dpi=130)


if __name__ == "__main__":
    main()
