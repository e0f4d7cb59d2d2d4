"""Commands for error messages and notes, ready to be pasted."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection
from pathlib import Path

from .roots import resolve_roots
from .storage import DEFAULT_FOLDER, Manifest

__all__ = ["index_commands"]


def index_commands(manifest: Manifest, folder: Path, numbers: Collection[int] | None = None) -> str:
    """What makes an index again, or brings it up to date: one command a folder, or for the folders of some numbers."""
    spec = manifest["encoder"]["spec"]
    commands = []
    for number, root in enumerate(resolve_roots(manifest["roots"], folder) or [Path("FOLDER")]):
        if numbers is None or number in numbers:
            command = ["mmalign", "index", os.fspath(root)]
            if root.resolve() / DEFAULT_FOLDER != folder.resolve():
                command += ["--out", os.fspath(folder)]
            command += ["--encoder", spec] if spec else []
            commands.append(f"`{shlex.join(command)}`")
    return " and ".join(commands)
