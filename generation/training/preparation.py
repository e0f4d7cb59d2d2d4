"""What denoising needs before the first step: rows checked, latents and embeddings encoded, encoders off the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmalign.errors import InputError

from ..data import CheckedData, NothingUsableError, Problem, RowSource, check_data, open_source
from ..data.memory import write_json_lines
from ..data.rows import fingerprint_examples, likely_column
from .configuration import RunConfig, TrainingConfig
from .encoding import LatentEncoder, PromptEncoder
from .training_set import EncodedSet, SampleOptions, samples_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline

    from ..rewards.reward import AnyReward

__all__ = ["Encoders", "check", "encode", "filter_of"]


@dataclass
class Encoders:
    """A pipeline with its frozen encoders."""

    pipeline: DiffusionPipeline
    latents: LatentEncoder
    prompts: PromptEncoder

    def release(self) -> None:
        """Leave the accelerator."""
        self.latents.release()
        self.prompts.release()


def check(
    config: TrainingConfig,
    accelerator: Accelerator,
    data: str,
    unit: str,
    *,
    report: Path,
    warn: Callable[[str], None],
    split: str | None = None,
    reward: AnyReward | None = None,
    min_score: float | None = None,
    min_margin: float | None = None,
    scored: bool = False,
) -> CheckedData:
    """All rows; those that cannot be used are listed in `report` and told to `warn`, or refused.

    Args:
        config: says what to do with such rows, and how large images may be.
        accelerator: whose main process does the work.
        data: see `open_source`.
        unit: what a sample is: "pairs", "winners" or "images".
        report: a file, a line of JSON for each row that is left out.
        warn: called by the main process with one line.
        split: see `open_source`.
        reward: see `check_data`, as the next two.
        min_score: leave out rows whose winner scores less.
        min_margin: leave out pairs whose winner scores less than this above the loser.
        scored: leave out single images without a reward, as "missing_reward".

    Raises:
        InputError: the data cannot be read or are not what the method trains on, or rows are left out and
            `config.bad_rows` refuses that.
    """
    source = open_source(data, split=split)
    if unit == "pairs" and source.kind == "images":
        raise InputError(_no_pairs(config, source))
    with accelerator.main_process_first(), _pairs_wanted(config, source):  # the others read what the first one found
        checked = check_data(
            source,
            kind="pairs" if unit == "pairs" else "auto",
            max_pixels=config.max_pixels,
            workers=config.workers,
            progress=config.progress and accelerator.is_main_process,
            memory=cache_folder(config) / "checks",
            reward=reward,
            min_score=min_score,
            min_margin=min_margin,
        )
    if scored and checked.options.kind == "images":
        checked = _with_rewards(checked)
    if accelerator.is_main_process:
        _report(checked, report, warn)
    left_out = "1 row" if checked.left_out == 1 else f"{checked.left_out:,} rows"
    if checked.left_out and config.bad_rows == "refuse":
        raise InputError(
            f"{left_out} of {checked.source.name!r} cannot be used (listed in {str(report)!r}); "
            "mend them, or set bad_rows to skip (--bad-rows skip)"
        )
    return checked


def encode(
    config: TrainingConfig, accelerator: Accelerator, checked: CheckedData, unit: str, encoders: Encoders, *, seed: int
) -> EncodedSet:
    """The checked rows as samples; with a cache, all of them encoded, the work shared by all processes."""
    samples = samples_of(checked.examples, config.resolution, unit=unit, buckets=config.aspect_buckets)
    if config.dry_run:
        samples = samples[:16]
    options = SampleOptions(
        seed=seed,
        num_train_timesteps=encoders.pipeline.scheduler.config.num_train_timesteps,
        random_flip=config.random_flip,
        caption_dropout=config.caption_dropout,
        dtype=getattr(torch, config.cache_dtype),
        max_pixels=config.max_pixels,
    )
    store = cache_folder(config) if config.cache else None
    data = EncodedSet(checked, samples, options, encoders.latents, encoders.prompts, store, config.batch_size)
    data.encode_all(
        workers=config.workers,
        progress=config.progress and accelerator.is_main_process,
        part=(accelerator.process_index, accelerator.num_processes),
    )
    accelerator.wait_for_everyone()
    return data


def filter_of(config: TrainingConfig, given: AnyReward | None) -> AnyReward | None:
    """What `min_score` and `min_margin` refer to: a reward of one's own, or the cosine of `config.filter_encoder`."""
    if given is not None and config.filter_encoder is not None:
        raise InputError("give either filter_encoder or a reward of your own, not both")
    if config.filter_encoder is None:
        return given
    from mmalign import load_encoder

    from ..rewards import CosineReward

    return CosineReward(load_encoder(config.filter_encoder, device=config.device))


def cache_folder(config: RunConfig) -> Path:
    """Shared by all runs beside this one, unless set."""
    return config.cache_dir if config.cache_dir is not None else config.output.parent / "cache"


def _no_pairs(config: TrainingConfig, source: RowSource) -> str:
    return (
        f"{source.name!r} holds captioned images, and {config.method or 'this method'} trains on pairs; give pairs, "
        "or use another method: `mmalign train sft` takes captioned images"
    )


@contextmanager
def _pairs_wanted(config: TrainingConfig, source: RowSource) -> Iterator[None]:
    try:
        yield
    except NothingUsableError as error:
        if set(error.checked.reasons(fatal=True)) == {"not_a_pair"}:
            raise InputError(_no_pairs(config, source)) from None
        raise


def _with_rewards(checked: CheckedData) -> CheckedData:
    """Without single images that have no reward; refused where that leaves none."""
    kept = [example for example in checked.examples if example.rewards]
    if not kept:
        columns = checked.source.columns
        likely = likely_column("reward", columns)
        asked = f"rename {likely!r}" if likely else f"add it to {', '.join(columns[:20])}" if columns else "add it"
        raise InputError(
            f"no image of {checked.source.name!r} has a reward, which this method weights it by; "
            f"give a column 'reward' of numbers in [0, 1] ({asked})"
        )
    message = "has no reward; give each image one in [0, 1]"
    lacking = [
        Problem(example.row, example.name, "missing_reward", message, fatal=True)
        for example in checked.examples
        if not example.rewards
    ]
    problems = sorted([*checked.problems, *lacking], key=lambda problem: (problem.row, not problem.fatal))
    return replace(checked, examples=kept, problems=problems, fingerprint=fingerprint_examples(kept))


def _report(checked: CheckedData, path: Path, warn: Callable[[str], None]) -> None:
    left_out = [problem for problem in checked.problems if problem.fatal]
    write_json_lines(path, map(asdict, left_out))
    for problem in left_out[:10]:
        warn(f"left out ({problem.reason}): {problem.name}: {problem.message}")
    if len(left_out) > 10:
        warn(f"... and {len(left_out) - 10:,} more are left out, all in {path}")
