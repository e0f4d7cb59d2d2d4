"""Checked rows as encoded samples: what a batch is assembled from, cached on disk or made when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.errors import InputError, UnreadableImageError
from mmalign.imaging import FileContent, read_file, read_image
from mmalign.prefetch import prefetch
from mmalign.progress import progress_bar

from ..data import CheckedData, Example, ImageRef, RowSource
from .cache import TensorStore, content_key
from .denoiser import Batch, Conditioning
from .encoding import LatentEncoder, PromptEncoder
from .geometry import Placement, aspect_buckets, nearest_bucket, pixels, place
from .randomness import BucketedBatches, chance, normal, stream, timesteps

__all__ = ["EncodedSet", "Sample", "SampleOptions", "samples_of"]

# Raise it whenever the way from a file to a latent, or from a caption to an embedding, changes.
_RECIPE = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One unit of training: a pair (winner first) or one image, with its caption and its place on the canvas."""

    row: int
    name: str
    caption: str
    images: tuple[ImageRef, ...]
    columns: tuple[int, ...]  # which image of the row each of them is
    placement: Placement
    reward: float


@dataclass(frozen=True)
class SampleOptions:
    """How samples become tensors; see the settings of the same names."""

    seed: int
    num_train_timesteps: int
    random_flip: bool = False
    caption_dropout: float = 0.0
    dtype: torch.dtype = torch.float16
    max_pixels: int | None = None


def samples_of(
    examples: Sequence[Example], resolution: int, *, unit: str = "pairs", buckets: bool = False
) -> list[Sample]:
    """Training units of checked rows.

    Args:
        examples: checked rows.
        resolution: side of the canvas, or of the area of its buckets, in pixels.
        unit: "pairs" (winner, then loser), "winners" (the preferred image of each row), or "images" (every image by
            itself; its reward is the row's, or 1 for a winner and 0 for a loser).
        buckets: choose the canvas of each row among `aspect_buckets` instead of a square.
    """
    canvases = aspect_buckets(resolution) if buckets else [(resolution, resolution)]
    samples = []
    for example in examples:
        order = [example.winner, *(i for i in range(len(example.images)) if i != example.winner)]
        if unit == "pairs":
            groups = [tuple(order)]
        else:
            groups = [(i,) for i in (order if unit == "images" else order[:1])]
        for group in groups:
            # A pair is placed by image 0, whoever won; an image by itself by its own size.
            leader = example.images[0] if unit == "pairs" else example.images[group[0]]
            size = (leader.height, leader.width)
            reward = example.rewards[group[0]] if example.rewards else float(group[0] == example.winner)
            samples.append(
                Sample(
                    row=example.row,
                    name=example.name,
                    caption=example.caption,
                    images=tuple(example.images[i] for i in group),
                    columns=group,
                    placement=place(size, nearest_bucket(size, canvases)),
                    reward=reward,
                )
            )
    return samples


