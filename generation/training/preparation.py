"""Everything before the first step: rows checked, latents and embeddings encoded, encoders off the accelerator."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmalign.errors import InputError

from ..data import CheckedData, RowSource, check_data, open_source
from ..pipelines import load_pipeline, pipeline_family
from .configuration import TrainingConfig
from .encoding import LatentEncoder, PromptEncoder
from .training_set import EncodedSet, SampleOptions, samples_of
from .validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline

    from ..rewards.reward import AnyReward

__all__ = ["Encoders", "Prepared", "check", "encode", "prepare"]


@dataclass
class Encoders:
    """A pipeline with its frozen encoders."""

    pipeline: DiffusionPipeline
    family: str
    latents: LatentEncoder
    prompts: PromptEncoder

    def release(self) -> None:
        """Leave the accelerator."""
        self.latents.release()
        self.prompts.release()


@dataclass
class Prepared:
    """What the loop needs; `fingerprint` is what a checkpoint must match."""

    encoders: Encoders
    data: EncodedSet
    validation: Validation | None
    fingerprint: str
    left_out: int


def prepare(
    config: TrainingConfig,
    accelerator: Accelerator,
    pipeline: DiffusionPipeline | None,
    unit: str,
    reward: AnyReward | None,
) -> Prepared:
    """Check the rows first, as that is cheap and fails early; then load the model and encode what is missing."""
    checked = check(config, accelerator, config.data, unit, reward=reward)
    # float32 until the denoiser is cast: latents and embeddings are made once and should not carry bfloat16's error.
    pipeline = pipeline or load_pipeline(
        config.model, device="cpu", dtype="float32", vae=config.vae, variant=config.variant
    )
    family = pipeline_family(pipeline)
    if family not in ("sdxl", "sd15"):
        raise InputError(f"{config.model!r} is a {family} pipeline; this method trains UNets: SDXL and SD 1.5")
    device = accelerator.device
    encoders = Encoders(pipeline, family, LatentEncoder(pipeline.vae, device), PromptEncoder(pipeline, device))
    data = encode(config, accelerator, checked, unit, encoders)
    validation = None
    if config.validation_prompts:
        validation = Validation(pipeline, encoders.prompts, encoders.latents, config)
    if config.cache:
        encoders.release()
    return Prepared(encoders, data, validation, checked.fingerprint, checked.left_out)


def check(
    config: TrainingConfig,
    accelerator: Accelerator,
    data: str,
    unit: str,
    *,
    report: str = "left_out_rows.jsonl",
    reward: AnyReward | None = None,
) -> CheckedData:
    """All rows; those that cannot be used are listed in the run folder and on standard error, or refused."""
    source = open_source(data, split=config.split)
    with accelerator.main_process_first():  # the others read what the first one found
        checked = check_data(
            source,
            kind="pairs" if unit == "pairs" or _holds_pairs(source) else "images",
            max_pixels=config.max_pixels,
            workers=config.workers,
            progress=config.progress and accelerator.is_main_process,
            memory=cache_folder(config) / "checks",
            reward=_reward(config, reward),
            min_score=config.min_score,
            min_margin=config.min_margin,
        )
    if accelerator.is_main_process:
        _report(config, checked, config.output / report)
    return checked


def encode(
    config: TrainingConfig, accelerator: Accelerator, checked: CheckedData, unit: str, encoders: Encoders
) -> EncodedSet:
    """The checked rows as samples; with a cache, all of them encoded, the work shared by all processes."""
    samples = samples_of(checked.examples, config.resolution, unit=unit, buckets=config.aspect_buckets)
    if config.dry_run:
        samples = samples[:16]
    options = SampleOptions(
        seed=config.seed,
        num_train_timesteps=encoders.pipeline.scheduler.config.num_train_timesteps,
        random_flip=config.random_flip,
        caption_dropout=config.caption_dropout,
        dtype=getattr(torch, config.cache_dtype),
        max_pixels=config.max_pixels,
    )
    store = cache_folder(config) if config.cache else None
    data = EncodedSet(checked, samples, options, encoders.latents, encoders.prompts, store)
    data.encode_all(
        workers=config.workers,
        progress=config.progress and accelerator.is_main_process,
        part=(accelerator.process_index, accelerator.num_processes),
    )
    accelerator.wait_for_everyone()
    return data


def cache_folder(config: TrainingConfig) -> Path:
    """Shared by all runs beside this one, unless set."""
    return config.cache_dir if config.cache_dir is not None else config.output.parent / "cache"


def _reward(config: TrainingConfig, given: AnyReward | None) -> AnyReward | None:
    if given is not None and config.filter_encoder is not None:
        raise InputError("give either filter_encoder or a reward of your own, not both")
    if config.filter_encoder is None:
        return given
    from mmalign import load_encoder

    from ..rewards import CosineReward

    return CosineReward(load_encoder(config.filter_encoder, device=config.device))


def _holds_pairs(source: RowSource) -> bool:
    if source.images_per_row is not None:
        return source.images_per_row == 2
    return any(len(row.images) == 2 for row in itertools.islice(source.rows(), 100))


def _report(config: TrainingConfig, checked: CheckedData, path: Path) -> None:
    left_out = [problem for problem in checked.problems if problem.fatal]
    lines = [
        json.dumps({"row": p.row, "name": p.name, "reason": p.reason, "message": p.message}) + "\n" for p in left_out
    ]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)
    if not left_out:
        return
    for problem in left_out[:10]:
        print(f"  left out ({problem.reason}): {problem.name}: {problem.message}", file=sys.stderr)
    if len(left_out) > 10:
        print(f"  ... and {len(left_out) - 10:,} more, all in {path}", file=sys.stderr)
    if config.bad_rows == "refuse":
        rows = "1 row" if len(left_out) == 1 else f"{len(left_out):,} rows"
        raise InputError(
            f"{rows} of {checked.source.name!r} cannot be used (listed in {str(path)!r}); "
            "mend them, or set bad_rows to skip"
        )
