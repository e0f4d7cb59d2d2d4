"""The one progress bar: rich, on standard error, silent unless asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Advance", "progress_bar"]

Advance = Callable[..., None]


@contextmanager
def progress_bar(
    description: str,
    total: int | None = None,
    *,
    unit: str = "images",
    initial: int = 0,
    enabled: bool = True,
    **fields: Any,
) -> Iterator[Advance]:
    """Yield `advance(n=1, **fields)`; shows count, rate, time left and the latest value of each field.

    Args:
        description: what is being done, e.g. "indexing".
        total: how many units make the whole; `None` shows count and rate only.
        unit: what is counted, plural.
        initial: units that are done already.
        enabled: `False` gives a callable that does nothing.
        fields: further named counters shown at the end of the line, e.g. `skipped=0`.
    """
    if not enabled:
        yield lambda n=1, **_: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.1f} {unit}/s" if speed else f"- {unit}/s")

    def whole() -> Column:
        return Column(no_wrap=True)  # in a narrow terminal the bar gives way, not the numbers

    columns: list[Any] = [
        TextColumn("{task.description}", table_column=whole()),
        BarColumn(bar_width=None, table_column=Column(min_width=4, max_width=40, ratio=1)),
        MofNCompleteColumn(table_column=whole()),
        RateColumn(table_column=whole()),
        TimeRemainingColumn(table_column=whole()),
    ]
    columns += [TextColumn(f"{name} {{task.fields[{name}]}}", table_column=whole()) for name in fields]
    with Progress(*columns, console=Console(file=sys.stderr), speed_estimate_period=60) as bar:
        task = bar.add_task(description, total=total, completed=initial, **fields)
        yield lambda n=1, **updates: bar.update(task, advance=n, **updates)
