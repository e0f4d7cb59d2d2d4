"""Kernel alignment of real models' layouts: what is trained, what stays, that a stopped run ends in the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmalign import Encoder, load_encoder
from mmalign.errors import InputError, NonFiniteLossError
from mmalign.fine_tuning import align_to_teacher
from mmalign.fine_tuning import loop as looping
from mmalign.fine_tuning.kernel import report as reporting
from mmalign.fine_tuning.kernel import running
from mmalign.fine_tuning.kernel.recipe import Recipe
from mmalign.fine_tuning.kernel.tower import Tower
from mmalign.fine_tuning.kernel.training import KernelAlignmentLoop
from mmalign.imaging import ImagePreprocessing
from mmalign.kernel_alignment import (
    PolynomialKernel,
    fit_kernel_offset,
    kernel_alignment_loss,
    kernel_matrix,
    teacher_kernel,
)
from mmalign.object_aware import BoxesFile, ObjectAwareEncoder

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"batch_size": 6, "steps": 4, "learning_rate": 1e-3, "test": 0.3, "device": "cpu", "workers": 1}


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.name != "test_a_folder_of_images_without_captions":  # which looks at them
        monkeypatch.setattr(reporting, "_draw", lambda *_: None)


@pytest.fixture(scope="module")
def some(photos: Path, captions: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty photographs of at most 96 px with captions and a class, by their first object."""
    folder = tmp_path_factory.mktemp("some")
    lines = []
    for row in captions[:20]:
        with Image.open(photos / row["file"]) as image:
            image.thumbnail((96, 96))
            image.convert("RGB").save(folder / f"{row['file']}.png")
        label = row["objects"][0]["category"] if row["objects"] else "none"
        lines.append({"file": f"{row['file']}.png", "captions": row["captions"][:2], "label": label})
    (folder / "captions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture
def run(some: Path, tiny_timm: Encoder, tmp_path: Path) -> Callable[..., Any]:
    def of(student: Any, out: str = "out", **given: Any) -> Any:
        options = {**SMALL, "teacher": tiny_timm, **given}
        return align_to_teacher(options.pop("data", some), tmp_path / out, student=student, **options)

    return of


def state(encoder: Encoder) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in encoder.model.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# -- what is trained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptation", ["full", "lora"])
@pytest.mark.parametrize("kind", ["tiny_open_clip", "tiny_clip", "tiny_siglip"])
def test_the_image_tower_learns_and_the_text_tower_stays(
    request: pytest.FixtureRequest, run: Callable[..., Any], kind: str, adaptation: str, some: Path
) -> None:
    student: Encoder = request.getfixturevalue(kind)
    before = state(student)
    report = run(student, adaptation=adaptation, rank=4 if adaptation == "lora" else None)
    assert not changed(before, state(student)), "the encoder given is not the one that is trained"
    made = load_encoder(str(report.folder), device="cpu")
    assert type(made) is type(student)
    assert made.fingerprint != student.fingerprint
    touched = changed(before, state(made))
    assert touched
    assert all(name.startswith(("visual", "vision_model")) for name in touched), touched
    if adaptation == "full":
        tower = {name for name, value in before.items() if name.startswith("vis") and value.is_floating_point()}
        assert len(touched) > 0.9 * len(tower)
    texts = ["a red bus", "two dogs"]  # the weights are the same bits; products of them follow where they lie in memory
    np.testing.assert_allclose(made.encode_texts(texts), student.encode_texts(texts), rtol=0, atol=1e-6)
    files = sorted(some.glob("*.png"))[:3]
    assert not np.allclose(made.encode_images(files), student.encode_images(files), atol=1e-4)
    assert report.counts["training"] + report.counts["test"] == 20
    assert report.retrieval is not None
    assert report.retrieval["figures"].keys() == {"chance", "before", "after"}


def test_the_bundled_encoder_keeps_its_class_vectors_and_words(bundled: Encoder, run: Callable[..., Any]) -> None:
    report = run(bundled, steps=1, batch_size=2, learning_rate=1e-4, teacher=bundled, test=0.2)
    made: Any = load_encoder(str(report.folder), device="cpu")
    assert type(made) is type(bundled)
    np.testing.assert_allclose(made.encode_texts(["a dog"]), bundled.encode_texts(["a dog"]), rtol=0, atol=1e-6)
    for name, value in made.weights.items():
        assert torch.equal(value, bundled.weights[name])  # type: ignore[attr-defined]
    before = state(bundled)
    touched = changed(before, state(made))
    assert touched
    assert all(name.startswith("image.") and "running" not in name and "tracked" not in name for name in touched)


def test_one_step_is_the_published_one(tiny_open_clip: Encoder, tiny_timm: Encoder, run: Callable[..., Any],
                                       some: Path) -> None:  # fmt: skip
    """All training images in one batch; AdamW's first step and the loss, worked out here."""
    options = {"steps": 1, "batch_size": 64, "warmup": 0.0, "weight_decay": 0.0, "offset": 0.5, "weight": 3.0}
    report = run(tiny_open_clip, **options, learning_rate=1e-4)
    held = {row["file"] for row in rows_of(some, report)}
    files = [some / row["file"] for row in lines_of(some) if row["file"] not in held]
    assert len(files) == report.counts["training"]
    pixels = torch.stack([tiny_open_clip.load_image(file)[1] for file in files])
    guide = torch.stack([tiny_timm.load_image(file)[1] for file in files])
    with torch.no_grad():
        z0, t = tiny_open_clip.image_features(pixels), tiny_timm.image_features(guide)
    z = z0.clone().requires_grad_()
    loss = kernel_alignment_loss(z, z0, t, PolynomialKernel(0.5), teacher_kernel(t.shape[1]), weight=3.0)
    line = report.history[0]
    assert line["align"] == pytest.approx(float(loss.align.detach()), rel=1e-3)
    assert line["reg"] == pytest.approx(0, abs=1e-6)
    assert line["loss"] == pytest.approx(3 * line["align"], rel=1e-4)
    # The gradient of the features is that of the tower's last bias: what AdamW's first step moves it by has its sign.
    made: Any = load_encoder(str(report.folder), device="cpu")
    moved = made.model.visual.proj - tiny_open_clip.model.visual.proj  # type: ignore[union-attr,operator]
    (gradient,) = torch.autograd.grad(loss.total, z)
    with torch.no_grad():
        pooled = torch.linalg.lstsq(tiny_open_clip.model.visual.proj.T, z0.T).solution.T  # type: ignore[union-attr,operator]
    expected = -torch.sign(pooled.T @ gradient)
    assert (torch.sign(moved.detach()) == expected).float().mean() > 0.6
    assert moved.detach().abs().max() == pytest.approx(1e-4, rel=0.05)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


def rows_of(folder: Path, report: Any) -> list[dict[str, Any]]:
    """The held-out lines, found again by the split's own rule."""
    images, root = running.read_images(folder)
    splits = running.ImageSplits.of(images, [root / i.file for i in images], test=SMALL["test"], duplicates="drop",
                                    seed=0, workers=1, progress=False)  # fmt: skip
    rows = [row for row, held in zip(lines_of(folder), splits.test, strict=True) if held]
    assert len(rows) == report.counts["test"]
    return rows


def test_the_kernel_error_falls_and_without_the_penalty_texts_are_lost(
    tiny_clip: Encoder, run: Callable[..., Any]
) -> None:
    options = {"steps": 60, "batch_size": 12, "learning_rate": 2e-3, "check_every": 20, "weight": 2000.0}
    kept = run(tiny_clip, "kept", **options)
    lost = run(tiny_clip, "lost", **options, reg_weight=0.0)
    for report in (kept, lost):
        assert report.history[-1]["align"] < 0.8 * report.history[0]["align"]
        assert [line["step"] for line in report.history] == [20, 40, 60]
    assert kept.drift["cosine_mean"] > lost.drift["cosine_mean"] + 0.02
    assert kept.drift["shift_max"] <= kept.drift["bound_max"] + 1e-6


def test_the_report_is_what_can_be_measured_again(
    tiny_open_clip: Encoder, tiny_timm: Encoder, run: Callable[..., Any], some: Path
) -> None:
    import open_clip

    report = run(tiny_open_clip, steps=6, learning_rate=3e-3)
    made = load_encoder(str(report.folder), device="cpu")
    rows = rows_of(some, report)
    files = [some / row["file"] for row in rows]
    features = {}
    for name, encoder in (("before", tiny_open_clip), ("after", made), ("teacher", tiny_timm)):
        with torch.no_grad():
            features[name] = encoder.image_features(torch.stack([encoder.load_image(file)[1] for file in files]))
    guide = kernel_matrix(features["teacher"], teacher_kernel(features["teacher"].shape[1]))
    apart = ~torch.eye(len(files), dtype=torch.bool)
    for when in ("before", "after"):
        own = kernel_matrix(features[when], PolynomialKernel(report.kernels["student"]["offset"]))
        assert report.kernel[when]["align"] == pytest.approx(float((own - guide)[apart].square().mean()), rel=1e-3)
    cosines = torch.cosine_similarity(features["before"], features["after"])
    assert report.drift["cosine_mean"] == pytest.approx(float(cosines.mean()), abs=1e-5)
    assert report.drift["cosine_p5"] == pytest.approx(float(np.percentile(cosines, 5)), abs=1e-5)
    texts = [caption for row in rows for caption in row["captions"]]
    found = made.encode_images(files) @ made.encode_texts(texts).T
    hits = [found[:, at].argmax() == at // 2 for at in range(len(texts))]
    assert report.retrieval["figures"]["after"]["text_to_image"]["hit@1"] == pytest.approx(np.mean(hits))
    assert report.history[-1]["text_hit@1"] == pytest.approx(np.mean(hits))
    assert report.zero_shot.keys() == {"chance", "before", "after"}
    classes = sorted({row["label"] for row in rows})
    assert len(classes) > 2
    for when, encoder in (("before", tiny_open_clip), ("after", made)):
        rows_of_classes = [encoder.encode_texts([make(name) for make in open_clip.SIMPLE_IMAGENET_TEMPLATES])
                           for name in classes]  # fmt: skip
        means = np.stack([part.mean(axis=0) / np.linalg.norm(part.mean(axis=0)) for part in rows_of_classes])
        guessed = (encoder.encode_images(files) @ means.T).argmax(axis=1)
        right = [classes[guess] == row["label"] for guess, row in zip(guessed, rows, strict=True)]
        assert report.zero_shot[when]["top1_micro"] == pytest.approx(np.mean(right))
    shift = np.abs(
        (made.encode_images(files) - tiny_open_clip.encode_images(files)) @ tiny_open_clip.encode_texts(texts).T
    )
    assert report.drift["shift_mean"] == pytest.approx(shift.mean(), abs=1e-6)
    assert report.drift["shift_max"] == pytest.approx(shift.max(), abs=1e-6)
    best = [(one.encode_images(files) @ one.encode_texts(texts).T).argmax(axis=1) for one in (tiny_open_clip, made)]
    assert report.history[-1]["same_best_text"] == pytest.approx(np.mean(best[0] == best[1]))
    assert json.loads((Path(report.folder) / "kernel_alignment.json").read_text())["kernel"] == report.kernel
    table = "\n".join(report.table())
    for words in ("kernel error, all pairs", "zero-shot accuracy", "text to image", "5th percentile"):
        assert words in table


def test_a_folder_of_images_without_captions(tiny_clip: Encoder, run: Callable[..., Any], some: Path, tmp_path: Path
                                             ) -> None:  # fmt: skip
    (tmp_path / "plain" / "deeper").mkdir(parents=True)
    for file in sorted(some.glob("*.png"))[:12]:
        shutil.copy(file, tmp_path / "plain" / "deeper" / file.name)
    (tmp_path / "plain" / "deeper" / "broken.png").write_bytes(b"no image")
    report = run(tiny_clip, data=tmp_path / "plain", steps=2)
    assert report.retrieval is None
    assert report.zero_shot is None
    assert report.counts["texts"] == 200, "ImageNet's classes"
    assert 0 <= report.history[-1]["same_best_text"] <= 1
    assert [Path(one["name"]).name for one in report.skipped] == ["broken.png"]
    with Image.open(Path(report.folder) / "kernel_alignment.png") as image:
        assert min(image.size) > 200


def test_what_the_result_depends_on_is_trained_anew(
    tiny_clip: Encoder, run: Callable[..., Any], some: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the same folder, where a finished run is."""
    data = tmp_path / "data"
    shutil.copytree(some, data)
    steps = []
    update = KernelAlignmentLoop._update
    monkeypatch.setattr(KernelAlignmentLoop, "_update", lambda *rest: steps.append(1) or update(*rest))
    given: dict[str, Any] = {"data": data, "steps": 1, "cache": tmp_path / "features"}

    def again(out: str, **changed: Any) -> int:
        """Steps that are trained after a run as `given`."""
        run(tiny_clip, out, **given)
        steps.clear()
        run(tiny_clip, out, **{**given, **changed})
        return len(steps)

    assert again("same") == 0
    assert again("rate", learning_rate=2e-3) == 1
    assert again("texts", texts=["a dog"]) == 1
    assert again("teacher", teacher=tiny_clip) == 1
    assert again("seed", seed=1) == 1
    lines = lines_of(data)
    lines[0]["captions"] = ["another"]
    (tmp_path / "data" / "others.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert again("captions", data=data / "others.jsonl") == 1


def test_held_out_images_without_captions_and_twice(
    tiny_clip: Encoder, run: Callable[..., Any], some: Path, tmp_path: Path
) -> None:
    """Some have captions, one is there under two names; retrieval is among those that are described."""
    lines = lines_of(some)
    held = [{**line, "split": "test"} for line in lines[:6]]
    del held[0]["captions"]
    held[3]["captions"] = []
    shutil.copytree(some, tmp_path / "data")
    shutil.copy(some / held[1]["file"], tmp_path / "data" / "again.png")
    held.append({**held[1], "file": "again.png"})
    path = tmp_path / "data" / "captions.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in [*held, *lines[6:]]), encoding="utf-8")
    report = run(tiny_clip, data=path, steps=1)
    assert report.counts["test"] == 6
    assert report.counts["captions"] == 8
    made = load_encoder(str(report.folder), device="cpu")
    files = [some / held[at]["file"] for at in (1, 2, 4, 5)]
    texts = [caption for at in (1, 2, 4, 5) for caption in held[at]["captions"]]
    found = (made.encode_images(files) @ made.encode_texts(texts).T).argmax(axis=0)
    expected = np.mean(found == np.repeat(np.arange(4), 2))
    assert report.retrieval["figures"]["after"]["text_to_image"]["hit@1"] == pytest.approx(expected)
    assert report.retrieval["images"] == 4


def test_the_offset_is_fitted_on_all_of_a_small_set(
    tiny_clip: Encoder, tiny_timm: Encoder, run: Callable[..., Any], some: Path
) -> None:
    report = run(tiny_clip, steps=1)
    held = {row["file"] for row in rows_of(some, report)}
    files = [some / row["file"] for row in lines_of(some) if row["file"] not in held]
    with torch.no_grad():
        z, t = (one.image_features(torch.stack([one.load_image(file)[1] for file in files]))
                for one in (tiny_clip, tiny_timm))  # fmt: skip
    expected = fit_kernel_offset(z, t, teacher_kernel=teacher_kernel(t.shape[1]))
    assert report.kernels["student"]["offset"] == pytest.approx(expected, rel=1e-3)


def test_a_lora_of_a_convolutional_tower_mixes_channels_alone(tiny_clip: Encoder) -> None:
    import timm

    from mmalign.encoders.timm import TimmEncoder

    encoder = TimmEncoder(timm.create_model("test_efficientnet", num_classes=0), "test_efficientnet", "conv")
    tower = Tower(encoder, Recipe(adaptation="lora", rank=2))
    adapted = {name.partition(".lora_")[0] for name in tower.parameters}
    modules = dict(encoder.model.named_modules())
    assert adapted
    for name in adapted:
        base = modules[name].base_layer
        assert (base.kernel_size, base.groups) == ((1, 1), 1)
    tower.finish()
    assert not any("lora" in name for name, _ in encoder.model.named_modules())


def test_an_aligned_student_forgets_what_was_measured_of_it(
    aligned_photos: Any, bundled: Encoder, run: Callable[..., Any], some: Path
) -> None:
    student: Any = load_encoder(str(aligned_photos.folder), device="cpu")
    assert student.baselines
    assert student.report
    report = run(student, steps=1, batch_size=2, learning_rate=1e-4, teacher=bundled)
    made: Any = load_encoder(str(report.folder), device="cpu")
    assert (made.baselines, made.report) == ({}, {})
    held = {row["file"] for row in rows_of(some, report)}
    trained = {hashlib.sha256((some / row["file"]).read_bytes()).hexdigest() for row in lines_of(some)
               if row["file"] not in held}  # fmt: skip
    assert made.fitted_on == student.fitted_on | trained
    assert len(trained) == report.counts["training"]


def test_preprocessing_for_another_side() -> None:
    given: dict[str, Any] = {"resize": "shortest", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    for size, resize_to, side, expected in (
        ((256, 256), (284, 284), 224, (248, 248)), ((518, 518), None, 224, None), ((336, 336), 336, 224, 224),
        ((224, 224), (256, 300), 112, (128, 150)),
    ):  # fmt: skip
        found = ImagePreprocessing(size=size, resize_to=resize_to, **given).resized(side)
        assert (found.size, found.resize_to) == ((side, side), expected)


def test_features_are_found_again_in_a_cache_that_stays(
    tiny_clip: Encoder, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_clip, "first", steps=1, cache=tmp_path / "features")
    loaded = []
    load = Encoder.load_image
    monkeypatch.setattr(Encoder, "load_image", lambda self, *rest: loaded.append(self.source) or load(self, *rest))
    run(tiny_clip, "second", steps=1, cache=tmp_path / "features", seed=1)
    assert "timm" not in loaded
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features", "first", "second"]


def test_kernels_that_are_trained_and_other_kinds(tiny_clip: Encoder, run: Callable[..., Any]) -> None:
    fixed = run(tiny_clip, "fixed")
    assert {line["parameter"] for line in fixed.history} == {fixed.kernels["student"]["offset"]}
    trained = run(tiny_clip, "trained", train_kernel=True, kernel_learning_rate=0.1)
    values = [line["parameter"] for line in trained.history]
    assert len(set(values)) == len(values)
    assert trained.kernels["student"] == fixed.kernels["student"], "measured by the kernel as it was before"
    assert trained.kernels["trained"]["offset"] == pytest.approx(values[-1])
    gaussian = run(tiny_clip, "gaussian", kernel="gaussian", train_kernel=True)
    assert gaussian.kernels["student"]["kind"] == "gaussian"
    cosine = run(tiny_clip, "cosine", kernel="cosine")
    assert cosine.kernels["teacher"] == {"kind": "cosine"}
    assert cosine.history[0]["parameter"] is None


# -- memory and precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny_open_clip", "tiny_clip", "tiny_siglip"])
def test_checkpointed_gradients_are_the_same(
    request: pytest.FixtureRequest, run: Callable[..., Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip.transformer as layers_of

    student = request.getfixturevalue(kind)
    plain = load_encoder(str(run(student, "plain").folder), device="cpu")
    calls = []
    saved = layers_of.checkpoint
    monkeypatch.setattr(layers_of, "checkpoint", lambda *a, **k: calls.append(1) or saved(*a, **k))
    report = run(student, "less", gradient_checkpointing=True)
    less = load_encoder(str(report.folder), device="cpu")
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(less.model.state_dict()[name], value, rtol=0, atol=1e-6)
    if kind == "tiny_open_clip":  # of transformers: the next test
        assert calls
    layers = [part for part in less.model.modules() if getattr(part, "gradient_checkpointing", False)]
    assert not layers


def test_transformers_layers_do_checkpoint_in_evaluation_mode(tiny_clip: Encoder) -> None:
    import copy

    encoder = copy.deepcopy(tiny_clip)
    Tower(encoder, Recipe(gradient_checkpointing=True))
    layers = list(encoder.model.vision_model.encoder.layers)  # type: ignore[union-attr,arg-type]
    assert all(layer.gradient_checkpointing and layer.training for layer in layers)
    assert not any(part.training for layer in layers for part in layer.children())


def test_bfloat16_autocast_trains_float32_weights(tiny_clip: Encoder, run: Callable[..., Any]) -> None:
    report = run(tiny_clip, precision="bfloat16")
    made = load_encoder(str(report.folder), device="cpu")
    assert all(value.dtype in (torch.float32, torch.int64) for value in made.model.state_dict().values())
    exact = run(tiny_clip, "exact")
    assert report.history[0]["align"] == pytest.approx(exact.history[0]["align"], rel=0.1)
    assert report.history[0]["align"] != exact.history[0]["align"]


# -- the teacher -------------------------------------------------------------------------------------------------------


def test_each_model_has_its_own_preprocessing_unless_asked(
    tiny_clip: Encoder, tiny_timm: Encoder, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    extract = running.extract_features

    def note(encoder: Encoder, *arguments: Any, **options: Any) -> Any:
        seen.append(encoder.preprocessing)
        return extract(encoder, *arguments, **options)

    monkeypatch.setattr(running, "extract_features", note)
    run(tiny_clip, "own", steps=1)
    assert seen[:2] == [tiny_clip.preprocessing, tiny_timm.preprocessing]
    seen.clear()
    run(tiny_clip, "student", steps=1, teacher_view="student")
    assert tiny_clip.preprocessing is not None
    assert tiny_timm.preprocessing is not None
    assert seen[0] == tiny_clip.preprocessing
    side = tiny_timm.preprocessing.size[0]
    ratio = side / 32
    assert (seen[1].size, seen[1].resize_to) == ((side, side), int(40 * ratio))
    assert (seen[1].mean, seen[1].std) == (tiny_clip.preprocessing.mean, tiny_clip.preprocessing.std)


def test_a_dinov2_teacher_is_made_for_the_size_asked(
    tiny_clip: Encoder, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's own layout of DINOv2 with registers, without its weights."""
    import timm

    asked = []
    create = timm.create_model

    def unweighted(name: str, pretrained: bool = False, **options: Any) -> Any:
        asked.append((name, options))
        return create("vit_small_patch14_reg4_dinov2", depth=1, embed_dim=32, num_heads=2, **options)

    monkeypatch.setattr(timm, "create_model", unweighted)
    teacher = running._teacher("timm:vit_small_patch14_reg4_dinov2.lvd142m", 56, torch.device("cpu"))
    assert asked == [("vit_small_patch14_reg4_dinov2.lvd142m", {"num_classes": 0, "img_size": 56})]
    assert teacher.preprocessing is not None
    assert teacher.preprocessing.size == (56, 56)
    assert teacher.preprocessing.mean == (0.485, 0.456, 0.406)
    assert teacher.encode_pixels(torch.zeros(2, 3, 56, 56)).shape == (2, 32)
    # Pooled by the class token after the final norm, as `kernel_alignment_loss` has it.
    model: Any = teacher.model
    with torch.no_grad():
        pixels = torch.randn(2, 3, 56, 56)
        torch.testing.assert_close(teacher.image_features(pixels), model.forward_features(pixels)[:, 0])


# -- stopping and going on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_a_stopped_run_ends_in_the_same_bits(
    tiny_open_clip: Encoder, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adaptation: str
) -> None:
    monkeypatch.setattr(looping, "_SHARE", 0)
    monkeypatch.setattr(looping, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    options = {"adaptation": adaptation, "steps": 6, "check_every": 4, "train_kernel": True}
    whole = run(tiny_open_clip, "whole", **options)
    update, left = KernelAlignmentLoop._update, [3]

    def interrupted(self: Any, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return update(self, *arguments)

    monkeypatch.setattr(KernelAlignmentLoop, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_open_clip, "stopped", **options)
    assert not (tmp_path / "stopped").exists()
    with pytest.raises(InputError, match=r"stopped run of other settings \(learning_rate 0.001, now 0.002\)"):
        run(tiny_open_clip, "stopped", **options, learning_rate=2e-3)
    left[0] = 3  # what is left, and no more
    resumed = run(tiny_open_clip, "stopped", **options)
    assert left[0] == 0
    assert resumed.history == whole.history
    assert resumed.kernel == whole.kernel
    first, second = (load_encoder(str(report.folder), device="cpu") for report in (whole, resumed))
    assert not changed(state(first), state(second))
    assert not (tmp_path / "stopped.training").exists()
    left[0] = 0
    assert run(tiny_open_clip, "stopped", **options).to_dict() == resumed.to_dict(), "nothing is trained again"


RUN = """
import sys, torch
torch.set_num_threads(1)
from mmalign.encoders.timm import TimmEncoder
from mmalign.fine_tuning import align_to_teacher, loop
from mmalign.fine_tuning.kernel import report
from mmalign import load_encoder
loop._SHARE, loop.SECONDS_BETWEEN_CHECKPOINTS = 0, 0.0
report._draw = lambda *_: None
data, student, teacher, out, kill = sys.argv[1:]
if int(kill):
    save = loop.ImageLoop.save
    def dying(self, *a):
        save(self, *a)
        if self.step == int(kill):
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)
    loop.ImageLoop.save = dying
align_to_teacher(data, out, student=student, teacher=teacher, batch_size=6, steps=5, learning_rate=1e-3, test=0.3,
                 device="cpu", workers=1)
"""


@pytest.mark.slow
def test_a_killed_process_is_continued_by_another_bit_for_bit(
    clip_folder: Path, tiny_timm: Encoder, some: Path, tmp_path: Path
) -> None:
    teacher = tiny_timm.save(tmp_path / "teacher")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent.parent)}

    def process(out: str, kill: int) -> int:
        arguments = [str(some), f"transformers:{clip_folder}", str(teacher), str(tmp_path / out), str(kill)]
        done = subprocess.run([sys.executable, "-c", RUN, *arguments], env=environment, capture_output=True, text=True)
        assert kill or done.returncode == 0, done.stderr
        return done.returncode

    process("whole", 0)
    assert process("killed", 3) == -9
    assert not (tmp_path / "killed").exists()
    process("killed", 0)
    first, second = (load_encoder(str(tmp_path / name), device="cpu") for name in ("whole", "killed"))
    assert first.fingerprint == second.fingerprint
    assert not changed(state(first), state(second))
    reports = [json.loads((tmp_path / name / "kernel_alignment.json").read_text()) for name in ("whole", "killed")]
    assert reports[0]["history"] == reports[1]["history"]


SHARED = """
import sys, torch
torch.set_num_threads(1)
from mmalign.fine_tuning import align_to_teacher
from mmalign.fine_tuning.kernel import report
report._draw = lambda *_: None
data, student, teacher, out = sys.argv[1:]
align_to_teacher(data, out, student=student, teacher=teacher, batch_size=6, steps=3, learning_rate=1e-3, test=0.3,
                 device="cpu", workers=1, train_kernel=True)
"""


@pytest.mark.slow
def test_two_processes_train_what_one_does(clip_folder: Path, tiny_timm: Encoder, some: Path, tmp_path: Path) -> None:
    teacher = tiny_timm.save(tmp_path / "teacher")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    script = tmp_path / "run.py"
    script.write_text(SHARED)
    for out, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2"])):
        arguments = [str(some), f"transformers:{clip_folder}", str(teacher), str(tmp_path / out)]
        done = subprocess.run([sys.executable, *launch, str(script), *arguments], env=environment,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, two = (load_encoder(str(tmp_path / name), device="cpu") for name in ("one", "two"))
    # Adam divides by the gradient's size: single weights whose gradient is next to nothing follow its rounding.
    encoders = load_encoder(f"transformers:{clip_folder}", device="cpu"), one, two
    start, first, second = (torch.cat([value.flatten().double() for value in encoder.model.state_dict().values()])
                            for encoder in encoders)  # fmt: skip
    assert (second - first).norm() < 0.02 * (first - start).norm()
    reports = [json.loads((tmp_path / name / "kernel_alignment.json").read_text()) for name in ("one", "two")]
    for first, second in zip(reports[0]["history"], reports[1]["history"], strict=True):
        assert second["align"] == pytest.approx(first["align"], rel=1e-4)
        assert second["parameter"] == pytest.approx(first["parameter"], rel=1e-4)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_run_that_diverges_stops(tiny_clip: Encoder, run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"learning_rate 1e\+06"):
        run(tiny_clip, learning_rate=1e6, steps=30)
    assert not (tmp_path / "out").exists()
    # The advice can be followed: nothing of that run is in the way.
    run(tiny_clip, steps=1)
    with pytest.raises(NonFiniteLossError, match="weights after step 0 are not finite"):
        run(tiny_clip, "last", learning_rate=1e6, weight_decay=1e38, steps=1)
    with pytest.raises(NonFiniteLossError, match=r"kernel's parameter after 1 steps is (inf|0.0) .*lower that rate"):
        run(tiny_clip, "kernel", train_kernel=True, kernel_learning_rate=1e4)


def test_what_is_refused(
    tiny_clip: Encoder, tiny_timm: Encoder, tiny_sentence: Encoder, run: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="has no text tower"):
        run(tiny_timm)
    with pytest.raises(InputError, match="has no image tower"):
        run(tiny_clip, teacher=tiny_sentence)
    with pytest.raises(InputError, match="teacher_view is 'both'"):
        run(tiny_clip, teacher_view="both")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        run(tiny_clip, data=tmp_path / "empty")
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="exists and is not an encoder folder"):
        run(tiny_clip, "taken")
    mine = tiny_clip.save(tmp_path / "mine")
    with pytest.raises(InputError, match="is the student itself"):
        run(str(mine), "mine")
    with pytest.raises(InputError, match="follows objects, which is no part of its weights"):
        run(ObjectAwareEncoder(tiny_clip, BoxesFile({}, "boxes.json")))
    rounded = load_encoder(str(mine), device="cpu", dtype="bfloat16")
    with pytest.raises(InputError, match="rounded to half precision"):
        run(rounded)
    for options, message in (
        ({"weight": 0}, "weight is 0"),
        ({"kernel": "cosine", "train_kernel": True}, "no parameter"),
        ({"kernel": "gaussian", "offset": 1.0}, r"offset is 1\.0, which has no effect with the gaussian kernel"),
        ({"rank": 4}, "rank is 4, which has no effect with adaptation 'full'"),
        ({"kernel": "cosine", "degree": 2}, "degree is 2, which"),
        ({"kernel_learning_rate": 0.1}, "a kernel that is not trained"),
        ({"epochs": 2.0}, r"epochs is 2\.0, which has no effect with steps 4"),
        ({"sigma": 2.0}, "sigma is 2"),
        ({"kernel": "gaussian", "sigma": 2.0}, "give two numbers"),
        ({"texts": "a cat"}, "one text; give a list"),
        ({"sigma": (1.0, 2.0)}, "sigma is"),
        ({"kernel": "gaussian", "sigma": (1.0,)}, "give two numbers"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"adaptation": "some"}, "adaptation is 'some'"),
        ({"warmup": 2.0}, "warmup is 2"),
        ({"train_kernel": True, "offset": 0.0}, "offset is 0"),
    ):
        with pytest.raises(InputError, match=message):
            run(tiny_clip, **options)


def test_a_tower_without_what_is_asked_for(tiny_timm: Encoder) -> None:
    import copy

    class Bare:
        spec = "bare"
        image_module = None
        model = torch.nn.Linear(1, 1)

    with pytest.raises(InputError, match="no image tower that could be trained"):
        Tower(Bare(), Recipe())  # type: ignore[arg-type]
    plain = copy.deepcopy(tiny_timm)
    plain.model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    with pytest.raises(InputError, match="cannot checkpoint its gradients"):
        Tower(plain, Recipe(gradient_checkpointing=True))
    with pytest.raises(InputError, match="a LoRA finds no layer"):
        Tower(plain, Recipe(adaptation="lora"))


def test_the_learning_rate_rises_and_falls() -> None:
    recipe = Recipe(warmup=0.2)
    rates = [recipe.factor(step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1
    assert rates[12] == pytest.approx(0.5)
    assert rates[4:] == sorted(set(rates[4:]), reverse=True)
    assert rates[-1] > 0
    assert replace(recipe, adaptation="lora").highest_rate == 1e-4
    assert recipe.highest_rate == 1e-5
