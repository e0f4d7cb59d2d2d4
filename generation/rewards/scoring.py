"""Scores of image files, each with its prompt, as a table: what `mmalign score` shows."""

from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mmalign.checks import at_least
from mmalign.errors import InputError, UnreadableImageError
from mmalign.files import whole_file
from mmalign.imaging import read_image
from mmalign.prefetch import default_workers, prefetch
from mmalign.progress import progress_bar

from ..images import read_settings
from .reward import AnyReward, Reward, as_reward

__all__ = ["FORMATS", "ScoreTable", "ScoredImage", "score_files"]

FORMATS = (".csv", ".jsonl", ".parquet")

_BATCH_IMAGES = 16
_BATCH_PIXELS = 64_000_000


@dataclass(frozen=True)
class ScoredImage:
    """A file, its prompt ("" where no reward looks at one) and what each reward gave it, by name."""

    path: Path
    prompt: str
    scores: dict[str, float]


@dataclass(frozen=True)
class ScoreTable:
    """Scored files.

    Attributes:
        rewards: names of the columns.
        images: by the first column, the best first; NaN is last.
        left_out: path, reason and message of what could not be scored: a reason of `mmalign.imaging.REASONS`, or
            "no_prompt".
    """

    rewards: list[str]
    images: list[ScoredImage]
    left_out: list[tuple[Path, str, str]] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        """Of each column, NaN left out."""
        found = {name: [row.scores[name] for row in self.images] for name in self.rewards}
        real = {name: [score for score in scores if not math.isnan(score)] for name, scores in found.items()}
        return {name: sum(scores) / len(scores) if scores else math.nan for name, scores in real.items()}

    def rows(self) -> Iterator[dict[str, Any]]:
        """For JSON: rank, path, prompt, and scores by name with `None` for what is no finite number."""
        for rank, row in enumerate(self.images, 1):
            scores = {name: score if math.isfinite(score) else None for name, score in row.scores.items()}
            yield {"rank": rank, "path": os.fspath(row.path), "prompt": row.prompt, "scores": scores}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write all rows as .csv, .jsonl or .parquet; in tables a column a reward, beside rank, path and prompt.

        Bytes of a path that are no UTF-8 become backslash escapes.

        Raises:
            InputError: another suffix, or the file cannot be written.
        """
        target = Path(path)
        refuse_suffix(target)
        flat = [
            {**row, "path": os.fsencode(row["path"]).decode(errors="backslashreplace")} | row["scores"]
            for row in self.rows()
        ]
        columns = ["rank", *self.rewards, "path", "prompt"]
        with whole_file(target) as fresh:
            if target.suffix.lower() == ".jsonl":
                fresh.write_text("".join(f"{json.dumps(row)}\n" for row in self.rows()), encoding="utf-8")
            elif target.suffix.lower() == ".csv":
                with fresh.open("w", encoding="utf-8", newline="") as file:
                    writer = csv.DictWriter(file, columns, extrasaction="ignore")
                    writer.writeheader()
                    writer.writerows(flat)
            else:
                import pyarrow as pa
                import pyarrow.parquet as pq

                types = {"rank": pa.int64(), "path": pa.string(), "prompt": pa.string()}
                schema = pa.schema([(name, types.get(name, pa.float32())) for name in columns])
                pq.write_table(pa.Table.from_pylist(flat, schema), fresh)
        return target

    def draw(self, path: str | os.PathLike[str], count: int = 24) -> Path:
        """Draw the best into one picture, with their scores and prompts.

        Raises:
            InputError: nothing was scored, `count` is below 1, or the picture cannot be written.
        """
        from mmalign.imaging.contact_sheet import draw_contact_sheet

        at_least("count", count)
        if not self.images:
            raise InputError("there are no scored images to draw")
        heading = f"best of {len(self.images):,} by {self.rewards[0]}"
        pictures = [
            (row.path, [*(f"{name} {row.scores[name]:.4g}" for name in self.rewards), row.prompt])
            for row in self.images[:count]
        ]
        return draw_contact_sheet([(heading, pictures)], path)


def score_files(
    files: Sequence[str | os.PathLike[str]],
    rewards: Mapping[str, AnyReward],
    prompts: str | Sequence[str | None] | None = None,
    *,
    workers: int | None = None,
    progress: bool = False,
) -> ScoreTable:
    """Score image files by several rewards; each file is read once, and one that cannot be is left out by name.

    Args:
        files: any images that `mmalign.imaging.read_image` reads.
        rewards: by column.
        prompts: one for all, or one each. Where it is `None`, that which an image drawn by mmalign carries; an image
            without is left out, unless no reward looks at prompts.
        workers: decoding threads; one a core by default.
        progress: show a bar.

    Raises:
        InputError: no reward, another number of prompts than of files, or a reward gave no number for each image.
    """
    if not rewards:
        raise InputError("there is no reward to score by; give {name: reward}")
    if isinstance(prompts, str) or prompts is None:
        prompts = [prompts] * len(files)
    if len(prompts) != len(files):
        raise InputError(f"{len(prompts)} prompts for {len(files)} files; give one each, or one for all")
    at_least("workers", workers)
    columns = {name: as_reward(reward) for name, reward in rewards.items()}
    asked = any(reward.uses_text for reward in columns.values())
    tasks = [(Path(file), prompt if asked else "") for file, prompt in zip(files, prompts, strict=True)]
    images: list[ScoredImage] = []
    left_out: list[tuple[Path, str, str]] = []
    with progress_bar("scoring", len(tasks), enabled=progress, left_out=0) as advance:
        for batch, problems in _batches(tasks, workers):
            images += _scored(batch, columns)
            left_out += problems
            advance(len(batch) + len(problems), left_out=len(left_out))
    first = next(iter(columns))
    images.sort(key=lambda row: (math.isnan(row.scores[first]), -row.scores[first]))
    return ScoreTable([*columns], images, left_out)


def refuse_suffix(path: Path) -> None:
    """Raise InputError unless a table can be written under this name."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"table {str(path)!r} ends in {path.suffix or 'nothing'}; give a name in {', '.join(FORMATS)}")


