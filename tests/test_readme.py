"""README's snippets run as they stand: joining two encoders on photographs, an upgrade on an index of colours,
what an encoder overlooks with tiny models."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmalign import Encoder, load_encoder
from retrieval import ImageIndex

README = Path(__file__).parents[1] / "README.md"


def python_block(title: str) -> str:
    """The only Python of a section."""
    section = README.read_text(encoding="utf-8").partition(title)[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(block)


def test_upgrading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "retrieval"))
    import colour_encoder

    monkeypatch.chdir(tmp_path)
    colour_encoder.paint_folder(tmp_path / "photos", 60).rename(tmp_path / "captions.jsonl")
    ImageIndex.build("photos", encoder="colour:weak")
    made: dict[str, Any] = {"__name__": "pasted"}
    exec(python_block("## Change the encoder").replace('"ENCODER"', '"colour:strong"'), made)
    assert "advice: " in capsys.readouterr().out
    assert len(made["hits"]) == 10
    assert ImageIndex.open("photos").manifest["encoder"]["spec"] == "colour:weak", "rolled back"


def test_finding_what_an_encoder_overlooks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photos: Path, captions: list[dict[str, Any]], clip_folder: Path,
    blip2_folder: Path, tiny_timm: Encoder, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "photos").mkdir()
    chosen = captions[:10]
    for row in chosen:
        shutil.copy(photos / row["file"], tmp_path / "photos" / row["file"])
    lines = [json.dumps({"file": f"photos/{row['file']}", "objects": row["objects"]}) for row in chosen]
    (tmp_path / "boxes.json").write_text("\n".join(lines), encoding="utf-8")
    shutil.copy(photos / chosen[0]["file"], tmp_path / "cup.jpg")
    monkeypatch.chdir(tmp_path)
    block = python_block("## Find what an encoder overlooks")
    quickly = f"teacher={str(tiny_timm.save(tmp_path / 'teacher'))!r}, steps=1, batch_size=4, test=0.3"
    for ours, theirs in (
        ("open_clip:ViT-L-14/openai", f"transformers:{clip_folder}"), ("Salesforce/blip2-itm-vit-g", str(blip2_folder)),
        ('adaptation="lora"', f'adaptation="lora", {quickly}'),
    ):  # fmt: skip
        assert ours in block
        block = block.replace(ours, theirs)
    tiny = load_encoder(f"transformers:{clip_folder}", device="cpu")
    images = [tiny.load_image(photos / row["file"]) for row in chosen[:2]]
    made: dict[str, Any] = {
        "__name__": "pasted",
        "pixel_values": torch.stack([pixels for _, pixels in images]),
        "image_sizes": [decoded.pixels.shape[:0:-1] for decoded, _ in images],
        "boxes": [[[120, 60, 300, 220]], []],
    }
    exec(block, made)
    plain = load_encoder("mine", device="cpu").encode_pixels(made["pixel_values"])
    assert not np.array_equal(made["rows"][0], plain[0])
    assert np.array_equal(made["rows"][1], plain[1])
    assert len(made["index"]) == 10
    assert {"cup", "coke"} <= set(re.findall(r"\w+", capsys.readouterr().out))


@pytest.mark.slow
def test_joining_encoders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photos: Path, captions: list[dict[str, Any]]
) -> None:
    block = python_block("## Join two encoders")
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


def test_rewards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a tiny pipeline, in few and small steps."""
    block = python_block("## Score, pick and align")
    for plain, small in (
        ("n=16, keep=2,", 'n=6, keep=2, model="tiny:sdxl", steps=4,'),
        (
            'output="runs/fox",',
            'output="runs/fox", model="tiny:sdxl", resolution=64, sampling_steps=2, steps=1, accumulation=1,',
        ),
    ):
        assert plain in block
        block = block.replace(plain, small)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a fox\na boat\n", encoding="utf-8")
    exec(block, {"__name__": "pasted"})
    out = capsys.readouterr().out
    assert "% of the network calls saved" in out
    assert "within_prompt_similarity" in out
