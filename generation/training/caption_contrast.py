"""Batches in which every image meets every caption, and pairs that are held out to be looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmalign.errors import InputError

from ..data import CheckedData
from ..data.rows import fingerprint_examples
from .denoiser import Batch, Conditioning
from .randomness import stream
from .training_set import EncodedSet

__all__ = ["ContrastBatch", "ContrastSet", "fitting", "grid_of", "hold_out", "joined"]


@dataclass(frozen=True)
class ContrastBatch:
    """Images of one noise and one timestep, and the captions to denoise each of them under.

    Attributes:
        images: with their own captions.
        captions: of all images of the whole batch, and more after them.
        own: which of `captions` is each image's.
        equal: other captions that fit an image as well: the same text, or another text of the same image.
    """

    images: Batch
    captions: Conditioning
    own: Int[Tensor, " b"]
    equal: Bool[Tensor, "b p"]

    @classmethod
    def of(cls, images: Batch, others: Sequence[Batch] = ()) -> ContrastBatch:
        """All of a batch, its first noise and timestep for all; with further captions of `others`."""
        everything = (images, *others)
        captions = joined([batch.conditioning for batch in everything])
        own = torch.arange(len(images.latents))
        equal = fitting(everything)[: len(own)]
        one = replace(
            images,
            noise=images.noise[:1].expand_as(images.noise),
            timesteps=images.timesteps[:1].expand_as(images.timesteps),
        )
        return cls(one, captions, own, equal)

    def parts(self, size: int) -> list[ContrastBatch]:
        """So many images at a time, each part with all captions."""
        places = torch.arange(len(self.own)).split(size)
        return [replace(self, images=_rows(self.images, at), own=self.own[at], equal=self.equal[at]) for at in places]

    def to(self, device: torch.device) -> ContrastBatch:
        """All of it on a device."""
        own, equal = self.own.to(device), self.equal.to(device)
        return ContrastBatch(self.images.to(device), self.captions.to(device), own, equal)

    def labels(self) -> dict[str, list[str]]:
        """What an error calls each image."""
        return self.images.labels()


class ContrastSet:
    """Captioned images in batches of one noise and timestep, and held-out pairs.

    Attributes:
        fingerprint: of both.
        threaded: see `EncodedSet`.
    """

    def __init__(self, pairs: EncodedSet, held_out: EncodedSet | None, *, bank: int, seed: int) -> None:
        """`bank`: captions of other pairs beside those of each batch, as many as there are."""
        self._pairs, self._held_out, self._bank, self._seed = pairs, held_out, bank, seed
        self.fingerprint = pairs.fingerprint + (held_out.fingerprint if held_out else "")
        self.threaded = pairs.threaded

    def batch(self, number: int) -> ContrastBatch:
        """The batch of this number in the run."""
        images, samples = self._pairs.batch(number), self._pairs.samples
        order = torch.randperm(len(samples), generator=stream(self._seed, "caption bank", number)).tolist()
        others = [index for index in order if samples[index].name not in images.names] if self._bank else []
        return ContrastBatch.of(images, [self._pairs.assemble([index], [0]) for index in others[: self._bank]])

    def probe(self, size: int) -> Iterator[Batch]:
        """The held-out pairs one by one, `size` at most."""
        held_out = self._held_out
        for index in range(0 if held_out is None else min(size, len(held_out.samples))):
            assert held_out is not None
            yield held_out.assemble([index], [-1 - index])


def hold_out(checked: CheckedData, count: int, seed: int) -> tuple[CheckedData, CheckedData | None]:
    """What is trained on, and `count` pairs whose captions and images differ from each other.

    Pairs that share a caption or an image with one held out are not trained on either.

    Raises:
        InputError: less than two pairs would be left to train on, or there are not as many to hold out.
    """
    examples = checked.examples
    chosen: list[int] = []
    captions: set[str] = set()
    images: set[str] = set()
    for place in torch.randperm(len(examples), generator=stream(seed, "held out")).tolist() if count else ():
        caption, image = examples[place].caption, examples[place].images[examples[place].winner].sha256
        if len(chosen) < count and caption not in captions and image not in images:
            chosen.append(place)
            captions.add(caption)
            images.add(image)
    kept = [one for one in examples if one.caption not in captions and one.images[one.winner].sha256 not in images]
    if len(chosen) < count or len(kept) < 2:
        raise InputError(
            f"{checked.source.name!r} has {len(examples)} usable pairs, too few to hold out {count} different ones "
            "and train on others; give more, or a smaller probe_size (--probe-size), 0 for none"
        )
    split = [replace(checked, examples=part, fingerprint=fingerprint_examples(part)) for part in
             (kept, [examples[place] for place in chosen])]  # fmt: skip
    return split[0], split[1] if chosen else None


def fitting(batches: Sequence[Batch]) -> Bool[Tensor, "n n"]:
    """Whether another's caption fits an image as well: the same text to the network, or another text of that image."""
    texts = [content for batch in batches for content in _contents(batch.conditioning.prompt_embeds)]
    images = [content for batch in batches for content in _contents(batch.latents)]
    places = range(len(texts))
    return torch.tensor([[i != j and (texts[i] == texts[j] or images[i] == images[j]) for j in places] for i in places])


def grid_of(images: Batch, captions: Conditioning) -> Batch:
    """Every image under every caption: all images under caption 0, then all under caption 1, ...

    Sizes that SDXL is told belong to the image, whatever the caption.
    """
    rows, columns = len(images.latents), len(captions.prompt_embeds)
    pooled, time_ids = captions.pooled_prompt_embeds, images.conditioning.time_ids
    conditioning = Conditioning(
        captions.prompt_embeds.repeat_interleave(rows, 0),
        None if pooled is None else pooled.repeat_interleave(rows, 0),
        None if time_ids is None else time_ids.repeat(columns, 1),
    )
    return Batch(
        names=images.names * columns,
        latents=images.latents.repeat(columns, 1, 1, 1),
        noise=images.noise.repeat(columns, 1, 1, 1),
        timesteps=images.timesteps.repeat(columns),
        conditioning=conditioning,
    )


def joined(parts: Sequence[Conditioning]) -> Conditioning:
    """One after the other."""
    pooled = [part.pooled_prompt_embeds for part in parts if part.pooled_prompt_embeds is not None]
    time_ids = [part.time_ids for part in parts if part.time_ids is not None]
    return Conditioning(
        torch.cat([part.prompt_embeds for part in parts]),
        torch.cat(pooled) if pooled else None,
        torch.cat(time_ids) if time_ids else None,
    )


def _rows(batch: Batch, places: Int[Tensor, " k"]) -> Batch:
    told = batch.conditioning
    pooled, time_ids = told.pooled_prompt_embeds, told.time_ids
    return Batch(
        names=[batch.names[place] for place in places.tolist()],
        latents=batch.latents[places],
        noise=batch.noise[places],
        timesteps=batch.timesteps[places],
        conditioning=Conditioning(
            told.prompt_embeds[places],
            None if pooled is None else pooled[places],
            None if time_ids is None else time_ids[places],
        ),
    )


def _contents(tensor: Tensor) -> list[bytes]:
    return [row.contiguous().numpy().tobytes() for row in tensor]
