"""Checks of arguments, each with one wording: the name, the value, what to give instead."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex

from .errors import InputError

__all__ = ["at_least", "in_range", "one_of", "visible_text"]


def at_least(name: str, value: SupportsIndex | None, minimum: int = 1) -> None:
    """A whole number from `minimum` on, or `None`.

    Raises:
        InputError: it is neither.
    """
    if value is None:
        return
    try:
        whole = operator.index(value)
    except TypeError:
        raise InputError(f"{name} is {value!r}; give a whole number, {minimum} or more") from None
    if whole < minimum:
        raise InputError(f"{name} is {value}; give {minimum} or more")


def in_range(name: str, value: float | None, low: float = -math.inf, high: float = math.inf) -> None:
    """A finite number in [low, high], or `None`.

    Raises:
        InputError: it is neither.
    """
    if value is None:
        return
    if isinstance(value, str) or not math.isfinite(value):
        raise InputError(f"{name} is {value!r}; give a finite number")
    if not low <= value <= high:
        wanted = f"{low:g} or more" if high == math.inf else f"a number in [{low:g}, {high:g}]"
        raise InputError(f"{name} is {value:g}; give {wanted}")


def one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """One of the names.

    Raises:
        InputError: another.
    """
    known = list(choices)
    if value not in known:
        raise InputError(f"{name} is {value!r}; give one of {', '.join(known)}")


def visible_text(name: str, value: Any) -> None:
    """A string that says something, and that a tokenizer can read.

    Raises:
        InputError: it is no string, is blank, or has lone surrogates, as Python makes them of bytes that are no UTF-8.
    """
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{name} is {value!r}; give a string with at least one visible character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} is {value!r}, which is not valid Unicode; give it as UTF-8") from None