def column_names(rewards: Sequence[tuple[str, Reward]]) -> dict[str, Reward]:
    """Rewards by name; by spec where two have one name, or a column of the table has it."""
    count = Counter(["rank", "path", "prompt", *(reward.name for _, reward in rewards)])
    return {reward.name if count[reward.name] == 1 else spec: reward for spec, reward in rewards}


_Loaded = tuple[Path, str, Tensor]


def _load(task: tuple[Path, str | None]) -> _Loaded | None:
    """Path, prompt and pixels; `None` for a readable image without prompt."""
    path, prompt = task
    if prompt is None and path.suffix.lower() == ".png":
        prompt = _carried(path)
    if prompt is None and path.suffix.lower() != ".png" and path.is_file():
        return None  # not worth decoding
    pixels = read_image(path).pixels
    return None if prompt is None else (path, prompt, pixels.float() / 255)


def _carried(path: Path) -> str | None:
    try:
        found = read_settings(path).get("prompt")
    except (InputError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def _batches(
    tasks: Sequence[tuple[Path, str | None]], workers: int | None
) -> Iterator[tuple[list[_Loaded], list[tuple[Path, str, str]]]]:
    """What was read, in batches bounded by images and by pixels, and what was not."""
    batch: list[_Loaded] = []
    problems: list[tuple[Path, str, str]] = []
    for (path, _), loaded in prefetch(tasks, _load, ahead=2 * (workers or default_workers()), workers=workers):
        if isinstance(loaded, UnreadableImageError):
            problems.append((path, loaded.reason, str(loaded)))
        elif loaded is None:
            problems.append(
                (path, "no_prompt", f"{str(path)!r} has no prompt, nor carries one as images of mmalign do")
            )
        else:
            batch.append(loaded)
        pixels = sum(image.shape[1] * image.shape[2] for _, _, image in batch)
        if len(batch) >= _BATCH_IMAGES or pixels >= _BATCH_PIXELS or len(problems) >= 16 * _BATCH_IMAGES:
            yield batch, problems
            batch, problems = [], []
    if batch or problems:
        yield batch, problems


def _scored(batch: Sequence[_Loaded], rewards: Mapping[str, Reward]) -> list[ScoredImage]:
    if not batch:
        return []
    prompts = [prompt for _, prompt, _ in batch]
    columns = {name: reward([image for *_, image in batch], prompts).tolist() for name, reward in rewards.items()}
    return [
        ScoredImage(path, prompt, {name: scores[row] for name, scores in columns.items()})
        for row, (path, prompt, _) in enumerate(batch)
    ]
