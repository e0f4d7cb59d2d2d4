"""Encoders made of a frozen tower and a fitted head: the same numbers by hand, saved, loaded, searched with."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmalign import Encoder, extract_features, load_encoder
from mmalign.alignment import AlignedEncoder, Pairs, TowerEncoder, align, align_many
from mmalign.alignment.heads import Head, build_head
from mmalign.errors import DamagedError, EncoderMismatchError, InputError
from retrieval import ImageIndex

DIM = 6
TEXTS = ["a dog", "a photo of a kitchen", "two horses on a hill above a lake"]


@pytest.fixture(scope="session")
def few(photos: Path) -> list[Path]:
    return sorted(photos.glob("*.jpg"))[:4]


def linear_head(width: int, seed: int = 0) -> Head:
    head = build_head({"kind": "linear", "input_dim": width, "dim": DIM})
    draw = torch.Generator().manual_seed(seed)
    for tensor in head.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=draw))
    return head.eval().requires_grad_(False)


def by_hand(head: Head, rows: np.ndarray) -> np.ndarray:
    """z = W (x - c) s + b, normalised, without torch."""
    state = {name: value.double().numpy() for name, value in head.state_dict().items()}
    z = (rows.astype(np.float64) - state["centre"]) * state["scale"] @ state["map.weight"].T + state["map.bias"]
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def features_of(encoder: Encoder, modality: Any, layer: Any, items: list[Any], pooling: Any = None) -> np.ndarray:
    return next(
        iter(extract_features(encoder, items, modality=modality, layers=[layer], pooling=pooling).layers.values())
    )


Make = Callable[..., AlignedEncoder]


@pytest.fixture
def make(tiny_timm: Encoder, tiny_sentence: Encoder) -> Make:
    """Aligned encoders of copies of the session's ones, which may be cast and moved."""

    def build(
        *,
        layers: tuple[Any, Any] = (1, "output"),
        pooling: Any = None,
        heads: tuple[int, int] = (1, 2),
        image: Encoder | None = None,
        settings: dict[str, Any] | None = None,
    ) -> AlignedEncoder:
        image, text = image or copy.deepcopy(tiny_timm), copy.deepcopy(tiny_sentence)
        towers = [
            TowerEncoder(
                encoder, side, linear_head(width, seed), layer=layer, pooling=pooling if side == "image" else None
            )
            for encoder, side, width, seed, layer in (
                (image, "image", 64, heads[0], layers[0]),
                (text, "text", 32, heads[1], layers[1]),
            )
        ]
        return AlignedEncoder(*towers, {}, dim=DIM, settings=settings or {"method": "clip"})

    return build


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modality", "layer", "pooling"),
    [
        ("image", "output", None),
        ("image", 0, "cls"),
        ("image", -1, "mean"),
        ("text", "output", None),
        ("text", 0, None),
        ("text", 2, "mean"),
    ],
)
def test_a_tower_is_its_head_after_the_features(
    modality: str, layer: Any, pooling: Any, tiny_timm: Encoder, tiny_clip: Encoder, few: list[Path]
) -> None:
    encoder, items = (tiny_timm, few) if modality == "image" else (tiny_clip, TEXTS)
    rows = features_of(encoder, modality, layer, items, pooling)
    head = linear_head(rows.shape[1])
    tower = TowerEncoder(encoder, modality, head, layer=layer, pooling=pooling)
    found = tower.encode_images(items) if modality == "image" else tower.encode_texts(items)
    np.testing.assert_allclose(found, by_hand(head, rows), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert found.dtype == np.float32
    assert tower.modalities == {modality}
    with pytest.raises(InputError, match=f"encodes {modality} only"):
        tower.encode_texts(TEXTS) if modality == "image" else tower.encode_images(few)


def test_pooling_by_default_is_that_of_the_features(tiny_timm: Encoder, few: list[Path]) -> None:
    """The class token where there is one, for the head and for the features it was fitted on alike."""
    rows = features_of(tiny_timm, "image", 0, few)
    head = linear_head(rows.shape[1])
    tower = TowerEncoder(tiny_timm, "image", head, layer=0)
    assert tower.pooling == "cls"
    np.testing.assert_allclose(tower.encode_images(few), by_hand(head, rows), atol=2e-6)


def test_both_towers_under_one_roof(make: Make, few: list[Path]) -> None:
    encoder = make()
    np.testing.assert_array_equal(encoder.encode_images(few), encoder.image_encoder.encode_images(few))
    np.testing.assert_array_equal(encoder.encode_texts(TEXTS), encoder.text_encoder.encode_texts(TEXTS))
    assert (encoder.dim, encoder.modalities) == (DIM, {"image", "text"})


def test_what_does_not_fit_is_refused(tiny_timm: Encoder, tiny_sentence: Encoder) -> None:
    with pytest.raises(InputError, match=r"output of 'timm:test_vit' has 64 dimensions, the head takes 63"):
        TowerEncoder(tiny_timm, "image", linear_head(63))
    with pytest.raises(InputError, match=r"layer is 99; the image tower of 'timm:test_vit' has 0 to \d+ .*'output'"):
        TowerEncoder(tiny_timm, "image", linear_head(64), layer=99)
    with pytest.raises(InputError, match="it has no image tower"):
        TowerEncoder(tiny_sentence, "image", linear_head(32))


# -- whose head it is --------------------------------------------------------------------------------------------------


def test_a_head_is_not_shared_with_the_alignment(tiny_timm: Encoder, tiny_sentence: Encoder, few: list[Path]) -> None:
    """Moving or training an encoder leaves the alignment, and other encoders made from it, as they were."""
    images, texts = np.random.default_rng(0).standard_normal((2, 12, 64)).astype(np.float32)
    fitted = align(images, texts[:, :32], method="ridge", regularisation=0.1, validation=0, device="cpu")
    one, other = (fitted.encoder(copy.deepcopy(tiny_timm), tiny_sentence) for _ in range(2))
    before = fitted.encode("image", images), other.encode_images(few)
    with torch.no_grad():
        for tensor in one.image_encoder.head.state_dict().values():
            tensor.add_(1)
    np.testing.assert_array_equal(fitted.encode("image", images), before[0])
    np.testing.assert_array_equal(other.encode_images(few), before[1])
    one.image_encoder.head.to("meta")
    assert fitted.heads["image"].centre.device.type == "cpu"


def test_another_encoder_than_the_fitted_one(
    tiny_timm: Encoder, tiny_clip: Encoder, tiny_sentence: Encoder, few: list[Path]
) -> None:
    images = extract_features(tiny_clip, few, modality="image")
    texts = extract_features(tiny_sentence, ["a", "b", "c", "d"])
    fitted = align(images, texts, method="procrustes", validation=0, device="cpu")
    with pytest.raises(EncoderMismatchError, match=r"fitted on 'transformers:.*' \(.*\), not on 'timm:test_vit'"):
        fitted.encoder(tiny_timm, tiny_sentence)
    assert fitted.encoder(tiny_clip, tiny_sentence).encode_images(few).shape == (4, 32)


def test_a_baseline_in_place_of_the_heads(make: Make, few: list[Path]) -> None:
    encoder = make()
    encoder.baselines = {"ridge": {"image": linear_head(64, 5), "text": linear_head(32, 6)}}
    ridge = encoder.variant("ridge")
    rows = features_of(encoder.image_encoder.encoder, "image", 1, few)
    np.testing.assert_allclose(ridge.encode_images(few), by_hand(linear_head(64, 5), rows), atol=2e-6)
    assert encoder.variant("clip") is encoder
    assert list(encoder.heads()) == ["ridge", "clip"]
    with pytest.raises(InputError, match="baseline is 'cca'; this encoder has ridge"):
        encoder.variant("cca")


# -- saved and loaded --------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(make: Make) -> AlignedEncoder:
    """With all that is saved beside the heads."""
    encoder = make(settings={"method": "clip", "options": {"betas": (0.9, 0.95)}})
    encoder.baselines = {"ridge": {"image": linear_head(64, 5), "text": linear_head(32, 6)}}
    encoder.fitted_on = frozenset(("ab" * 32, "cd" * 32))
    return encoder


def test_saved_and_loaded(whole: AlignedEncoder, few: list[Path], tmp_path: Path) -> None:
    folder = whole.save(tmp_path / "aligned")
    again = load_encoder(folder, device="cpu")
    assert isinstance(again, AlignedEncoder)
    assert again.fingerprint == whole.fingerprint
    np.testing.assert_array_equal(again.encode_images(few), whole.encode_images(few))
    np.testing.assert_array_equal(again.encode_texts(TEXTS), whole.encode_texts(TEXTS))
    np.testing.assert_array_equal(again.variant("ridge").encode_images(few), whole.variant("ridge").encode_images(few))
    assert again.fitted_on == whole.fitted_on
    assert again.settings["method"] == "clip"
    twice = load_encoder(again.save(tmp_path / "twice"), device="cpu")
    assert twice.fingerprint == whole.fingerprint


def test_no_pickle_in_the_folder(whole: AlignedEncoder, tmp_path: Path) -> None:
    """Safetensors, json and text: each is parsed as what its suffix says."""
    from safetensors import safe_open

    files = [path for path in whole.save(tmp_path / "aligned").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                assert tensors.keys() is not None
        else:
            text = path.read_text(encoding="utf-8")
            assert path.suffix == ".txt" or json.loads(text) is not None


@pytest.mark.slow
def test_loaded_by_a_process_that_knows_nothing(make: Make, tmp_path: Path) -> None:
    encoder = make()
    folder = encoder.save(tmp_path / "aligned")
    code = (
        "import sys, json; from mmalign import load_encoder; e = load_encoder(sys.argv[1], device='cpu'); "
        "print(json.dumps([e.fingerprint, e.encode_texts(['a dog']).tolist()]))"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fingerprint, rows = json.loads(done.stdout)
    assert fingerprint == encoder.fingerprint
    np.testing.assert_allclose(rows, encoder.encode_texts(["a dog"]), atol=1e-6)


def test_a_tower_alone(tiny_timm: Encoder, few: list[Path], tmp_path: Path) -> None:
    tower = TowerEncoder(tiny_timm, "image", linear_head(64), layer=0, pooling="mean")
    again = load_encoder(tower.save(tmp_path / "tower"), device="cpu")
    assert isinstance(again, TowerEncoder)
    assert (again.layer, again.pooling, again.modalities) == (0, "mean", {"image"})
    np.testing.assert_array_equal(again.encode_images(few), tower.encode_images(few))


def test_another_head_in_the_folder_is_noticed(make: Make, tmp_path: Path) -> None:
    folder = make().save(tmp_path / "aligned")
    other = make(heads=(7, 2)).save(tmp_path / "other")
    (other / "image" / "head.safetensors").replace(folder / "image" / "head.safetensors")
    with pytest.raises(DamagedError, match="holds other weights"):
        load_encoder(folder, device="cpu")


def test_a_spoilt_report_does_not_keep_the_encoder_from_loading(make: Make, tmp_path: Path) -> None:
    encoder = make()
    folder = encoder.save(tmp_path / "aligned")
    (folder / "report.json").write_text('{"retr')
    again = load_encoder(folder, device="cpu")
    assert isinstance(again, AlignedEncoder)
    assert again.report == {}
    assert again.fingerprint == encoder.fingerprint


# -- fingerprint and precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["layer", "pooling", "image head", "text head", "encoder"])
def test_fingerprint_follows_all_that_changes_vectors(what: str, make: Make, tiny_timm: Encoder) -> None:
    changes: dict[str, dict[str, Any]] = {
        "layer": {"layers": (0, "output")},
        "pooling": {"pooling": "mean"},
        "image head": {"heads": (8, 2)},
        "text head": {"heads": (1, 8)},
    }
    if what == "encoder":
        image = copy.deepcopy(tiny_timm)
        next(iter(image.model.parameters())).data.view(-1)[0] += 1
        image._fingerprint = None
        changes["encoder"] = {"image": image}
    assert make(**changes[what]).fingerprint != make().fingerprint


@pytest.mark.parametrize("name", ["centre", "scale", "map.weight", "map.bias"])
def test_fingerprint_follows_every_tensor_of_a_head(name: str, tiny_timm: Encoder) -> None:
    """Single numbers too, which fingerprints of models leave out."""
    plain, changed = linear_head(64), linear_head(64)
    changed.state_dict()[name].view(-1)[:1] += 1
    one, other = (TowerEncoder(tiny_timm, "image", head) for head in (plain, changed))
    assert one.fingerprint != other.fingerprint


def test_fingerprint_does_not_follow_the_way_the_heads_were_found(make: Make) -> None:
    """Vectors of equal heads can be compared, whatever the settings that led there."""
    assert make(settings={"method": "clip", "seed": 1}).fingerprint == make().fingerprint
    assert make().to("cpu", "bfloat16").fingerprint == make().fingerprint


def test_half_precision_is_for_the_tower_not_the_head(make: Make, few: list[Path]) -> None:
    exact, half = make(), make().to("cpu", "bfloat16")
    assert half.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in half.image_encoder.head.state_dict().values()} == {torch.float32}
    rows = half.encode_images(few)
    assert rows.dtype == np.float32
    assert 0.99 < (rows * exact.encode_images(few)).sum(axis=1).min() < 1 - 1e-9
    np.testing.assert_array_equal(half.encode_texts(TEXTS), exact.encode_texts(TEXTS))


def test_half_precision_is_saved_in_full(make: Make, tiny_clip: Encoder, few: list[Path], tmp_path: Path) -> None:
    """Where the tower's own weights can be had again; the heads are not lost on the way."""
    clip = load_encoder(tiny_clip.spec, device="cpu", dtype="bfloat16")
    heads = linear_head(32, 1), linear_head(32, 2)
    towers = [TowerEncoder(clip, side, head, layer=0) for side, head in zip(("image", "text"), heads, strict=True)]
    encoder = AlignedEncoder(*towers, {}, dim=DIM)
    encoder.baselines = {"ridge": {"image": linear_head(32, 5), "text": linear_head(32, 6)}}
    encoder.fitted_on = frozenset(["ab"])
    again = load_encoder(encoder.save(tmp_path / "full"), device="cpu")
    exact = TowerEncoder(tiny_clip, "image", heads[0], layer=0)
    np.testing.assert_array_equal(again.encode_images(few), exact.encode_images(few))
    assert isinstance(again, AlignedEncoder)
    assert set(again.baselines) == {"ridge"}
    assert again.fitted_on == {"ab"}
    assert encoder.dtype == torch.bfloat16, "saving changes nothing"
    with pytest.raises(InputError, match="rounded to half precision"):
        make().to("cpu", "bfloat16").save(tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


# -- more than images --------------------------------------------------------------------------------------------------


def test_sounds_are_searched_in_words(
    captions: list[dict[str, Any]], tiny_sentence: Encoder, tiny_timm: Encoder, photos: Path, tmp_path: Path
) -> None:
    """Features of one's own, bound to the space of texts with images; an index of them answers to the text tower."""
    rows = captions[:60]
    texts = extract_features(tiny_sentence, [row["captions"][0] for row in rows])
    images = extract_features(tiny_timm, [photos / row["file"] for row in rows])
    draw = np.random.default_rng(0)
    sounds = texts["output"] @ draw.standard_normal((32, 48)).astype(np.float32)
    np.save(tmp_path / "sounds.npy", sounds)
    hub = align_many(
        {"image": Pairs(images, texts), "audio": Pairs(tmp_path / "sounds.npy", texts)},
        method="ridge",
        regularisation=1e-3,
        validation=0,
        device="cpu",
    )
    folder = hub.tower("text", tiny_sentence).save(tmp_path / "words")
    names = [f"{row['file']}.wav" for row in rows]
    vectors = hub.encode("audio", tmp_path / "sounds.npy")
    ImageIndex.from_vectors(vectors, tmp_path / "index", paths=names, encoder=folder, device="cpu")
    index = ImageIndex.open(tmp_path / "index", device="cpu")
    assert index.encoder.modalities == {"text"}
    queries = index.encoder.encode_texts([row["captions"][0] for row in rows])
    best = (queries @ vectors.T).argmax(axis=1)
    assert (best == np.arange(60)).mean() > 0.9
    for row in (0, 17):
        hits = index.search(rows[row]["captions"][0], k=3)
        assert Path(hits[0].path).name == names[best[row]]
