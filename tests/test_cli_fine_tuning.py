"""`mmalign train oca`: what it makes, says and refuses; and its queries in an index of the old encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign import load_encoder
from mmalign.encoders.compatible import CompatibleEncoder
from mmalign.encoders.timm import TimmEncoder, preprocessing_of

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["--backbone", "test_resnet", "--no-pretrained", "--extra-dim", "4", "--batch-size", "8", "--image-size", "32",
         "--test", "0.25", "--device", "cpu", "-q"]  # fmt: skip
SHORT = [*QUICK, "--epochs", "1", "--warmup-epochs", "0"]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder folder of six dimensions."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = timm.create_model("test_resnet", num_classes=6)
    preprocessing = replace(preprocessing_of(model), size=(32, 32), resize_to=None)
    options = {"num_classes": 6}
    encoder = TimmEncoder(model, "test_resnet", "old", options=options, preprocessing=preprocessing)
    return encoder.save(tmp_path_factory.mktemp("old") / "old")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two folders of ten images each, and one file that is none."""
    rng = np.random.default_rng(0)
    for name, colour in (("blue", (40, 60, 200)), ("red", (200, 50, 40))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(10):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def test_a_run_and_its_queries_in_the_old_index(
    command_line: Callable[..., Any], images: Path, old: Path, tmp_path: Path
) -> None:
    from retrieval import ImageIndex

    result = command_line("train", "oca", images, tmp_path / "new", "--old", old, *SHORT)
    assert result.code == 0, result.err
    assert "new queries, old index" in result.out
    assert "compatible" in result.out.splitlines()[-1]
    assert "15 training images of 2 classes, 5 to measure on" in result.out
    assert str(tmp_path / "new") in result.err
    new = load_encoder(tmp_path / "new", device="cpu")
    assert isinstance(new, CompatibleEncoder)

    assert command_line("index", images, "--encoder", old, "--device", "cpu", "-q").code == 0
    index = ImageIndex.open(images)
    queries = new.compatible_rows(new.encode_images(sorted(images.rglob("*.png"))[:3]))
    scores, rows = index.search_vectors(queries, 4)
    gallery = load_encoder(old, device="cpu").encode_images(sorted(images.rglob("*.png")))
    # The index may have encoded in half precision.
    np.testing.assert_allclose(scores, -np.sort(-(queries @ gallery.T))[:, :4], atol=5e-3)
    assert rows.min() >= 0


def test_json_and_what_was_left_out(command_line: Callable[..., Any], images: Path, old: Path, tmp_path: Path) -> None:
    (images / "red" / "broken.png").write_bytes(b"nothing")
    arguments = ["--old", old, *SHORT, "--weights", "1", "2", "3", "--orthogonal-map", "householder", "--no-flip",
                 "--learning-rate", "0.01", "--weight-decay", "0", "--label-smoothing", "0.2", "--seed", "3",
                 "--json"]  # fmt: skip
    result = command_line("train", "oca", images, tmp_path / "new", *arguments)
    assert result.code == 4
    assert "1 images could not be read" in result.err
    assert "broken.png" in result.err
    report = json.loads(result.out)
    given = {"weights": [1, 2, 3], "orthogonal_map": "householder", "flip": False, "learning_rate": 0.01, "seed": 3,
             "weight_decay": 0, "label_smoothing": 0.2, "extra_dim": 4, "epochs": 1, "warmup_epochs": 0,
             "batch_size": 8, "image_size": 32, "backbone": "test_resnet", "pretrained": False}  # fmt: skip
    assert {name: report["settings"][name] for name in given} == given
    line = report["history"][0]
    assert line["loss"] == pytest.approx(line["ce"] + 2 * line["bct"] + 3 * line["cos"], rel=1e-5)


def test_defaults_are_the_published_ones(
    command_line: Callable[..., Any], images: Path, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the command and of the function alike."""
    import inspect

    from mmalign import fine_tuning
    from mmalign.errors import InputError

    given: dict[str, Any] = {}

    def note(data: Path, out: Path, **options: Any) -> None:
        given.update(options)
        raise InputError("enough")

    function = fine_tuning.fine_tune_compatible
    monkeypatch.setattr(fine_tuning, "fine_tune_compatible", note)
    command_line("train", "oca", images, tmp_path / "new", "--old", old, "--backbone", "resnet50")
    published = {"extra_dim": 32, "epochs": 100, "warmup_epochs": 5, "batch_size": 64, "learning_rate": 1e-3,
                 "weight_decay": 2**-15, "label_smoothing": 0.1, "weights": (5, 10, 5), "image_size": 224,
                 "flip": True}  # fmt: skip
    assert {name: given[name] for name in published} == published
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is not parameter.empty and name != "progress":
            assert given[name] == parameter.default, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "nosuchnet"], "error: timm has no model 'nosuchnet'"),
        (["--warmup-epochs", "1"], "error: warmup_epochs is 1 and epochs 1; give fewer"),
        (["--old", "nowhere"], "error: encoder 'nowhere' is neither a folder"),
        (["--orthogonal-map", "qr"], "error: orthogonal_map is 'qr'; give one of cayley"),
    ],
)
def test_errors_are_one_line(
    command_line: Callable[..., Any], images: Path, old: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = command_line("train", "oca", images, tmp_path / "new", "--old", old, *SHORT, *arguments)
    assert result.code == 1
    assert result.err.startswith(message)
    assert result.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_help_teaches(command_line: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    overview = command_line("train", "--help").out
    assert "oca" in overview
    assert "diffusion-dpo" in overview
    shown = command_line("train", "oca", "--help").out
    assert "mmalign train oca products/ new --old old-encoder --backbone resnet50" in shown
    for option in ("--old", "--backbone", "--pretrained", "--extra-dim", "--label-smoothing", "--orthogonal-map"):
        assert option in shown
