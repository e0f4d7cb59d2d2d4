"""What the bundled encoder reaches on the 76 sample photographs, through the real command line.

    python scripts/eval_bundled.py

Prints text-to-image and image-to-text retrieval, and how well the match score tells queries that have an answer (the
380 captions) from queries that have none (things that are in no photograph).
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from retrieval import ImageIndex, read_captions

PHOTOS = Path(__file__).resolve().parent.parent / "tests" / "data" / "photos"
ABSENT = [
    "a rhinoceros", "a violin", "a submarine", "a volcano erupting", "an x-ray of a hand", "a penguin on ice",
    "a spider web", "sheet music", "an octopus", "a snowplow", "a fossil", "a tank in battle", "a shark", "a peacock",
    "a hot air balloon", "a lighthouse", "a castle", "a camel in the desert", "a microscope", "a sewing machine",
    "a panda", "a kangaroo", "a telescope", "a nuclear power plant", "an astronaut on the moon", "a bar chart",
    "a gorilla", "a crocodile", "a jellyfish", "a ballet dancer", "a scuba diver", "a harp", "a rifle",
    "a bee on a flower", "a butterfly", "a mushroom", "strawberries", "a waterfall", "a snail", "ancient coins",
    "a windmill", "a space shuttle", "a hamster", "a goldfish", "the Eiffel tower",
]  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "index"
        command = [sys.executable, "-m", "mmalign.cli"]
        subprocess.run([*command, "index", PHOTOS, "--out", out, "--encoder", "bundled", "--quiet"], check=True)
        subprocess.run([*command, "eval", "retrieval", out, "--captions", PHOTOS / "captions.jsonl"], check=True)
        index = ImageIndex.open(out)
        captions = [caption for _, texts in read_captions(PHOTOS / "captions.jsonl") for caption in texts]
        best = {name: [index.search(query, 1)[0].match or 0.0 for query in queries]
                for name, queries in (("captions", captions), ("absent", ABSENT))}  # fmt: skip
        print("\n--min-match   captions answered   absent things answered")
        for level in (0.5, 0.7, 0.8, 0.9, 0.95):
            kept, wrong = (sum(match >= level for match in best[name]) / len(best[name]) for name in best)
            print(f"{level:>11}   {kept:>17.2f}   {wrong:>22.2f}")


if __name__ == "__main__":
    main()
