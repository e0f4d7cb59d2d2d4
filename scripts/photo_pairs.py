"""Preference pairs from the sample photographs: each as it is, against itself blurred and badly compressed.

    python scripts/photo_pairs.py FOLDER [COUNT]

Enough to see a run from end to end; a model learns nothing worth having from them.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

PHOTOS = Path(__file__).resolve().parent.parent / "tests" / "data" / "photos"


def make_pairs(folder: Path, count: int = 24) -> int:
    """Write `metadata.jsonl` and its images, and return the number of pairs; an equal folder is left as it is."""
    from PIL import Image, ImageFilter

    rows = [json.loads(line) for line in (PHOTOS / "captions.jsonl").read_text(encoding="utf-8").splitlines()][:count]
    lines = []
    for name in ("winner", "loser"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for row in rows:
        names = {"winner": f"winner/{row['file']}", "loser": f"loser/{row['file']}"}
        shutil.copyfile(PHOTOS / row["file"], folder / names["winner"])
        if not (folder / names["loser"]).exists():
            with Image.open(PHOTOS / row["file"]) as photo:
                spoilt = photo.convert("RGB").filter(ImageFilter.GaussianBlur(3))
            buffer = io.BytesIO()
            spoilt.save(buffer, "JPEG", quality=5)
            (folder / names["loser"]).write_bytes(buffer.getvalue())
        lines.append(json.dumps({**names, "caption": row["captions"][0]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        sys.exit(str(__doc__))
    target = Path(sys.argv[1])
    made = make_pairs(target, *(int(argument) for argument in sys.argv[2:]))
    print(f"{made} pairs in {target}")
