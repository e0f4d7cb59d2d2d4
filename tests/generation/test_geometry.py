"""Sizes, crops and pixels against torchvision and Pillow; size conditioning against the pipeline's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from generation.training.geometry import aspect_buckets, nearest_bucket, pixels, place

SIDES = st.integers(64, 3000)


def positions(height: int, width: int) -> Tensor:
    """An image that says of each pixel where it is."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, torch.zeros_like(rows)])


@settings(max_examples=60, deadline=None)
@given(st.integers(64, 400), st.integers(64, 400), st.sampled_from([64, 72, 128, 200]))
def test_squares_are_resized_and_cropped_as_torchvision_does(height: int, width: int, resolution: int) -> None:
    placement = place((height, width), (resolution, resolution))
    resized = v2.functional.resize(torch.zeros(1, height, width), [resolution])
    assert placement.resized == tuple(resized.shape[1:])
    cropped = v2.functional.center_crop(positions(*placement.resized), [resolution, resolution])
    assert placement.crop_top_left == (int(cropped[0, 0, 0]), int(cropped[1, 0, 0]))


@given(SIDES, SIDES, SIDES, SIDES)
def test_a_canvas_is_covered_with_the_aspect_ratio_kept(height: int, width: int, tall: int, wide: int) -> None:
    assume(max(height * wide, width * tall) < 50 * min(height * wide, width * tall))
    placement = place((height, width), (tall, wide))
    (h, w), (top, left) = placement.resized, placement.crop_top_left
    assert h >= tall
    assert w >= wide
    assert h == tall or w == wide
    assert 0 <= top <= h - tall
    assert 0 <= left <= w - wide
    assert abs(top - (h - tall - top)) <= 1
    assert abs(left - (w - wide - left)) <= 1
    assert abs(h - w * height / width) <= max(1, height / width)
    assert abs(w - h * width / height) <= max(1, width / height)
    assert placement.target == (tall, wide)
    assert placement.original == (height, width)


@pytest.mark.parametrize("target", [(96, 96), (64, 128), (128, 64)])
def test_pixels_are_those_of_pillow_and_torchvision(photos: Path, target: tuple[int, int]) -> None:
    with Image.open(sorted(photos.glob("*.jpg"))[0]) as opened:
        image = opened.convert("RGB")
    source = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    placement = place((image.height, image.width), target)
    made = pixels(source, placement)
    assert made.shape == (3, *target)
    assert made.dtype == torch.float32

    box = (
        *placement.crop_top_left[::-1],
        placement.crop_top_left[1] + target[1],
        placement.crop_top_left[0] + target[0],
    )
    by_pillow = image.resize(placement.resized[::-1], Image.Resampling.BILINEAR).crop(box)
    expected = torch.from_numpy(np.array(by_pillow)).permute(2, 0, 1) / 127.5 - 1
    assert (made - expected).abs().max() <= 1.5 / 127.5  # Pillow rounds to whole values twice
    assert (made - expected).abs().mean() <= 0.5 / 127.5

    if target[0] == target[1]:
        composed = v2.Compose([
            v2.ToDtype(torch.float32, scale=True), v2.Resize(target[0], antialias=True), v2.CenterCrop(target),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ])  # fmt: skip
        torch.testing.assert_close(made, composed(source), rtol=0, atol=1e-5)


def test_a_flip_mirrors_what_is_there_and_moves_no_crop(photos: Path) -> None:
    image = torch.randint(0, 256, (3, 70, 101), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    placement = place((70, 101), (64, 64))
    mirrored = v2.functional.horizontal_flip(pixels(image, placement))
    assert torch.equal(pixels(image, placement, flip=True), mirrored)
    assert not torch.equal(mirrored, pixels(image, placement))


def test_pixels_fill_minus_one_to_one() -> None:
    image = torch.tensor([0, 255], dtype=torch.uint8).repeat(3, 64, 32)
    made = pixels(image, place((64, 64), (64, 64)))
    assert sorted(made.unique().tolist()) == [-1.0, 1.0]


def test_image_1_of_another_shape_is_stretched_to_image_0(photos: Path) -> None:
    """Its four corners stay corners: it is resized to image 0's size, and its own aspect ratio is lost."""
    other = torch.zeros(3, 200, 80, dtype=torch.uint8)
    other[:, :100] = 255
    made = pixels(other, place((64, 128), (64, 128)))
    assert (made[:, :30] > 0.99).all()
    assert (made[:, 34:] < -0.99).all()


def test_size_conditioning_is_the_pipelines(tiny_sdxl: Any) -> None:
    placement = place((150, 100), (96, 64))
    asked = tiny_sdxl._get_add_time_ids(
        placement.original, placement.crop_top_left, placement.target, torch.float32, text_encoder_projection_dim=32
    )
    assert asked.tolist() == [list(placement.time_ids)]
    assert place((300, 100), (64, 64)).time_ids == (300, 100, 64, 0, 64, 64)


@given(st.integers(256, 1536))
def test_buckets_have_the_canvas_area_and_whole_blocks(resolution: int) -> None:
    buckets = aspect_buckets(resolution)
    assert len(set(buckets)) == len(buckets)
    for height, width in buckets:
        assert height % 64 == width % 64 == 0
        assert max(height / width, width / height) <= 2
        assert height * width <= resolution**2 < (height + 64) * (width + 64)
        assert (width, height) in buckets
        assert height * width >= resolution**2 - 64 * max(height, width)


def test_buckets_are_those_of_sdxl() -> None:
    """arXiv 2307.01952, appendix I, aspect ratios 0.5 to 2."""
    published = [(704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152), (896, 1152), (896, 1088),
                 (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896), (1152, 896),
                 (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1344, 704), (1408, 704)]  # fmt: skip
    assert set(aspect_buckets(1024)) <= set(published)


@pytest.mark.parametrize("resolution", [64, 65, 72, 90])
def test_a_small_canvas_has_a_bucket(resolution: int) -> None:
    assert aspect_buckets(resolution) == [(64, 64)]


@given(SIDES, SIDES)
def test_the_bucket_with_the_nearest_aspect_ratio_is_taken(height: int, width: int) -> None:
    buckets = aspect_buckets(512)
    chosen = nearest_bucket((height, width), buckets)
    distance = abs(math.log(height / width) - math.log(chosen[0] / chosen[1]))
    for bucket in buckets:
        other = abs(math.log(height / width) - math.log(bucket[0] / bucket[1]))
        assert distance <= other + 1e-12
        if abs(distance - other) < 1e-12 and bucket[0] * chosen[1] == bucket[1] * chosen[0]:
            assert chosen[0] * chosen[1] >= bucket[0] * bucket[1]
    assert nearest_bucket((height, width), [(64, 64), (128, 128)]) == (128, 128)
