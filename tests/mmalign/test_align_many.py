"""Modalities that were never paired with each other, bound to one space of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from mmalign.alignment import Pairs, align_many, load_alignment
from mmalign.errors import InputError
from mmalign.metrics import image_text_retrieval

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK: dict[str, Any] = {"steps": 200, "dim": 16, "learning_rate": 1e-2, "batch_size": 128}


def hit(rows: np.ndarray, others: np.ndarray) -> float:
    """The smaller R@1 of both directions."""
    found = image_text_retrieval(rows, others, np.arange(len(rows)), ks=(1,))
    return min(direction["hit@1"] for direction in found.values())


class Hub:
    """Three modalities of other widths, each with texts of its own and never paired with each other."""

    WIDTHS: ClassVar = {"image": 24, "audio": 15, "depth": 19}

    def __init__(self, noise: float = 0.1, apart: float = 1.0) -> None:
        rng = np.random.default_rng(0)
        self.noise, self.rng = noise, rng
        widths = {**self.WIDTHS, "text": 16}
        self.maps = {name: np.linalg.qr(rng.normal(size=(width, 8)))[0].T for name, width in widths.items()}
        # What the texts of a modality speak of lies elsewhere than that of the others.
        self.middle = {name: apart * rng.normal(size=8) for name in self.WIDTHS}

    def view(self, name: str, shared: np.ndarray) -> np.ndarray:
        rows = shared @ self.maps[name]
        return (rows + self.noise * self.rng.normal(size=rows.shape) + 1).astype(np.float32)

    def pairs(self, folder: Path) -> dict[str, Pairs]:
        out = {}
        for name in self.WIDTHS:
            shared = self.middle[name] + self.rng.normal(size=(250, 8))
            for what in (name, "text"):
                np.save(folder / f"{name}-{what}.npy", self.view(what, shared))
            out[name] = Pairs(folder / f"{name}-{name}.npy", str(folder / f"{name}-text.npy"))
        return out


@pytest.mark.parametrize("method", ["structure", "ridge", "procrustes"])
def test_modalities_meet_in_the_space_of_the_texts(tmp_path: Path, method: str) -> None:
    # A rotation of unit rows has no place for what sets the modalities apart.
    hub = Hub(apart=0.0 if method == "procrustes" else 1.0)
    options = QUICK if method == "structure" else {}
    found = align_many(hub.pairs(tmp_path), method=method, **options)
    assert set(found.heads) == {"image", "audio", "depth", "text"}
    assert {name: source.dim for name, source in found.sources.items()} == {**Hub.WIDTHS, "text": 16}
    shared = hub.rng.normal(size=(50, 8))
    rows = {name: found.encode(name, hub.view(name, shared)) for name in found.heads}
    for one, other in (("audio", "text"), ("depth", "text"), ("image", "text"), ("audio", "image"), ("depth", "audio")):
        assert hit(rows[one], rows[other]) > 0.8, (one, other)  # chance is 0.02
    again = load_alignment(found.save(tmp_path / "hub"))
    audio = hub.view("audio", shared)
    np.testing.assert_array_equal(again.encode("audio", audio), found.encode("audio", audio))


def test_ridge_hub_keeps_the_place_of_each_modality(tmp_path: Path) -> None:
    hub = Hub(noise=0.0, apart=5.0)
    found = align_many(hub.pairs(tmp_path), method="ridge", regularisation=1e-9, validation=0)
    for name in Hub.WIDTHS:
        shared = hub.middle[name] + hub.rng.normal(size=(20, 8))
        rows, texts = found.encode(name, hub.view(name, shared)), found.encode("text", hub.view("text", shared))
        np.testing.assert_allclose((rows * texts).sum(1), 1, atol=1e-3)


def test_a_method_for_two_sets_names_those_for_more(tmp_path: Path) -> None:
    pairs = Hub().pairs(tmp_path)
    for method in ("cca", "asif"):
        message = f"method '{method}' joins two sets .* 4 are given; for more take structure, clip, siglip, ape, ridge"
        with pytest.raises(InputError, match=message):
            align_many(pairs, method=method)


def test_validation_by_modality(tmp_path: Path) -> None:
    pairs = Hub().pairs(tmp_path)
    mask = np.arange(250) < 30
    for method in ("ridge", "procrustes"):
        options = {"regularisation": 0.1} if method == "ridge" else {}
        found = align_many(pairs, method=method, validation={"audio": mask}, **options)
        assert {name: count["held_out"] for name, count in found.counts.items()} == {
            "image": 0,
            "audio": 30,
            "depth": 0,
        }
    with pytest.raises(InputError, match="a modality of validation is 'sound'; give one of image, audio, depth"):
        align_many(pairs, validation={"sound": mask})


def test_pairs_have_to_be_pairs() -> None:
    rows = np.zeros((5, 3), np.float32)
    with pytest.raises(InputError, match="audio is a tuple; give Pairs"):
        align_many({"audio": (rows, rows)})  # type: ignore[dict-item]
