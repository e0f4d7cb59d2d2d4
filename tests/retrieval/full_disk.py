"""A disk that fills up at a chosen moment, and the errors that it leads to."""

from __future__ import annotations

import errno
import io
import os
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mmalign.errors import InputError


class Disk:
    """Fills up at the n-th write, sync or renaming of a file of the index, and stays full."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
        self.folder, self.steps, self.hit = folder, steps, False
        real_open, real_fsync, real_replace = pathlib.Path.open, os.fsync, os.replace
        disk = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                disk.step()
                return super().write(data)

        def opened(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if mode == "wb" and path.parent == folder:
                return io.BufferedWriter(Raw(path, "wb"), 4096)
            return real_open(path, mode, *rest, **named)

        def fsync(descriptor: int) -> None:
            self.step()
            real_fsync(descriptor)

        def replace(source: Any, target: Any) -> None:
            self.step()
            real_replace(source, target)

        monkeypatch.setattr(pathlib.Path, "open", opened)
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            self.hit = True
            raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def explained(disk: Disk) -> Iterator[None]:
    """What is done in here fails with advice if, and only if, the disk is full."""
    failed = ""
    try:
        yield
    except InputError as error:
        failed = str(error)
    assert disk.hit == ("free some space" in failed)
