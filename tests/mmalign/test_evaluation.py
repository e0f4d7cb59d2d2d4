"""Chance against random rankings; encoders side by side with chance first; zero-shot by prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from mmalign.encoders import Encoder
from mmalign.errors import InputError
from mmalign.evaluation import Comparison, class_prompts, compare_retrieval, compare_zero_shot, named_templates
from mmalign.metrics import image_text_retrieval
from mmalign.metrics.chance import chance_hit, chance_retrieval


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("counts", [[1] * 12, [5] * 6, [1, 2, 9, 4, 1, 1], [3, 0, 2]])
def test_chance_is_what_random_orders_give(counts: list[int]) -> None:
    owner, n = np.repeat(np.arange(len(counts)), counts), len(counts)
    rng, m, draws = np.random.default_rng(0), sum(counts), 4000
    chance = chance_retrieval(owner, n, ks=(1, 2, 5, 40))
    described = np.array([image for image in range(n) if counts[image]])
    # The place of the first own text among all texts in random order, for each image; of the own image for a text.
    places = np.array([[rng.permutation(m)[: counts[image]].min() for image in described] for _ in range(draws)])
    of_image = {"image_to_text": places, "text_to_image": rng.integers(n, size=(draws, m))}
    for direction, ranks in of_image.items():
        for k in (1, 2, 5, 40):
            spread = ranks.size**-0.5
            assert chance[direction][f"hit@{k}"] == pytest.approx((ranks < k).mean(), abs=3 * spread)
        middle = np.median(ranks) + 1
        assert abs(chance[direction]["medr"] - middle) <= 1


def test_chance_in_numbers_known_beforehand() -> None:
    assert chance_hit(np.array([1]), 20, 5) == pytest.approx(0.25)
    # 1 - (17/20)(16/19)
    assert chance_hit(np.array([3]), 20, 2) == pytest.approx(1 - 17 * 16 / (20 * 19))
    assert chance_hit(np.array([3]), 20, 18) == 1
    assert chance_hit(np.array([1]), 4, 9) == 1
    large = chance_hit(np.array([5]), 25_000, 10)
    assert large == pytest.approx(1 - np.prod(1 - 5 / (25_000 - np.arange(10))), rel=1e-6)


def test_comparison_holds_chance_first_and_reads_as_a_table() -> None:
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(30), 2)
    images = unit(rng.normal(size=(30, 8)))
    near = unit(images[owner] + 0.3 * rng.normal(size=(60, 8)))
    found = compare_retrieval(
        {"mine": (images, near), "a very long name of an encoder": (images[:, :5], rng.normal(size=(60, 5)))},
        owner,
        ks=(1, 5),
        bootstrap=50,
    )
    assert list(found.figures) == ["chance", "mine", "a very long name of an encoder"]
    plain = image_text_retrieval(images, near, owner, ks=(1, 5))
    for direction, figures in plain.items():
        own = found.figures["mine"][direction]
        assert own["hit@1"] == figures["hit@1"]
        assert own["hit@1_low"] <= own["hit@1"] <= own["hit@1_high"]
        assert found.figures["chance"][direction]["hit@1"] < own["hit@1"]
    lines = found.table()
    assert [line.split("  ")[0].strip() for line in lines[2:]] == list(found.figures)
    chance, mine = lines[2].split(), lines[3].split()
    t2i, i2t = plain["text_to_image"], plain["image_to_text"]
    wanted = [t2i["hit@1"], t2i["hit@5"], t2i["medr"], i2t["hit@1"], i2t["hit@5"], i2t["medr"]]
    assert [float(cell) for cell in mine[1:]] == pytest.approx(wanted, abs=5e-4)
    assert float(chance[1]) == pytest.approx(1 / 30, abs=5e-4)
    assert len({len(line) for line in lines[1:]}) == 1
    assert any("30 images are few" in note for note in found.notes)
    assert Comparison.from_dict(json.loads(json.dumps(found.to_dict()))) == found


class Words:
    """Encodes a text as the sum of its words' vectors, an image (already a text) likewise."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode_texts(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        self.asked += texts
        words = [
            [np.random.default_rng(list(word.encode())).normal(size=64) for word in text.split()] for text in texts
        ]
        return unit(np.array([np.sum(vectors, axis=0) for vectors in words])).astype(np.float32)

    encode_images = encode_texts


def test_zero_shot_by_prompts() -> None:
    encoder = Words()
    labels = ["red fox", "owl", "owl", "hare"]
    images = ["red fox in snow", "owl at night", "hare", "hare on grass"]
    found = compare_zero_shot(
        {"words": cast(Encoder, encoder)}, images, labels, templates=["a photo of a {}", "{} outside"]
    )
    assert found.classes == ["hare", "owl", "red fox"]
    assert "a photo of a red fox" in encoder.asked
    assert "red fox outside" in encoder.asked
    assert list(found.figures) == ["chance", "words"]
    assert found.figures["chance"]["top1_micro"] == pytest.approx(1 / 3)
    assert found.figures["chance"]["top5_macro"] == 1
    # The third image is of a hare and labelled owl: three of four, and (1 + 1/2 + 1) / 3 over the classes.
    assert found.figures["words"]["top1_micro"] == pytest.approx(0.75)
    assert found.figures["words"]["top1_macro"] == pytest.approx(2.5 / 3)
    assert found.figures["words"]["top5_micro"] == 1
    assert [line.split()[0] for line in found.table()[1:]] == ["chance", "words"]
    given = compare_zero_shot(
        {"words": cast(Encoder, encoder)}, {"words": encoder.encode_images(images)}, labels, templates=["{} outside"]
    )
    assert given.images == 4
    json.dumps(found.to_dict())


def test_zero_shot_refuses_what_cannot_be_classified() -> None:
    with pytest.raises(InputError, match=r"labels name 1 class \(owl\)"):
        compare_zero_shot({"words": cast(Encoder, Words())}, ["x"], ["owl"], templates=["{}"])
    with pytest.raises(InputError, match=r"template 'a photo' has no \{\}"):
        class_prompts(["owl"], ["{}", "a photo"])
    with pytest.raises(InputError, match=r"has no \{\}"):
        class_prompts(["owl"], [])


def test_named_templates() -> None:
    assert (len(named_templates("simple")), len(named_templates("imagenet"))) == (7, 80)
    assert class_prompts(["owl"], named_templates("simple")[:1]) == [["itap of a owl."]]
    with pytest.raises(InputError, match="templates are 'none'; give simple or imagenet"):
        named_templates("none")
