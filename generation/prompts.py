"""Prompts in files: a line each, or JSON lines."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mmalign.errors import InputError, reason_of

__all__ = ["read_prompts"]


def read_prompts(file: str | os.PathLike[str]) -> list[str]:
    """The prompts of a text file, one a line; of a .jsonl file each line's `prompt`, `caption`, or first of `captions`.

    Empty lines are left out, and so is what a prompt begins or ends with in white space.

    Raises:
        InputError: the file cannot be read, is no UTF-8, or a line of JSON holds no prompt; the line is named.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"prompts file {path} cannot be read ({reason}); give a text file, a prompt a line") from None
    # splitlines() would also cut at U+2028 and its like, which may stand within a line of JSON
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return [_prompt_of(line, f"{path}, line {number}") for number, line in lines if line]
    return [line for _, line in lines if line]


def _prompt_of(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place} is not JSON ({reason_of(error)}); mend it, or give a plain text file") from None
    prompt = None
    if isinstance(row, dict):
        captions = row.get("captions") or [None]
        prompt = row.get("prompt") or row.get("caption") or (captions[0] if isinstance(captions, list) else captions)
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{place} has no text under 'prompt' or 'caption'; add it, or delete the line")
    return prompt.strip()
