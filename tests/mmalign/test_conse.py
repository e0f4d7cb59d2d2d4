"""The bridge from classes to texts: its formulas, a world of three colours, and the bundled encoder on photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from mmalign import Encoder, load_encoder
from mmalign.conse import bridge_images, centred_class_vectors, class_bridge
from mmalign.encoders.timm import TimmEncoder
from mmalign.errors import InputError
from mmalign.imaging import ImagePreprocessing

COLOURS = {"kitchen": (255, 0, 0), "dog": (0, 255, 0), "pizza": (0, 0, 255)}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_images_are_placed_at_the_expected_class_vector(temperature: float, rng: np.random.Generator) -> None:
    logits, vectors = rng.normal(size=(4, 7)) * 5, rng.normal(size=(7, 5))
    weights = np.exp(logits / temperature)
    expected = (weights / weights.sum(axis=1, keepdims=True)) @ vectors
    ours = bridge_images(torch.tensor(logits).float(), torch.tensor(vectors).float(), temperature)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    half = bridge_images(torch.tensor(logits).bfloat16(), torch.tensor(vectors).float(), temperature)
    assert half.dtype == torch.float32
    assert torch.isfinite(bridge_images(torch.tensor([[1e4, -1e4]]), torch.eye(2))).all()


def test_class_vectors_are_centred_unit_rows(rng: np.random.Generator) -> None:
    means = rng.normal(size=(6, 4)) + 10  # a large common direction
    vectors, centre = centred_class_vectors(torch.tensor(means))
    np.testing.assert_allclose(centre, means.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(vectors, unit(means - means.mean(axis=0)), atol=1e-9)


class Colours(TimmEncoder):
    """A classifier of three colours: its logits are 20 times the mean of each channel."""

    def __init__(self) -> None:
        preprocessing = ImagePreprocessing(size=(16, 16), resize="squash", mean=(0.0,) * 3, std=(1.0,) * 3)
        super().__init__(timm.create_model("test_resnet", num_classes=3), "x", "colours", preprocessing=preprocessing)

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.mean(dim=(2, 3)) * 20


def paint(*colours: tuple[int, int, int]) -> list[np.ndarray]:
    return [np.full((20, 30, 3), colour, np.uint8) for colour in colours]


def test_a_world_of_three_colours(tiny_sentence: Encoder) -> None:
    encoder = class_bridge(Colours(), tiny_sentence, [[name] for name in COLOURS], temperature=1.0)
    images = encoder.encode_images(paint(*COLOURS.values()))
    texts = encoder.encode_texts(COLOURS)
    scores = texts @ images.T
    np.testing.assert_allclose(scores.diagonal(), 1, atol=1e-3)
    assert (scores.argmax(axis=1) == np.arange(3)).all()
    assert scores[~np.eye(3, dtype=bool)].max() < 0.9
    # Half red, half green: nearer to either of these classes than to the third.
    between = encoder.encode_images(paint((255, 255, 0)))[0] @ texts.T
    assert between[:2].min() > between[2]

    raw = tiny_sentence.encode_texts(COLOURS)
    centre = raw.mean(axis=0)
    np.testing.assert_allclose(texts, unit(raw - centre), atol=1e-5)
    weights = np.exp([20, 20, 0])
    expected = unit(weights / weights.sum() @ unit(raw - centre))
    np.testing.assert_allclose(encoder.encode_images(paint((255, 255, 0)))[0], expected, atol=1e-4)


def test_names_and_descriptions(tiny_sentence: Encoder) -> None:
    """A bare name also stands as a photo of it; of several texts the mean counts."""
    bare = class_bridge(Colours(), tiny_sentence, list(COLOURS))
    spelt = class_bridge(Colours(), tiny_sentence, [[name, f"a photo of a {name}"] for name in COLOURS])
    np.testing.assert_allclose(bare.weights["class_vectors"], spelt.weights["class_vectors"], atol=1e-6)
    groups = [["a dog", "a cat", "a horse"], ["pizza"], ["a kitchen", "a table"]]
    means = np.stack([tiny_sentence.encode_texts(group).mean(axis=0) for group in groups])
    encoder = class_bridge(Colours(), tiny_sentence, groups)
    np.testing.assert_allclose(encoder.weights["class_vectors"], unit(means - means.mean(axis=0)), atol=1e-5)


def test_temperature_spreads_and_is_part_of_the_fingerprint(tiny_sentence: Encoder, tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = TimmEncoder(timm.create_model("test_resnet", num_classes=3), "test_resnet", "mine")
    sharp, soft = (class_bridge(classifier, tiny_sentence, list(COLOURS), temperature=t) for t in (0.1, 50.0))
    assert sharp.fingerprint != soft.fingerprint
    images = paint((255, 255, 0), (9, 100, 200))
    assert not np.allclose(sharp.encode_images(images), soft.encode_images(images), atol=1e-3)
    again = load_encoder(sharp.save(tmp_path / "saved"), device="cpu")
    assert again.fingerprint == sharp.fingerprint
    np.testing.assert_array_equal(again.encode_images(images), sharp.encode_images(images))
    np.testing.assert_array_equal(again.encode_texts(COLOURS), sharp.encode_texts(COLOURS))


def test_a_classifier_in_half_precision_stays_so(tiny_sentence: Encoder) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    exact = class_bridge(TimmEncoder(model, "test_resnet", "mine"), tiny_sentence, list(COLOURS))
    images = paint((255, 255, 0), (9, 100, 200))
    expected = exact.encode_images(images)
    half = class_bridge(TimmEncoder(model, "test_resnet", "mine").to("cpu", "bfloat16"), tiny_sentence, list(COLOURS))
    assert half.dtype == torch.bfloat16
    assert (half.encode_images(images) * expected).sum(axis=1).min() > 0.99
    np.testing.assert_array_equal(half.encode_texts(COLOURS), exact.encode_texts(COLOURS))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_parts_on_cuda(tiny_sentence: Encoder, bert_folder: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    exact = class_bridge(TimmEncoder(model, "test_resnet", "mine"), tiny_sentence, list(COLOURS))
    images = paint((255, 255, 0))
    expected = exact.encode_images(images), exact.encode_texts(COLOURS)
    text = load_encoder(f"transformers:{bert_folder}", device="cuda")
    bridge = class_bridge(TimmEncoder(model, "test_resnet", "mine").to("cuda"), text, list(COLOURS))
    assert bridge.device.type == "cuda"
    np.testing.assert_allclose(bridge.encode_images(images), expected[0], atol=1e-2)
    np.testing.assert_allclose(bridge.encode_texts(COLOURS), expected[1], atol=1e-3)


def test_what_does_not_fit_together(tiny_sentence: Encoder, tiny_timm: Encoder) -> None:
    for names in (["red"], [*COLOURS, "violet"]):
        with pytest.raises(InputError, match=f"{len(names)} class names for a classifier with 3 logits"):
            class_bridge(Colours(), tiny_sentence, names)
    for first, second in ((tiny_sentence, tiny_sentence), (Colours(), tiny_timm)):
        with pytest.raises(InputError, match="needs an image classifier and a text encoder"):
            class_bridge(first, second, list(COLOURS))


def test_bundled_class_vectors_are_those_of_the_names(bundled: Encoder) -> None:
    """The packaged vectors against the text encoder and ImageNet's names; they are kept in half precision."""
    from mmalign.encoders.bundled import imagenet_class_texts

    texts = imagenet_class_texts()
    assert [len(texts), texts[207][0]] == [1000, "golden retriever"]
    chosen = range(0, 1000, 40)
    flat = bundled.encode_texts([text for i in chosen for text in texts[i]])  # centred, then normalised
    own = bundled.text_encoder.encode_texts([text for i in chosen for text in texts[i]])  # type: ignore[attr-defined]
    centre, vectors = bundled.weights["centre"].numpy(), bundled.weights["class_vectors"].numpy()
    np.testing.assert_allclose(flat, unit(own - centre), atol=1e-5)
    expected = unit(own.reshape(len(chosen), 3, -1).mean(axis=1) - centre)
    assert (unit(vectors[list(chosen)]) * expected).sum(axis=1).min() > 0.999
