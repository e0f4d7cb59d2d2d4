"""A run's folder: settings, checkpoints that are there whole or not at all, and a log that a resumed run continues."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mmalign.errors import InputError, reason_of
from mmalign.files import whole_file
from mmalign.provenance import libraries, written_now

from .configuration import RunConfig, differences, read_yaml, write_config

__all__ = ["Checkpoint", "RunFolder"]

_CHECKPOINT = re.compile(r"step-(\d{6,})")
# How torch's own writer words a full disk: a C++ stream's error, or only where in its file it stopped.
_TORCH_CANNOT_WRITE = ("inline_container", "PytorchStreamWriter", "iostream error")


class Checkpoint:
    """One finished checkpoint folder."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def about(self) -> dict[str, Any]:
        """What the trainer wrote about itself."""
        with self.damage_told():
            about = json.loads((self.path / "trainer.json").read_text(encoding="utf-8"))
            known = {name: about[name] for name in ("step", "data", "weights", "processes", "first_look", "warned")}
            return {**known, "facts": about.get("facts", {})}

    @contextmanager
    def damage_told(self) -> Iterator[None]:
        """While the files of this checkpoint are read: what goes wrong is told as their damage."""
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
            # Others than RuntimeError itself are a GPU's: full, or failing.
            if isinstance(error, InputError) or (isinstance(error, RuntimeError) and type(error) is not RuntimeError):
                raise
            reason = f"{type(error).__name__}: {reason_of(error)}"
            raise InputError(
                f"checkpoint {str(self.path)!r} is damaged ({reason}); "
                "delete it and run the same command again, it goes on from the one before"
            ) from None


class RunFolder:
    """`config.yaml`, `run.json`, `metrics.jsonl`, `checkpoints/step-000500/`, `samples/`; one process group at a time.

    Attributes:
        path: the folder.
        metrics: the log, a line of JSON a step.
        curves: the picture of it.
        export: the folder of what training came to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"
        self.export = path / "export"

    def sample(self, step: int) -> Path:
        """The picture of the validation prompts after a step."""
        return self.path / "samples" / f"step-{step:06d}.png"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder.

        Raises:
            InputError: another process trains here, or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"another process is training in {str(self.path)!r}; choose another output") from None
        except OSError as error:
            raise InputError(
                f"{str(self.path)!r} cannot be written to ({reason_of(error)}); choose another output"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def open(self, config: RunConfig) -> Checkpoint | None:
        """Clear what an interrupted run left, and check that `config` continues what is here.

        A dry run begins afresh.

        Returns:
            The newest checkpoint, or `None` in a new folder.

        Raises:
            InputError: the folder's run has other settings; each is named.
        """
        if config.dry_run:
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
        for leftover in (self.path / "checkpoints").glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        checkpoints = self.checkpoints()
        echo = self.path / "config.yaml"
        if not checkpoints:
            return None
        if echo.is_file() and (changed := differences(config, read_yaml(echo))):
            raise InputError(
                f"{str(self.path)!r} holds a run with other settings ({'; '.join(changed)}); "
                "give those again to resume it, or choose another output"
            )
        return checkpoints[-1]

    def begin(self, config: RunConfig, step: int, **about: Any) -> None:
        """Echo the settings, write down what runs here, and forget what was logged after the step gone on from."""
        write_config(config, self.path / "config.yaml")
        versions = libraries("diffusers", "transformers", "peft", "accelerate")
        run = {"method": config.method, "seed": config.seed, **about, "libraries": versions, "written": written_now()}
        with whole_file(self.path / "run.json") as fresh:
            fresh.write_text(json.dumps(run, indent=1), encoding="utf-8")
        self._cut_metrics(step if step else -1)

    def checkpoints(self) -> list[Checkpoint]:
        """Finished ones, oldest first."""
        found = []
        for path in (self.path / "checkpoints").glob("step-*"):
            match = _CHECKPOINT.fullmatch(path.name)
            if match and (path / "trainer.json").is_file():
                found.append(Checkpoint(path, int(match[1])))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def unfinished(self, step: int) -> Path:
        """Where all processes write the checkpoint of a step before it gets its name."""
        return self.path / "checkpoints" / f".step-{step:06d}"

    @contextmanager
    def checkpoint(self, step: int, keep: int) -> Iterator[Path]:
        """Give a hidden folder to fill; then make it durable, name it, and only then drop all but the `keep` newest.

        Raises:
            InputError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        fresh = self.unfinished(step)
        root, target = fresh.parent, fresh.parent / f"step-{step:06d}"
        try:
            try:
                fresh.mkdir(parents=True)
                yield fresh
                _sync(fresh)
                if target.exists():
                    _remove(target)
                fresh.replace(target)
                _sync_path(root)  # the name must last before the checkpoint before it goes
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
        except (InputError, OSError, SafetensorError, RuntimeError) as error:
            full = isinstance(error, RuntimeError) and any(text in str(error) for text in _TORCH_CANNOT_WRITE)
            cause = error.__context__ if isinstance(error, InputError) else error
            if not full and not isinstance(cause, OSError | SafetensorError):
                raise
            reason = "the disk is full" if full else reason_of(cause or error)
            raise InputError(
                f"the checkpoint of step {step} could not be written to {str(root)!r} ({reason}); "
                "make room and run the same command again, it goes on from the one before"
            ) from None
        for old in self.checkpoints()[:-keep]:
            _remove(old.path)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`; raises InputError where that cannot be."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(
                f"{str(self.metrics)!r} cannot be written ({reason_of(error)}); "
                "mend that and run the same command again, it goes on from the newest checkpoint"
            ) from None

    def logged(self, key: str) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl` that have a value of this name, in order."""
        if not self.metrics.is_file():
            return []
        rows = map(json.loads, self.metrics.read_text(encoding="utf-8").splitlines())
        return [row for row in rows if key in row]

    def _cut_metrics(self, step: int) -> None:
        """Forget lines after the step that is resumed from: they will be written again."""
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # a line cut short by a kill
                continue
        with whole_file(self.metrics) as fresh:
            fresh.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _remove(checkpoint: Path) -> None:
    """Renamed first: a kill while files vanish must not leave half a checkpoint under a valid name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}-old")
    checkpoint.replace(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync_path(path)
    _sync_path(folder)


def _sync_path(path: Path) -> None:
    """Onto the disk: a file's content, or the names in a folder."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
