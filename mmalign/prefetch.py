"""Load ahead in threads, keep the order: what feeds everything that works through files."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from .errors import UnreadableImageError

__all__ = ["default_workers", "prefetch"]

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def default_workers() -> int:
    """Loading threads: the cores this process may use. Pillow and torchvision release the GIL."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prefetch(
    items: Iterable[Item], load: Callable[[Item], Loaded], *, ahead: int, workers: int | None = None
) -> Iterator[tuple[Item, Loaded | UnreadableImageError]]:
    """Yield each item with what `load` made of it, in order.

    Args:
        items: may be endless.
        load: runs in a thread. An `UnreadableImageError` of it is yielded in its place; any other is raised there.
        ahead: so many items at most are loaded and waiting.
        workers: threads; one a core by default.
    """
    pool = ThreadPoolExecutor(workers or default_workers(), thread_name_prefix="mmalign-prefetch")
    waiting: deque[tuple[Item, Future[Loaded]]] = deque()
    iterator = iter(items)
    try:
        while True:
            for item in islice(iterator, max(ahead, 1) - len(waiting)):
                waiting.append((item, pool.submit(load, item)))
            if not waiting:
                return
            item, future = waiting.popleft()
            loaded: Loaded | UnreadableImageError
            try:
                loaded = future.result()
            except UnreadableImageError as error:
                loaded = error
            yield item, loaded
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
