"""Features of one's own through the same split, baselines and report as captioned images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmalign import Encoder, InputError, cli, extract_features, load_alignment, load_encoder
from mmalign.alignment import align_features, evaluate_on_captions, given
from mmalign.errors import EncoderMismatchError
from mmalign.features import Features

STEPS = {"steps": 30, "dim": 16}


@pytest.fixture
def tables(tmp_path: Path) -> tuple[Path, Path, Path]:
    """80 images and two texts for each, of one shared signal; images 0 and 1 are the same."""
    random = np.random.default_rng(0)
    shared = random.normal(size=(80, 6))
    shared[1] = shared[0]
    images = shared @ random.normal(size=(6, 24))
    owner = np.repeat(np.arange(80), 2)[random.permutation(160)]
    texts = shared[owner] @ random.normal(size=(6, 18)) + 0.05 * random.normal(size=(160, 18))
    paths = tmp_path / "x.npy", tmp_path / "y.npy", tmp_path / "owner.npy"
    for path, values in zip(paths, (images.astype(np.float32), texts.astype(np.float16), owner), strict=True):
        np.save(path, values)
    return paths


def test_heads_report_and_pictures_without_an_encoder(tables: tuple[Path, Path, Path], tmp_path: Path) -> None:
    x, y, owner = tables
    run = align_features(x, y, tmp_path / "heads", owner=owner, options=STEPS, test=0.25, seed=3)
    assert run.encoder is None
    assert {path.name for path in (tmp_path / "heads").iterdir()} == {
        "alignment.json", "heads.safetensors", "report.json", "report.png",
    }  # fmt: skip
    report = json.loads((tmp_path / "heads" / "report.json").read_text())
    assert list(report["retrieval"]["figures"]) == ["chance", "ridge", "cca", "structure"]
    assert report["retrieval"]["figures"]["ridge"]["text_to_image"]["hit@1"] > 0.8
    # The equal images 0 and 1 are one, wherever they are.
    assert report["pairs"]["training"] + report["pairs"]["held_out"] + report["pairs"]["test"] == 79
    again = load_alignment(tmp_path / "heads")
    np.testing.assert_array_equal(again.encode("image", x), run.alignment.encode("image", x))
    assert again.report == report
    again.save(tmp_path / "heads")
    assert json.loads((tmp_path / "heads" / "report.json").read_text()) == report


def test_with_both_encoders_it_is_an_encoder(
    tiny_timm: Encoder, tiny_sentence: Encoder, photos: Path, captions: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = captions[:30]
    files, texts = [photos / row["file"] for row in rows], [row["captions"][0] for row in rows]
    x, y = extract_features(tiny_timm, files), extract_features(tiny_sentence, texts)
    np.save(tmp_path / "x.npy", x["output"])
    run = align_features(
        tmp_path / "x.npy", y, tmp_path / "mine", method="ridge", image_encoder=tiny_timm, text_encoder=tiny_sentence
    )
    mine = load_encoder(tmp_path / "mine", device="cpu")
    np.testing.assert_allclose(mine.encode_images(files[:3]), run.alignment.encode("image", x["output"][:3]), atol=1e-5)
    assert (tmp_path / "mine" / "report.png").is_file()
    assert run.alignment.report == run.report == mine.report
    # Of a table it is not known which images its rows are: nobody is to be told that these are new to the heads.
    data = tmp_path / "captions.jsonl"
    data.write_text("".join(f"{json.dumps({**row, 'file': str(photos / row['file'])})}\n" for row in rows))
    notes = evaluate_on_captions({"mine": mine}, data)[0].notes
    assert any("which images mine was fitted on is not known" in note for note in notes)
    known = align_features(x, y, None, method="ridge", image_encoder=tiny_timm, text_encoder=tiny_sentence).encoder
    assert known is not None
    assert any("mine was fitted on 27 of these 30" in note
               for note in evaluate_on_captions({"mine": known}, data)[0].notes)  # fmt: skip
    with pytest.raises(EncoderMismatchError):
        align_features(x, x, None, image_encoder=tiny_sentence, text_encoder=tiny_timm)


def test_encoders_that_cannot_have_made_the_features_cost_no_fit(
    tables: tuple[Path, Path, Path], tiny_timm: Encoder, tiny_sentence: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given, "fit_beside_baselines", lambda *_, **__: pytest.fail("something was fitted"))
    x, y, owner = tables
    with pytest.raises(InputError, match="dimensions, the head takes 24; give the encoder"):
        align_features(x, y, None, owner=owner, image_encoder=tiny_timm, text_encoder=tiny_sentence)
    with pytest.raises(InputError, match="it has no image tower"):
        align_features(x, y, None, owner=owner, image_encoder=tiny_sentence, text_encoder=tiny_timm)


def test_images_that_cannot_be_read_do_not_join_groups() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    usable = np.arange(60) % 3 > 0
    content = [f"image {row}" if use else "" for row, use in enumerate(usable)]
    images = Features({"output": rows * usable[:, None]}, content, usable)
    run = align_features(images, rows, None, groups=(np.arange(60) // 3).tolist(), method="procrustes", test=0.2)
    assert run.report["pairs"]["test"] == 8
    assert "20 images could not be read or have no text, and are left out" in run.warnings


def test_what_is_refused(tables: tuple[Path, Path, Path], tmp_path: Path) -> None:
    x, y, owner = tables
    with pytest.raises(InputError, match="do not pair up"):
        align_features(x, y, None)
    with pytest.raises(InputError, match="neither"):
        align_features(x, y, None, owner=owner, image_encoder="bundled:image")
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match=r"holds no alignment\.json"):
        align_features(x, y, tmp_path / "photos", owner=owner)
    with pytest.raises(InputError, match="not paired"):
        align_features(x, y, None, owner=owner, method="mini-vec2vec")
    text = tmp_path / "notes.txt"
    text.write_text("no table")
    for wrong in ({"image_features": text, "owner": owner}, {"image_features": x, "owner": text}):
        with pytest.raises(InputError, match=r"it is no \.npy file"):
            align_features(**wrong, text_features=y, out=None)
    bad = np.load(x)
    bad[7, 3] = np.nan
    with pytest.raises(InputError, match="7"):
        align_features(bad, y, None, owner=owner)


def test_command_line(tables: tuple[Path, Path, Path], tmp_path: Path, command_line: Callable[..., Any]) -> None:
    x, y, owner = tables
    out = tmp_path / "heads"
    own = ("--image-features", x, "--text-features", y)
    done = command_line("align", *own, "--owner", owner, "--out", out, "--method", "cca", "-q")
    assert done.code == 0, done.err
    assert "chance" in done.out
    assert "load_alignment" in done.err
    assert load_alignment(out).method == "cca"
    without_effect = command_line("align", *own, "--owner", owner, "--out", out, "--layers", "last", "--dtype", "auto")
    assert without_effect.code == 1
    assert "--layers, --dtype" in without_effect.err
    assert "belong together" in command_line("align", "--image-features", x, "--out", out).err
    assert "--image-encoder" in command_line("align", "--out", out).err


def test_command_line_says_that_images_were_left_out(
    tiny_timm: Encoder, photos: Path, captions: list[dict[str, Any]], tmp_path: Path, command_line: Callable[..., Any]
) -> None:
    files = [*(photos / row["file"] for row in captions[:20]), tmp_path / "gone.jpg"]
    x = extract_features(tiny_timm, files, cache=tmp_path / "cache")
    assert x.folder is not None
    np.save(tmp_path / "y.npy", np.random.default_rng(0).normal(size=(21, 6)))
    own = ("--image-features", x.folder, "--text-features", tmp_path / "y.npy", "--method", "procrustes")
    for words in ((), ("--json",)):
        done = command_line("align", *own, "--out", tmp_path / "heads", "-q", *words)
        assert done.code == cli.PARTIAL
        assert "1 images could not be read" in done.err
    assert json.loads(done.out)["skipped"][0]["row"] == 20
