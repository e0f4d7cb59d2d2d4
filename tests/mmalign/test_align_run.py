"""From captioned photographs to an encoder with an honest report: what is measured, on what, and what a stop leaves."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign import Encoder, InputError, extract_features, load_encoder
from mmalign.alignment import AlignedEncoder, AlignmentRun, align_encoders, evaluate_on_captions, evaluate_zero_shot
from mmalign.features import extraction

Row = dict[str, Any]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rows_left_out(run: AlignmentRun, rows: Sequence[Row], root: Path) -> list[Row]:
    """What heads were not fitted on, told by the encoder itself."""
    return [row for row in rows if digest(root / row["file"]) not in run.encoder.fitted_on]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def neighbours(rows: np.ndarray, k: int) -> list[set[int]]:
    cosines = unit(rows.astype(np.float64)) @ unit(rows.astype(np.float64)).T
    np.fill_diagonal(cosines, -9)
    return [set(np.argsort(-row, kind="stable")[:k].tolist()) for row in cosines]


# -- with real encoders ------------------------------------------------------------------------------------------------


def test_the_folder_is_an_encoder_with_its_report(aligned_photos: AlignmentRun) -> None:
    folder = aligned_photos.folder
    assert folder is not None
    assert {"encoder.json", "report.json", "report.png", "layers.png"} <= {path.name for path in folder.iterdir()}
    written = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    assert written == json.loads(json.dumps(aligned_photos.report, allow_nan=False))
    assert list(written["retrieval"]["figures"]) == ["chance", "ridge", "cca", "structure", "bundled"]
    for name in ("report.png", "layers.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200
    again = load_encoder(folder, device="cpu")
    assert isinstance(again, AlignedEncoder)
    assert again.report == written
    assert aligned_photos.alignment.report == aligned_photos.report
    assert set(again.baselines) == {"ridge", "cca"}


def test_a_copy_has_the_same_report_and_pictures(aligned_photos: AlignmentRun, tmp_path: Path) -> None:
    assert aligned_photos.folder is not None
    copied = load_encoder(aligned_photos.folder, device="cpu").save(tmp_path / "copy")
    for name in ("report.json", "report.png", "layers.png"):
        assert (copied / name).read_bytes() == (aligned_photos.folder / name).read_bytes()
    assert load_encoder(copied, device="cpu").fingerprint == aligned_photos.encoder.fingerprint


def test_figures_are_those_of_the_saved_encoder_on_the_test_images(
    aligned_photos: AlignmentRun, captions: list[Row], photos: Path
) -> None:
    """Encoded again from the files and counted by hand; every image once in the gallery."""
    rows = rows_left_out(aligned_photos, captions, photos)
    assert len(rows) == aligned_photos.report["pairs"]["test"] == 23
    assert aligned_photos.folder is not None
    encoder = load_encoder(aligned_photos.folder, device="cpu")
    images = encoder.encode_images([photos / row["file"] for row in rows], batch_size=8)
    texts = encoder.encode_texts([text for row in rows for text in row["captions"]])
    cosines = texts @ images.T
    owner = np.repeat(np.arange(len(rows)), 5)
    ranks = (cosines > cosines[np.arange(len(texts)), owner][:, None]).sum(axis=1)
    found = aligned_photos.report["retrieval"]["figures"]
    to_image = found["structure"]["text_to_image"]
    assert to_image["hit@1"] == pytest.approx((ranks < 1).mean())
    assert to_image["hit@10"] == pytest.approx((ranks < 10).mean())
    best = cosines.T.argsort(axis=1)[:, ::-1][:, :5]
    hits = np.mean([(owner[top] == row).any() for row, top in enumerate(best)])
    assert found["structure"]["image_to_text"]["hit@5"] == pytest.approx(hits)
    assert found["chance"]["text_to_image"]["hit@5"] == pytest.approx(5 / 23)
    assert to_image["hit@5"] > 2 * found["chance"]["text_to_image"]["hit@5"]


def test_layers_go_by_cka_unless_said_otherwise(aligned_photos: AlignmentRun, photos: Path) -> None:
    assert aligned_photos.folder is not None
    run = align_encoders(
        photos,
        None,
        image_encoder=aligned_photos.encoder.image_encoder.encoder,
        text_encoder=aligned_photos.encoder.text_encoder.encoder,
        method="ridge",
        test=0.3,
        cache=aligned_photos.folder.parent / "mmalign-features",
        batch_size=8,
    )
    scores = run.report["layers"]
    table = np.array(scores["table"])
    row, column = np.unravel_index(table.argmax(), table.shape)
    assert scores["score_name"] == "cka"
    assert scores["chosen"] == [scores["image_layers"][row], scores["text_layers"][column]]
    assert not np.allclose(table, aligned_photos.report["layers"]["table"])
    assert any("unbiased CKA" in line for line in run.lines())


def test_layers_are_those_most_alike_on_the_training_images(
    aligned_photos: AlignmentRun, captions: list[Row], photos: Path
) -> None:
    """Mutual kNN as a loop over sets."""
    rows = [row for row in captions if digest(photos / row["file"]) in aligned_photos.encoder.fitted_on]
    towers = aligned_photos.encoder.image_encoder.encoder, aligned_photos.encoder.text_encoder.encoder
    assert aligned_photos.folder is not None
    cache = aligned_photos.folder.parent / "mmalign-features"
    scores = aligned_photos.report["layers"]
    found = [
        extract_features(tower, items, modality=side, layers=names, cache=cache, batch_size=8)
        for tower, side, items, names in (
            (towers[0], "image", [photos / row["file"] for row in rows], scores["image_layers"]),
            (towers[1], "text", [row["captions"][0] for row in rows], scores["text_layers"]),
        )
    ]  # fmt: skip
    k = math.ceil(2 * len(rows) ** (1 / 3))
    lists = [{name: neighbours(np.asarray(table), k) for name, table in of.layers.items()} for of in found]
    best, chosen = -1.0, None
    for image in scores["image_layers"]:
        for text in scores["text_layers"]:
            score = np.mean([len(a & b) / k for a, b in zip(lists[0][image], lists[1][text], strict=True)])
            if score > best + 1e-12:
                best, chosen = float(score), (image, text)
    assert (scores["rows"], scores["k"]) == (len(rows), k)
    assert scores["score"] == pytest.approx(best)
    assert tuple(scores["chosen"]) == chosen
    assert (aligned_photos.encoder.image_encoder.layer, aligned_photos.encoder.text_encoder.layer) == chosen


def test_measured_again_with_its_baselines(
    aligned_photos: AlignmentRun, captions: list[Row], photos: Path, tmp_path: Path
) -> None:
    """On the same test images the same figures."""
    kept = rows_left_out(aligned_photos, captions, photos)
    data = tmp_path / "test.jsonl"
    data.write_text("".join(f"{json.dumps({**row, 'file': str(photos / row['file'])})}\n" for row in kept))
    comparison, skipped = evaluate_on_captions({"mine": aligned_photos.encoder}, data, batch_size=8)
    assert list(comparison.figures) == ["chance", "mine: ridge", "mine: cca", "mine: structure"]
    for name in ("ridge", "cca", "structure"):
        want = aligned_photos.report["retrieval"]["figures"][name]["text_to_image"]
        assert comparison.figures[f"mine: {name}"]["text_to_image"]["hit@5"] == pytest.approx(want["hit@5"], abs=0.02)
    assert skipped == []
    assert not any("fitted on" in note for note in comparison.notes)


# -- with tiny ones ----------------------------------------------------------------------------------------------------

Align = Callable[..., AlignmentRun]
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def tiny_align(tiny_timm: Encoder, tiny_sentence: Encoder, tiny_cache: Path) -> Align:
    def call(data: Path, out: Path | None = None, **changes: Any) -> AlignmentRun:
        arguments: dict[str, Any] = {
            "image_encoder": tiny_timm,
            "text_encoder": tiny_sentence,
            "method": "clip",
            "options": {"steps": 4, "dim": 8, "batch_size": 16, "evaluate_every": 2},
            "layers": "output",
            "test": 0.25,
            "cache": tiny_cache,
            "device": "cpu",
        }
        return align_encoders(data, out, **{**arguments, **changes})

    return call


@pytest.fixture
def write(captions: list[Row], photos: Path, tmp_path: Path) -> Write:
    """Captions of the first 40 photographs, changed line by line."""

    def call(change: Callable[[int, Row], Row] = lambda _, row: row, more: Sequence[Row] = ()) -> Path:
        rows = [change(at, {"file": str(photos / row["file"]), "captions": row["captions"][:2]})
                for at, row in enumerate(captions[:40])]  # fmt: skip
        path = tmp_path / "captions.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, *more]))
        return path

    return call


def thirds(at: int, row: Row) -> Row:
    return {**row, "split": ("train", "val", "train", "test")[at % 4]}


@pytest.mark.parametrize(("layers", "chosen"), [("last", (-1, -1)), ("output", None), ([0, "output"], (0, None))])
def test_layers_by_name(layers: Any, chosen: Any, tiny_align: Align, write: Write) -> None:
    run = tiny_align(write(), layers=layers)
    towers = run.encoder.image_encoder, run.encoder.text_encoder
    chosen = chosen or (None, None)
    for tower, wanted in zip(towers, chosen, strict=True):
        count = tower.encoder.layer_count(tower.modality)
        assert tower.layer == ("output" if wanted is None else wanted % count)
    assert run.report["layers"] is None
    assert run.folder is None


def test_test_images_have_no_say_in_the_layers(tiny_align: Align, write: Write, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 90, 3), np.uint8)).save(tmp_path / "noise.png")

    def other_tests(at: int, row: Row) -> Row:
        row = thirds(at, row)
        if row["split"] == "test" and at < 8:
            row |= {"file": str(tmp_path / "noise.png") if at == 3 else row["file"], "captions": ["nothing at all"]}
        return row

    one, other = (tiny_align(write(change), layers="select") for change in (thirds, other_tests))
    assert one.report["layers"]["table"] == other.report["layers"]["table"]
    assert one.encoder.fingerprint == other.encoder.fingerprint
    assert one.report["retrieval"]["figures"]["clip"] != other.report["retrieval"]["figures"]["clip"]


def test_same_seed_same_heads(tiny_align: Align, write: Write) -> None:
    one, again, other = (tiny_align(write(thirds), seed=seed) for seed in (0, 0, 1))
    assert one.encoder.fingerprint == again.encoder.fingerprint
    assert one.report["retrieval"] == again.report["retrieval"]
    assert one.encoder.fingerprint != other.encoder.fingerprint


def test_a_rival_that_has_seen_the_test_images_is_named(tiny_align: Align, write: Write) -> None:
    earlier = tiny_align(write(), seed=0).encoder
    for seed, seen in ((0, False), (1, True)):
        run = tiny_align(write(), seed=seed, against=earlier)
        assert any("of these 10 images, so that its figures" in warning for warning in run.warnings) is seen
        assert run.report["warnings"] == run.warnings


def test_splits_that_the_data_name(tiny_align: Align, write: Write, captions: list[Row], photos: Path) -> None:
    run = tiny_align(write(thirds))
    fitted = {digest(photos / row["file"]) for at, row in enumerate(captions[:40]) if at % 4 != 3}
    assert run.encoder.fitted_on == fitted
    assert run.report["pairs"] == {"images": 40, "captions": 80, "training": 20, "held_out": 10, "test": 10}
    with pytest.raises(InputError, match=r"has split 'tset'; give train, validation or test"):
        tiny_align(write(lambda _, row: {**row, "split": "tset"}))


def test_splits_made_here_keep_copies_and_groups_together(
    tiny_align: Align, write: Write, captions: list[Row], photos: Path, tmp_path: Path
) -> None:
    copies = []
    for row in captions[:20]:
        shutil.copy(photos / row["file"], tmp_path / f"copy-{row['file']}")
        copies.append({"file": f"copy-{row['file']}", "caption": row["captions"][3]})
    run = tiny_align(write(lambda at, row: {**row, "group": f"g{at // 2}" if at >= 20 else None}, copies))
    fitted = [digest(photos / row["file"]) in run.encoder.fitted_on for row in captions[:40]]
    counts = run.report["pairs"]
    assert counts["images"] == 60
    assert counts["test"] == fitted.count(False), "each content once in the gallery"
    assert counts["training"] + counts["held_out"] == fitted.count(True)
    assert fitted[20::2] == fitted[21::2]
    assert run.warnings == ["20 images are copies of others; each counts once, with the captions of all"]
    comparison, _ = evaluate_on_captions({"mine": run.encoder}, tmp_path / "captions.jsonl")
    assert (comparison.images, comparison.captions) == (40, 100)


def test_a_copy_of_a_test_image_is_refused_or_dropped(
    tiny_align: Align, write: Write, captions: list[Row], photos: Path, tmp_path: Path
) -> None:
    tested, checked = captions[3]["file"], captions[5]["file"]
    for name in (tested, checked):
        shutil.copy(photos / name, tmp_path / f"copy-{name}")
    more = [{"file": f"copy-{name}", "caption": "a copy", "split": "train"} for name in (tested, checked)]
    data = write(thirds, more)
    with pytest.raises(InputError, match=rf"1 images .* \(first: 'copy-{tested}' and '.*{tested}'\); mend `split`"):
        tiny_align(data)
    run = tiny_align(data, duplicates="drop")
    assert run.report["pairs"]["training"] == 20
    assert [warning.split(" and are")[0] for warning in run.warnings] == [
        "1 images have copies (equal content or group) among the test images",
        "1 images have copies (equal content or group) among the validation images",
    ]
    assert digest(photos / tested) not in run.encoder.fitted_on


def test_images_that_cannot_be_read_are_left_out_and_named(tiny_align: Align, write: Write, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    more = [{"file": name, "caption": "x", "split": "train"} for name in ("broken.jpg", "missing.jpg")]
    run = tiny_align(write(thirds, more), tmp_path / "out")
    assert [Path(entry["name"]).name for entry in run.report["skipped"]] == ["broken.jpg", "missing.jpg"]
    assert any("2 images could not be read" in warning and "broken.jpg" in warning for warning in run.warnings)
    assert run.report["pairs"]["training"] == 20
    assert (tmp_path / "out" / "encoder.json").is_file()
    comparison, skipped = evaluate_on_captions({"mine": run.encoder}, write(thirds, more))
    assert comparison.images == 40
    assert len(skipped) == 2
    assert any("mine was fitted on 30 of these 42 images" in note for note in comparison.notes)


def test_zero_shot_of_labelled_test_images(tiny_align: Align, write: Write, captions: list[Row], photos: Path) -> None:
    """Against prompts averaged by hand."""
    label = {str(photos / row["file"]): ("odd ones" if at % 8 < 4 else "rest") for at, row in enumerate(captions[:40])}
    templates = ["a photo of {}", "{} on a table"]
    data = write(lambda at, row: thirds(at, {**row, "label": label[row["file"]]}))
    run = tiny_align(data, templates=templates)
    files = [photos / row["file"] for row in captions[3:40:4]]
    images = run.encoder.encode_images(files)
    prompts = [run.encoder.encode_texts([text.format(name) for text in templates]) for name in ("odd ones", "rest")]
    weights = unit(np.stack([unit(rows.mean(axis=0)) for rows in prompts]))
    right = np.mean([("odd ones", "rest")[row] == label[str(file)]
                     for row, file in zip((images @ weights.T).argmax(axis=1), files, strict=True)])  # fmt: skip
    assert run.report["zero_shot"]["figures"]["clip"]["top1_micro"] == pytest.approx(right)
    assert set(run.report["zero_shot"]["figures"]) == {"chance", "ridge", "cca", "clip"}
    json.dumps(run.to_dict(), allow_nan=False)


def test_zero_shot_of_a_folder_of_classes(
    tiny_align: Align, write: Write, captions: list[Row], photos: Path, tmp_path: Path
) -> None:
    """Subfolders made of the photographs' objects; hidden folders and files between them are no classes."""
    run = tiny_align(write())
    classes = tmp_path / "classes"
    files: dict[str, list[Path]] = {}
    for name in ("elephant", "traffic light", "dog"):
        folder = classes / name.replace(" ", "_")
        folder.mkdir(parents=True)
        with_it = [row["file"] for row in captions if any(thing["category"] == name for thing in row["objects"])]
        files[name] = [shutil.copy(photos / file, folder / file) for file in with_it[:3]]
    (classes / ".hidden").mkdir()
    shutil.copy(photos / captions[0]["file"], classes / ".hidden" / "x.jpg")
    (classes / "dog" / "broken.jpg").write_bytes(b"no")
    result, skipped = evaluate_zero_shot({"mine": run.encoder}, classes)
    assert result.classes == ["dog", "elephant", "traffic light"]
    assert result.images == sum(map(len, files.values()))
    assert [Path(entry["name"]).name for entry in skipped] == ["broken.jpg"]
    assert set(result.figures) == {"chance", "mine: ridge", "mine: cca", "mine: clip"}
    assert result.figures["chance"]["top1_micro"] == pytest.approx(1 / 3)
    assert any("was fitted on" in note for note in result.notes)
    with pytest.raises(InputError, match="has 0 subfolders with images"):
        evaluate_zero_shot({"mine": run.encoder}, classes / "dog")


