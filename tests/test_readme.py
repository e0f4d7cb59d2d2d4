"""README's snippets on joining two encoders run as they stand, on photographs and made-up tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmalign import load_encoder
from retrieval import ImageIndex

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_joining_encoders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photos: Path, captions: list[dict[str, Any]]
) -> None:
    section = README.read_text(encoding="utf-8").partition("## Join two encoders")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    random = np.random.default_rng(0)
    shared = random.normal(size=(2, 60, 6))
    for name, hidden in zip(("audio", "depth"), shared, strict=True):
        rows = hidden @ random.normal(size=(6, 20)) + 0.1 * random.normal(size=(60, 20))
        np.save(tmp_path / f"{name}.npy", rows.astype(np.float32))
        np.save(tmp_path / f"{name}_texts.npy", random.normal(size=(60, 384)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    chosen = captions[:24]
    names = {"paths": [photos / row["file"] for row in chosen], "captions": [row["captions"][0] for row in chosen]}
    made: dict[str, Any] = {"__name__": "pasted", **names}
    exec(block, made)
    whole = load_encoder("mine", device="cpu")
    assert whole.modalities == {"image", "text"}
    assert whole.encode_texts(["a dog"]).shape == (1, whole.dim)
    index = ImageIndex.from_vectors(made["sounds"], "sounds", encoder="words")
    assert len(index.search("rain on a roof", k=3)) == 3
