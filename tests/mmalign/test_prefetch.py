"""Loading ahead: in order, bounded, in parallel, and no thread outlives it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from mmalign.errors import UnreadableImageError
from mmalign.prefetch import prefetch


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    yield
    assert not loading_threads()


def loading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mmalign-prefetch")]


@pytest.mark.parametrize("ahead", [1, 3, 10])
def test_look_ahead_is_bounded(ahead: int) -> None:
    pulled = 0
    loaded: list[int] = []

    def endless() -> Iterator[int]:
        nonlocal pulled
        while True:
            pulled += 1
            yield pulled - 1

    def load(source: int) -> int:
        loaded.append(source)
        return -source

    results = prefetch(endless(), load, ahead=ahead, workers=2)
    for received in range(40):
        assert next(results) == (received, -received)
        time.sleep(0.001)
        assert pulled - received <= ahead
        assert len(loaded) - received <= ahead
        assert received + ahead == pulled  # and it does look ahead
    results.close()


def test_loading_runs_in_parallel() -> None:
    together = threading.Barrier(3, timeout=20)

    def load(source: int) -> int:
        together.wait()
        return -source

    assert [source for source, _ in prefetch(range(9), load, ahead=3, workers=3)] == list(range(9))


def test_errors_keep_their_place() -> None:
    def load(source: int) -> int:
        time.sleep(0.01 * (source % 3))
        if source % 3 == 0:
            raise UnreadableImageError("corrupt", f"number {source}")
        return -source

    results = list(prefetch(range(12), load, ahead=5, workers=4))
    assert [source for source, _ in results] == list(range(12))
    for source, result in results:
        if source % 3 == 0:
            assert isinstance(result, UnreadableImageError)
            assert str(result) == f"number {source}"
        else:
            assert result == -source


def test_none_is_a_source_like_any_other() -> None:
    assert [source for source, _ in prefetch([1, None, 2], lambda s: s, ahead=2)] == [1, None, 2]


@pytest.mark.parametrize("stop", ["close", "abandon"])
def test_closing_early_stops_the_threads(stop: str) -> None:
    started: list[int] = []

    def load(source: int) -> int:
        started.append(source)
        time.sleep(0.02)
        return -source

    results = prefetch(range(10_000), load, ahead=50, workers=2)
    next(results)
    assert loading_threads()
    if stop == "close":
        results.close()  # type: ignore[attr-defined]
    else:
        del results
    assert not loading_threads()
    assert len(started) < 10


def test_other_errors_are_raised() -> None:
    def load(source: int) -> int:
        if source == 3:
            raise ZeroDivisionError
        return -source

    received = []
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - what came before it counts
        for source, _ in prefetch(range(100), load, ahead=8):
            received.append(source)
    assert received == [0, 1, 2]

    def sources() -> Iterator[int]:
        yield 0
        raise LookupError

    with pytest.raises(LookupError):
        list(prefetch(sources(), abs, ahead=2))
