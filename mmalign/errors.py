"""Errors that a person can act on.

Every error the library raises on purpose derives from `MMAlignError`; its message names the offending value
and what to do. The command line prints that message alone; a traceback means a bug of ours.
"""

from __future__ import annotations

__all__ = [
    "EncoderMismatchError",
    "EncoderUnavailableError",
    "IndexDamagedError",
    "IndexLockedError",
    "InputError",
    "MMAlignError",
    "ModelUnavailableError",
    "UnreadableImageError",
]


class MMAlignError(Exception):
    """Base of the library's errors. The message says what was wrong and what to do about it."""


class InputError(MMAlignError, ValueError):
    """An argument, option or data row cannot be used as given."""


class EncoderUnavailableError(MMAlignError):
    """The encoder is known but its weights or its package are not to be had on this machine."""


class ModelUnavailableError(MMAlignError):
    """A generator or an adapter is named well, but it is not on this machine and cannot be fetched."""


class EncoderMismatchError(MMAlignError):
    """Vectors of two different encoders were about to be compared."""


class IndexDamagedError(MMAlignError):
    """A file of an index folder is missing, truncated, altered, or of a newer format."""


class IndexLockedError(MMAlignError):
    """Another process is writing to the index."""


class UnreadableImageError(MMAlignError):
    """An image cannot be read as intended. `reason` is one of `mmalign.imaging.REASONS`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
