"""The two towers of the bundled encoder by themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign import Encoder, InputError, load_encoder


def test_image_tower_gives_what_the_classifier_reads(bundled: Encoder, photos: Path) -> None:
    tower, whole = load_encoder("bundled:image", device="cpu"), bundled.image_encoder  # type: ignore[attr-defined]
    pixels = torch.stack([whole.load_image(path)[1] for path in sorted(photos.glob("*.jpg"))[:2]])
    with torch.inference_mode():
        features = tower.image_features(pixels)
        logits = whole.model.classifier(features)
        torch.testing.assert_close(logits, whole.image_features(pixels))
    assert (tower.spec, tower.dim, tower.modalities) == ("bundled:image", 1280, {"image"})


def test_text_tower_is_the_bundled_one(bundled: Encoder) -> None:
    tower = load_encoder("bundled:text", device="cpu")
    own = bundled.text_encoder.encode_texts(["a dog", "three red boats"])  # type: ignore[attr-defined]
    np.testing.assert_allclose(tower.encode_texts(["a dog", "three red boats"]), own, atol=1e-6)


def test_another_name_is_refused() -> None:
    with pytest.raises(InputError, match="image, text"):
        load_encoder("bundled:both")