def test_nothing_held_out_is_possible(tiny_align: Align, write: Write) -> None:
    """The baselines still choose their regularisation on pairs of their own."""
    run = tiny_align(write(), validation=0)
    assert run.report["pairs"]["held_out"] == 0
    assert set(run.report["baselines"]) == {"ridge", "cca"}
    assert tiny_align(write(), method="ridge", options={}).report["baselines"].keys() == {"cca"}


# -- stopped and run again ---------------------------------------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that go through an encoder while features are extracted."""
    sizes: list[int] = []
    encode = extraction._encode

    def counted(job: Any, inputs: list[Any]) -> Any:
        sizes.append(len(inputs))
        return encode(job, inputs)

    monkeypatch.setattr(extraction, "_encode", counted)
    return sizes


def test_a_second_run_encodes_nothing(tiny_align: Align, write: Write, batches: list[int], tmp_path: Path) -> None:
    options = {"cache": None, "layers": "select", "batch_size": 16}
    first = tiny_align(write(thirds), tmp_path / "out", **options)
    assert sum(batches) == 30 + 30 + 40 + 80, "a sample of each side, then all"
    assert (tmp_path / "mmalign-features").is_dir(), "the default cache lies beside the result"
    batches.clear()
    again = tiny_align(write(thirds), tmp_path / "out", method="siglip", **options)
    assert batches == []
    assert again.report["layers"] == first.report["layers"]


