"""From checked rows to batches: who wins, who shares what, and what the model is told of sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from generation.data import CheckedData, Example, ImageRef
from generation.training.encoding import LatentEncoder, PromptEncoder
from generation.training.geometry import aspect_buckets, pixels
from generation.training.training_set import EncodedSet, Sample, SampleOptions, samples_of
from mmalign.imaging import read_image


def example(winner: int, sizes: tuple[tuple[int, int], ...], rewards: tuple[float, ...] | None = None) -> Example:
    images = tuple(ImageRef(f"{n:064x}", *size) for n, size in enumerate(sizes))
    return Example(7, "line 8", "a cat", images, winner, rewards)


class Pixels:
    """A VAE that keeps every eighth pixel, so that a latent shows which image it is of."""

    fingerprint = "pixels"

    def encode(self, image: Tensor, key: str) -> Tensor:
        return image[:, ::8, ::8]


def encoded(
    checked: CheckedData, prompts: PromptEncoder, unit: str = "pairs", *, buckets: bool = False, resolution: int = 64,
    **options: Any,
) -> EncodedSet:  # fmt: skip
    samples = samples_of(checked.examples, resolution, unit=unit, buckets=buckets)
    chosen = SampleOptions(**{"seed": 0, "num_train_timesteps": 1000, "dtype": torch.float32, **options})
    return EncodedSet(checked, samples, chosen, Pixels(), prompts, None)  # type: ignore[arg-type]


def shown(photo_pairs: Path, sample: Sample, pair: int, side: int, flip: bool = False) -> Tensor:
    image = read_image(photo_pairs / f"{pair}-{side}.png").pixels
    return pixels(image, sample.placement, flip=flip)[:, ::8, ::8]


def test_the_winner_comes_first_and_image_0_gives_the_size() -> None:
    for winner in (0, 1):
        (sample,) = samples_of([example(winner, ((100, 200), (300, 150)))], 64)
        assert [image.sha256[-1] for image in sample.images] == [str(winner), str(1 - winner)]
        assert sample.columns == (winner, 1 - winner)
        assert sample.placement.time_ids == (100, 200, 0, 32, 64, 64)
        assert (sample.row, sample.name, sample.caption) == (7, "line 8", "a cat")


def test_single_images_give_their_own_sizes() -> None:
    pair = example(1, ((100, 200), (300, 150)))
    (winner,) = samples_of([pair], 64, unit="winners")
    assert winner.columns == (1,)
    assert winner.placement.time_ids == (300, 150, 32, 0, 64, 64)
    both = samples_of([pair], 64, unit="images")
    assert [sample.columns for sample in both] == [(1,), (0,)]
    assert [sample.placement.original for sample in both] == [(300, 150), (100, 200)]


@pytest.mark.parametrize(
    ("unit", "rewards", "expected"),
    [
        ("pairs", None, [1.0]),
        ("winners", None, [1.0]),
        ("images", None, [1.0, 0.0]),
        ("pairs", (0.2, 0.9), [0.9]),
        ("winners", (0.2, 0.9), [0.9]),
        ("images", (0.2, 0.9), [0.9, 0.2]),
    ],
)
def test_rewards_are_of_the_image_they_go_with(
    unit: str, rewards: tuple[float, ...] | None, expected: list[float]
) -> None:
    samples = samples_of([example(1, ((64, 64), (64, 64)), rewards)], 64, unit=unit)
    assert [sample.reward for sample in samples] == expected


def test_captioned_images_are_winners_of_reward_1_or_their_own() -> None:
    for rewards, expected in ((None, 1.0), ((0.3,), 0.3)):
        for unit in ("winners", "images"):
            (sample,) = samples_of([example(0, ((64, 64),), rewards)], 64, unit=unit)
            assert sample.reward == expected
            assert len(sample.images) == 1


def test_a_pair_shares_the_bucket_of_image_0() -> None:
    (wide,) = samples_of([example(1, ((100, 200), (200, 100)))], 256, buckets=True)
    (square,) = samples_of([example(1, ((100, 200), (200, 100)))], 256)
    assert wide.placement.target in aspect_buckets(256)
    assert wide.placement.target[1] > wide.placement.target[0]
    assert square.placement.target == (256, 256)


def test_winners_are_stacked_before_losers(
    photo_pairs: Path, checked_pairs: CheckedData, prompt_encoder: PromptEncoder
) -> None:
    """Odd pairs have label 0: their image 1 won."""
    data = encoded(checked_pairs, prompt_encoder)
    indices = [3, 0, 2, 5]
    batch = data.assemble(indices, [10, 11, 12, 13])
    assert batch.latents.shape == (8, 3, 8, 8)
    for place, pair in enumerate(indices):
        sample, winner = data.samples[pair], pair % 2
        assert batch.names[place] == f"metadata.jsonl line {pair + 1}" == sample.name
        assert torch.equal(batch.latents[place], shown(photo_pairs, sample, pair, winner))
        assert torch.equal(batch.latents[4 + place], shown(photo_pairs, sample, pair, 1 - winner))


def test_a_pair_shares_noise_time_caption_and_sizes(checked_pairs: CheckedData, prompt_encoder: PromptEncoder) -> None:
    data = encoded(checked_pairs, prompt_encoder, resolution=96)
    batch = data.assemble([3, 0, 2], [0, 1, 2])
    shared = [batch.noise, batch.timesteps, batch.conditioning.prompt_embeds]
    shared += [value for value in (batch.conditioning.pooled_prompt_embeds, batch.conditioning.time_ids)
               if value is not None]  # fmt: skip
    assert len(shared) == 5
    for value in shared:
        winners, losers = value.chunk(2)
        assert torch.equal(winners, losers)
        assert len({tuple(row.flatten().tolist()) for row in winners}) == 3
    for place, pair in enumerate((3, 0, 2)):
        expected = prompt_encoder.encode(checked_pairs.examples[pair].caption)
        assert torch.equal(batch.conditioning.prompt_embeds[place], expected["prompt_embeds"])
        assert batch.conditioning.time_ids is not None
        assert batch.conditioning.time_ids.dtype == torch.float32
        assert batch.conditioning.time_ids[place].tolist() == list(data.samples[pair].placement.time_ids)
    assert batch.rewards is not None
    assert batch.rewards.tolist() == [1, 1, 1]


def test_images_by_themselves_share_nothing(checked_pairs: CheckedData, prompt_encoder: PromptEncoder) -> None:
    data = encoded(checked_pairs, prompt_encoder, "images")
    assert len(data.samples) == 16
    batch = data.assemble([0, 1], [0, 1])  # both of one pair
    assert len(batch.latents) == len(batch.names) == 2
    assert not torch.equal(batch.noise[0], batch.noise[1])
    assert batch.timesteps[0] != batch.timesteps[1]
    assert torch.equal(batch.conditioning.prompt_embeds[0], batch.conditioning.prompt_embeds[1])
    assert batch.rewards is not None
    assert batch.rewards.tolist() == [1, 0]


def test_winners_are_the_same_images_as_in_pairs(
    photo_pairs: Path, checked_pairs: CheckedData, prompt_encoder: PromptEncoder
) -> None:
    data = encoded(checked_pairs, prompt_encoder, "winners")
    batch = data.assemble(range(8), range(8))
    for pair in range(8):
        assert torch.equal(batch.latents[pair], shown(photo_pairs, data.samples[pair], pair, pair % 2))


def test_a_flip_is_of_both_images_of_a_pair(
    photo_pairs: Path, checked_pairs: CheckedData, prompt_encoder: PromptEncoder
) -> None:
    data = encoded(checked_pairs, prompt_encoder, random_flip=True)
    flipped = 0
    for ordinal in range(30):
        latents = data.assemble([1], [ordinal]).latents
        sample = data.samples[1]
        plain, mirrored = (
            torch.stack([shown(photo_pairs, sample, 1, side, flip) for side in (1, 0)]) for flip in (False, True)
        )
        assert torch.equal(latents, plain) or torch.equal(latents, mirrored)
        flipped += torch.equal(latents, mirrored)
    assert 5 < flipped < 25


def test_dropped_captions_become_the_unconditional_embedding(
    checked_pairs: CheckedData, prompt_encoder: PromptEncoder
) -> None:
    data = encoded(checked_pairs, prompt_encoder, caption_dropout=0.5)
    batch = data.assemble([0] * 40, range(40))
    embeds, pooled = batch.conditioning.prompt_embeds, batch.conditioning.pooled_prompt_embeds
    assert pooled is not None
    caption = prompt_encoder.encode(checked_pairs.examples[0].caption)["prompt_embeds"]
    dropped = [not embed.any() for embed in embeds]
    assert 8 < sum(dropped[:40]) < 32
    assert dropped[:40] == dropped[40:]
    for drop, embed, pool in zip(dropped, embeds, pooled, strict=True):
        assert torch.equal(embed, torch.zeros_like(embed) if drop else caption)
        assert drop == (not pool.any())
    every = encoded(checked_pairs, prompt_encoder, caption_dropout=1.0).assemble([0, 2], [0, 1])
    assert not every.conditioning.prompt_embeds.any()


def test_a_sample_is_the_same_in_any_batch(checked_pairs: CheckedData, prompt_encoder: PromptEncoder) -> None:
    data = encoded(checked_pairs, prompt_encoder, random_flip=True, caption_dropout=0.3)
    whole = data.assemble([4, 1, 6, 2], [20, 21, 22, 23])
    for place, (index, ordinal) in enumerate(zip([4, 1, 6, 2], [20, 21, 22, 23], strict=True)):
        alone = data.assemble([index], [ordinal])
        for half in (0, 1):
            row = place + 4 * half
            assert torch.equal(alone.latents[half], whole.latents[row])
            assert torch.equal(alone.noise[half], whole.noise[row])
            assert alone.timesteps[half] == whole.timesteps[row]
            assert torch.equal(alone.conditioning.prompt_embeds[half], whole.conditioning.prompt_embeds[row])
    assert not torch.equal(data.assemble([4], [24]).noise, data.assemble([4], [20]).noise)


def test_latents_are_float32_rounded_to_what_a_cache_would_hold(
    checked_pairs: CheckedData, latent_encoder: LatentEncoder, prompt_encoder: PromptEncoder
) -> None:
    samples = samples_of(checked_pairs.examples, 64)
    options = SampleOptions(seed=0, num_train_timesteps=1000)
    batches = [
        EncodedSet(
            checked_pairs, samples, dataclasses.replace(options, dtype=dtype), latent_encoder, prompt_encoder, None
        )
        .assemble([0], [0])
        .latents
        for dtype in (torch.float16, torch.float32)
    ]
    assert batches[0].dtype == torch.float32
    assert torch.equal(batches[0].half().float(), batches[0])
    assert not torch.equal(batches[1].half().float(), batches[1])
