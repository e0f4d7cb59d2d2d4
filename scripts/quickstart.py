"""What quickstart.sh runs once everything is installed: index, search, draw."""

import hashlib
import sys
from pathlib import Path

from mmalign.errors import MMAlignError
from retrieval import ImageIndex, draw_grid

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "tests" / "data" / "photos"
SAMPLE_QUERIES = ["an elephant", "pizza", "a bus", "a laptop on a desk", "a kitchen with a stove", "a rhinoceros"]
QUERIES = ["a dog", "food on a plate", "a car on the street", "a building", "flowers", "the sea"]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLES
    name = "samples" if folder == SAMPLES else hashlib.sha256(bytes(folder)).hexdigest()[:8]
    out = ROOT / "quickstart" / f"index-{name}"
    print(f"indexing {folder}")
    index, report = ImageIndex.build(folder, out, encoder="bundled", progress=True)
    print(f"{len(index)} images: {report.added} new, {report.unchanged} unchanged, {len(report.skipped)} skipped")
    for entry in report.skipped[:5]:
        print(f"  skipped ({entry['reason']}): {entry['message']}")
    queries = SAMPLE_QUERIES if folder == SAMPLES else QUERIES
    surely = 0.95 if index.snapshot.partition.calibration else None
    # Fewer and surer: what hardly stands out is left out, and a query without an answer says so.
    results = [(query, index.search(query, 4, min_match=surely)) for query in queries]
    for query, hits in results:
        print(f"\n{query}")
        if not hits:
            print("  nothing here matches")
        for hit in hits:
            match = "" if hit.match is None else f"  match {hit.match:.2f}"
            print(f"  {hit.rank}  cosine {hit.score:.3f}{match}  {hit.item.name}")
    picture = draw_grid(results, ROOT / "quickstart" / f"results-{name}.png")
    print(f"\npicture of the results: {picture}")
    print(f'now ask yourself: .venv/bin/mmalign search {out} "any words" --grid hits.png')


if __name__ == "__main__":
    try:
        main()
    except MMAlignError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to go on")