@pytest.mark.parametrize("cut", [1, 4])
def test_cut_in_the_middle_of_extraction(
    cut: int, tiny_align: Align, write: Write, batches: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"layers": "last", "batch_size": 16}
    whole = tiny_align(write(thirds), cache=tmp_path / "whole", **options)
    needed = sum(batches)
    batches.clear()
    count = extraction._encode

    def stopping(job: Any, inputs: list[Any]) -> Any:
        if len(batches) == cut:
            raise KeyboardInterrupt
        return count(job, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "_encode", stopping)
        with pytest.raises(KeyboardInterrupt):
            tiny_align(write(thirds), tmp_path / "out", cache=tmp_path / "cut", **options)
    assert not (tmp_path / "out").exists()
    again = tiny_align(write(thirds), tmp_path / "out", cache=tmp_path / "cut", **options)
    assert sum(batches) == needed, "nothing is encoded twice"
    assert again.encoder.fingerprint == whole.encoder.fingerprint
    assert again.report["retrieval"] == whole.report["retrieval"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("where", ["mmalign.alignment.fitting._Loop.step", "mmalign.alignment.report.draw_report"])
def test_a_stop_leaves_the_folder_that_was_there(
    where: str, tiny_align: Align, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "place" / "out"
    tiny_align(write(), out)
    before = snapshot(tmp_path / "place")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, stop)
        with pytest.raises(KeyboardInterrupt):
            tiny_align(write(), out, seed=1)
    assert snapshot(tmp_path / "place") == before
    changed = tiny_align(write(), out, seed=1)
    assert load_encoder(out, device="cpu").fingerprint == changed.encoder.fingerprint


# -- refused before any work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (99, 0)}, r"layer is 99; the image tower of 'timm:test_vit' has 0 to \d+ \(or .*'output'"),
        ({"layers": "some"}, "layers is 'some'; give one of select, last, output"),
        ({"layers": (1, 2, 3)}, r"give \(image layer, text layer\)"),
        ({"pooling": "cls"}, "'output' is pooled already"),
        ({"pooling": "max", "layers": "last"}, "pooling is 'max'; give one of cls, mean"),
        ({"method": "magic"}, "method is 'magic'; give one of structure"),
        ({"method": "mini-vec2vec", "options": {}}, "not paired"),
        ({"options": {"step": 3}}, "has no option 'step'; it has .*steps"),
        ({"test": 0}, "test is 0; give a share"),
        ({"test": 2}, r"test is 2; give a number in \[0, 0.9\]"),
        ({"sample": 3}, "sample is 3; give 10 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"duplicates": "keep"}, "give one of refuse, drop"),
        ({"templates": "fancy"}, "templates are 'fancy'; give simple or imagenet"),
        ({"templates": ["a photo"]}, "has no {}"),
        ({"dtype": "bfloat16"}, "loaded already"),
        ({"against": "no-such"}, "encoder 'no-such' is neither"),
    ],
)  # fmt: skip
def test_wrong_arguments_cost_nothing(
    changes: dict[str, Any], message: str, tiny_align: Align, write: Write, batches: list[int], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        tiny_align(write(), tmp_path / "out", cache=tmp_path / "cache", **changes)
    assert batches == []
    assert not (tmp_path / "out").exists()


def test_encoders_without_the_tower(
    tiny_align: Align, write: Write, tiny_timm: Encoder, tiny_sentence: Encoder, batches: list[int], tmp_path: Path
) -> None:
    for changes in (
        {"image_encoder": tiny_sentence},
        {"text_encoder": tiny_timm},
        {"against": tiny_timm},
        {"against": tiny_sentence},
    ):
        with pytest.raises(InputError, match=r"it has no (image|text) tower"):
            tiny_align(write(), cache=tmp_path / "cache", **changes)
    with pytest.raises(InputError, match="it has no text tower"):
        evaluate_on_captions({"a": tiny_timm}, write())
    assert batches == []


def test_a_folder_that_is_no_encoder_is_not_touched(
    tiny_align: Align, write: Write, batches: list[int], tmp_path: Path
) -> None:
    out = tmp_path / "holiday"
    out.mkdir()
    (out / "photo.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not an encoder folder"):
        tiny_align(write(), out)
    assert snapshot(out) == {"photo.txt": b"mine"}
    assert batches == []


def test_too_little_to_split(tiny_align: Align, write: Write) -> None:
    with pytest.raises(InputError, match="0 images to train on and 40 to measure on"):
        tiny_align(write(lambda _, row: {**row, "split": "test"}))
    with pytest.raises(InputError, match="39 images to train on and 1 to measure on"):
        tiny_align(write(lambda at, row: {**row, "split": "test" if at == 0 else "train"}))


def test_half_precision_is_saved_in_full_or_refused_at_once(
    tiny_align: Align, write: Write, tiny_clip: Encoder, tiny_timm: Encoder, batches: list[int], tmp_path: Path
) -> None:
    run = tiny_align(write(), tmp_path / "out", image_encoder=tiny_clip.spec, dtype="bfloat16")
    assert run.encoder.dtype == torch.bfloat16
    assert load_encoder(tmp_path / "out", device="cpu").fingerprint == run.encoder.fingerprint
    batches.clear()
    rounded = copy.deepcopy(tiny_timm).to("cpu", "bfloat16")
    with pytest.raises(InputError, match="rounded to half precision"):
        tiny_align(write(), tmp_path / "other", image_encoder=rounded)
    assert batches == []
