"""`JoinedEncoder`: what two encoders and fitted weights are together, whatever happens to the parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign import Encoder, JoinedEncoder, load_encoder
from mmalign.encoders.timm import TimmEncoder
from mmalign.errors import InputError

timm = pytest.importorskip("timm")

PHOTOS = [np.full((40, 30, 3), colour, np.uint8) for colour in ((250, 10, 10), (20, 240, 80), (9, 100, 200))]
TEXTS = ["a dog", "a photo of a kitchen"]


class TwoHeads(JoinedEncoder):
    source = "two_heads"

    def join_images(self, features: Tensor) -> Tensor:
        return features @ self.weights["image"] * self.weights["scale"]

    def join_texts(self, features: Tensor) -> Tensor:
        return features @ self.weights["text"]


@pytest.fixture
def parts(tiny_sentence: Encoder) -> Callable[[], tuple[Encoder, Encoder]]:
    def make() -> tuple[Encoder, Encoder]:
        torch.manual_seed(0)
        return TimmEncoder(timm.create_model("test_resnet", num_classes=0), "test_resnet", "mine"), tiny_sentence

    return make


@pytest.fixture
def weights(parts: Callable[[], tuple[Encoder, Encoder]]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    image, text = parts()
    heads = {"image": torch.randn(image.dim, 8, generator=draw), "text": torch.randn(text.dim, 8, generator=draw)}
    return {**heads, "scale": torch.tensor(2.0)}


@pytest.fixture
def joined(parts: Callable[[], tuple[Encoder, Encoder]], weights: dict[str, Tensor]) -> TwoHeads:
    return TwoHeads(*parts(), weights, dim=8, settings={"note": 1})


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_features_go_through_their_heads(joined: TwoHeads, weights: dict[str, Tensor]) -> None:
    """Against the parts' own unit rows: heads are linear, so lengths do not matter."""
    images, texts = joined.image_encoder.encode_images(PHOTOS), joined.text_encoder.encode_texts(TEXTS)
    np.testing.assert_allclose(joined.encode_images(PHOTOS), unit(images @ weights["image"].numpy()), atol=1e-5)
    np.testing.assert_allclose(joined.encode_texts(TEXTS), unit(texts @ weights["text"].numpy()), atol=1e-5)


def test_saved_inside_one_folder(joined: TwoHeads, tmp_path: Path) -> None:
    again = load_encoder(joined.save(tmp_path / "joined"), device="cpu")
    assert type(again) is TwoHeads
    assert again.fingerprint == joined.fingerprint
    assert again.settings == {"note": 1}
    np.testing.assert_array_equal(again.encode_images(PHOTOS), joined.encode_images(PHOTOS))
    np.testing.assert_array_equal(again.encode_texts(TEXTS), joined.encode_texts(TEXTS))


@pytest.mark.parametrize("what", ["swapped", "number", "settings", "image part", "preprocessing"])
def test_fingerprint_follows_everything(
    what: str,
    joined: TwoHeads,
    parts: Callable[[], tuple[Encoder, Encoder]],
    weights: dict[str, Tensor],
) -> None:
    image, text = parts()
    changed: dict[str, Any] = {"settings": {"note": 1}}
    if what == "swapped":  # two heads of one shape change places
        square = {"a": torch.eye(3), "b": torch.ones(3, 3)}
        one, other = (TwoHeads(image, text, {**weights, **heads}, dim=8) for heads in (square, _swapped(square)))
        assert one.fingerprint != other.fingerprint
        return
    if what == "number":
        weights = {**weights, "scale": torch.tensor(3.0)}
    elif what == "settings":
        changed = {"settings": {"note": 2}}
    elif what == "image part":
        next(iter(image.model.state_dict().values())).view(-1)[0] += 1
    else:
        assert image.preprocessing is not None
        object.__setattr__(image.preprocessing, "mean", (0.1, 0.2, 0.3))
    assert TwoHeads(image, text, weights, dim=8, **changed).fingerprint != joined.fingerprint


def _swapped(pair: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(pair, reversed(list(pair.values())), strict=True))


def test_a_part_that_was_rounded_before(
    joined: TwoHeads, parts: Callable[[], tuple[Encoder, Encoder]], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    image, text = parts()
    half = TwoHeads(image.to("cpu", "bfloat16"), text, weights, dim=8, settings={"note": 1})
    assert half.dtype == torch.bfloat16
    assert half.fingerprint == joined.fingerprint, "it is the same encoder, in another precision"
    assert (half.encode_images(PHOTOS) * joined.encode_images(PHOTOS)).sum(axis=1).min() > 0.99
    with pytest.raises(InputError, match="float32"):
        half.save(tmp_path / "half")


def test_parts_stay_usable_after_a_cast(joined: TwoHeads, tmp_path: Path) -> None:
    exact = joined.image_encoder.encode_images(PHOTOS)
    joined.to("cpu", "bfloat16")
    assert (joined.image_encoder.encode_images(PHOTOS) * exact).sum(axis=1).min() > 0.99
    with pytest.raises(InputError, match="float32"):
        joined.image_encoder.save(tmp_path / "part")


def test_another_device_keeps_the_precision(joined: TwoHeads) -> None:
    assert joined.to("cpu", "bfloat16").to("cpu").dtype == torch.bfloat16


def test_a_missing_tower_is_named(tiny_sentence: Encoder, weights: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match="has no image tower"):
        TwoHeads(tiny_sentence, tiny_sentence, weights, dim=8)
