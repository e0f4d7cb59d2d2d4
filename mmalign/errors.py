"""Errors that a person can act on.

Every error the library raises on purpose derives from `MMAlignError`; its message names the offending value
and what to do. The command line prints that message alone; a traceback means a bug of ours.
"""

from __future__ import annotations

__all__ = [
    "DamagedError",
    "EncoderMismatchError",
    "EncoderUnavailableError",
    "IndexDamagedError",
    "IndexLockedError",
    "InputError",
    "LockedError",
    "MMAlignError",
    "ModelUnavailableError",
    "NonFiniteLossError",
    "UnreadableImageError",
    "reason_of",
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


class DamagedError(MMAlignError):
    """What the library wrote before, or a package brought, is not what it was: missing, truncated or altered."""


class IndexDamagedError(DamagedError):
    """A file of an index folder is missing, truncated, altered, or of a newer format."""


class LockedError(MMAlignError):
    """Another process is writing there."""


class IndexLockedError(LockedError):
    """Another process is writing to the index."""


class NonFiniteLossError(MMAlignError):
    """Training was stopped because the loss or the gradient is no longer a number; the weights were not updated."""


class UnreadableImageError(MMAlignError):
    """An image cannot be read as intended. `reason` is one of `mmalign.imaging.REASONS`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def reason_of(error: BaseException, limit: int = 160) -> str:
    """The text of another library's exception, fit for a message of ours: one line, printable, cut at `limit`."""
    text = getattr(error, "strerror", None) if isinstance(error, OSError) else None
    line = " ".join(str(text or error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line[:limit])