class EncodedSet:
    """Samples with the encoders that turn them into latents and embeddings, and the store that keeps the results.

    Without a store everything is encoded whenever it is asked for, by the same code and to the same values.

    Attributes:
        samples: all of them.
        fingerprint: of the checked data.
        threaded: batches may be made in threads; without a store the VAE runs on the device, between steps.
    """

    def __init__(
        self,
        checked: CheckedData,
        samples: Sequence[Sample],
        options: SampleOptions,
        latents: LatentEncoder,
        prompts: PromptEncoder,
        store: Path | None,
        batch_size: int = 1,
    ) -> None:
        self.samples = list(samples)
        self.fingerprint, self.threaded = checked.fingerprint, store is not None
        self._size = batch_size
        self._order = BucketedBatches([s.placement.target for s in self.samples], batch_size, options.seed)
        self._options, self._latents, self._prompts = options, latents, prompts
        self._source: RowSource = checked.source
        self._latent_store = TensorStore(store / "latents") if store else None
        self._prompt_store = TensorStore(store / "prompts") if store else None

    def encode_all(self, *, workers: int | None, progress: bool, part: tuple[int, int] = (0, 1)) -> None:
        """Fill the store with what is missing; resumable at any moment, as each file is written on its own.

        Args:
            workers: threads that decode ahead.
            progress: show a bar.
            part: (i, n): only the i-th of n parts, for n processes that share a store.
        """
        if self._latent_store is None or self._prompt_store is None:
            return
        self._encode_images(workers, progress, part)
        wanted: dict[str, str | None] = {self._prompt_key(s.caption): s.caption for s in self.samples}
        wanted[self._prompt_key(None)] = None
        missing = {k: caption for k, caption in wanted.items() if _mine(k, part) and k not in self._prompt_store}
        with progress_bar(
            "encoding captions", len(missing), unit="captions", enabled=progress and bool(missing)
        ) as advance:
            for key, caption in missing.items():
                name = f"caption {caption!r}"
                self._prompt_store.write(key, self._prompts.encode(caption), self._options.dtype, name)
                advance()

    def batch(self, number: int) -> Batch:
        """The batch of this number in the run: samples of one canvas, in an order that the seed gives."""
        return self.assemble(self._order[number], range(number * self._size, (number + 1) * self._size))

    def probe(self, size: int) -> Iterator[Batch]:
        """`size` fixed samples at most, one by one, with fixed noise and timesteps spread evenly over the schedule."""
        size, total = min(size, len(self.samples)), self._options.num_train_timesteps
        order = torch.randperm(len(self.samples), generator=stream(self._options.seed, "probe")).tolist()
        for number, index in enumerate(order[:size]):
            batch = self.assemble([index], [-1 - number])
            yield replace(batch, timesteps=torch.full_like(batch.timesteps, int((number + 0.5) / size * total)))

    def assemble(self, indices: Sequence[int], ordinals: Sequence[int]) -> Batch:
        """Assemble a batch on the CPU.

        Args:
            indices: samples, all of one canvas.
            ordinals: the number of each in the run, which names its noise, timestep, flip and dropout.
        """
        options = self._options
        chosen = [self.samples[i] for i in indices]
        members = len(chosen[0].images)
        flips = [options.random_flip and chance(options.seed, "flip", n, 0.5) for n in ordinals]
        dropped = [chance(options.seed, "dropout", n, options.caption_dropout) for n in ordinals]
        latents = [
            self._latent(sample, member, flip)
            for member in range(members)
            for sample, flip in zip(chosen, flips, strict=True)
        ]
        prompts = [self._prompt(None if drop else s.caption) for s, drop in zip(chosen, dropped, strict=True)]
        noise = normal(options.seed, "noise", ordinals, latents[0].shape)
        times = timesteps(options.seed, ordinals, options.num_train_timesteps)
        pooled = [p["pooled_prompt_embeds"] for p in prompts] if "pooled_prompt_embeds" in prompts[0] else None
        conditioning = Conditioning(
            torch.stack([p["prompt_embeds"] for p in prompts]),
            None if pooled is None else torch.stack(pooled),
            None if pooled is None else torch.tensor([s.placement.time_ids for s in chosen], dtype=torch.float32),
        )
        rewards = [s.reward for s in chosen]
        return Batch(
            names=[sample.name for sample in chosen],
            latents=torch.stack(latents).float(),
            noise=noise.repeat(members, 1, 1, 1),
            timesteps=times.repeat(members),
            conditioning=conditioning.repeat(members),
            rewards=torch.tensor(rewards, dtype=torch.float32),
        )

    def _latent(self, sample: Sample, member: int, flip: bool) -> Float[Tensor, "channels h w"]:
        key = self._latent_key(sample, member, flip)
        if self._latent_store is not None:
            return self._latent_store.read(key)["latent"]
        contents = self._source.row(sample.row).images[sample.columns[member]]
        image = self._decode(sample, member, contents)
        tensors = {"latent": self._latents.encode(pixels(image, sample.placement, flip=flip), key)}
        return TensorStore.rounded(tensors, self._options.dtype, sample.name)["latent"]

    def _prompt(self, caption: str | None) -> dict[str, Tensor]:
        if self._prompt_store is not None:
            return self._prompt_store.read(self._prompt_key(caption))
        return TensorStore.rounded(self._prompts.encode(caption), self._options.dtype, f"caption {caption!r}")

    def _encode_images(self, workers: int | None, progress: bool, part: tuple[int, int]) -> None:
        store = self._latent_store
        assert store is not None
        flips = (False, True) if self._options.random_flip else (False,)
        # Rows that have something missing, with what: equal images in equal places are encoded once.
        missing: dict[int, list[tuple[str, Sample, int, bool]]] = {}
        found: set[str] = set()
        for sample in self.samples:
            for member in range(len(sample.images)):
                for flip in flips:
                    key = self._latent_key(sample, member, flip)
                    if key not in found and _mine(key, part) and key not in store:
                        missing.setdefault(sample.row, []).append((key, sample, member, flip))
                    found.add(key)
        total = sum(len(entries) for entries in missing.values())

        def load(job: tuple[str, Sample, int, bool, object]) -> Tensor:
            _, sample, member, flip, contents = job
            return pixels(self._decode(sample, member, contents), sample.placement, flip=flip)

        with progress_bar("encoding images", total, enabled=progress and bool(total)) as advance:
            for (key, sample, *_), loaded in prefetch(self._jobs(missing), load, ahead=8, workers=workers):
                if isinstance(loaded, UnreadableImageError):
                    raise loaded
                latent = self._latents.encode(loaded, key)
                store.write(key, {"latent": latent}, self._options.dtype, sample.name)
                advance()

    def _jobs(
        self, missing: dict[int, list[tuple[str, Sample, int, bool]]]
    ) -> Iterator[tuple[str, Sample, int, bool, object]]:
        """Missing latents with the contents of their files, in the order of the source, which may be huge."""
        if not missing:
            return
        left = len(missing)
        for row in self._source.rows(start=min(missing)):
            entries = missing.get(row.index)
            if entries is None:
                continue
            for key, sample, member, flip in entries:
                yield key, sample, member, flip, row.images[sample.columns[member]]
            left -= 1
            if not left:
                return

    def _decode(self, sample: Sample, member: int, contents: object) -> Tensor:
        expected = sample.images[member].sha256
        if isinstance(contents, bytes):
            content = FileContent(contents, len(contents), 0, hashlib.sha256(contents).hexdigest(), sample.name)
        else:
            assert isinstance(contents, Path), contents
            content = read_file(contents)
        if content.sha256 != expected:
            raise InputError(f"an image of {sample.name} has changed since it was checked; run the same command again")
        return read_image(content, max_pixels=self._options.max_pixels).pixels

    def _latent_key(self, sample: Sample, member: int, flip: bool) -> str:
        placement = sample.placement
        return content_key(
            recipe=_RECIPE,
            image=sample.images[member].sha256,
            resized=placement.resized,
            crop=placement.crop_top_left,
            target=placement.target,
            flip=flip,
            vae=self._latents.fingerprint,
            dtype=str(self._options.dtype),
        )

    def _prompt_key(self, caption: str | None) -> str:
        return content_key(
            recipe=_RECIPE, caption=caption, encoders=self._prompts.fingerprint, dtype=str(self._options.dtype)
        )


def _mine(key: str, part: tuple[int, int]) -> bool:
    return int(key[:8], 16) % part[1] == part[0]
