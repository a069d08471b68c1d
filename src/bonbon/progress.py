"""Progress bars with throughput and remaining time, on standard error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bar:
    """One bar; `tokens` adds to a token count that is shown as tokens a second."""

    def __init__(self, progress: Progress, title: str, total: int, unit: str) -> None:
        self._progress = progress
        self._unit = unit
        self._task = progress.add_task(title, total=total or None, note="", unit=unit)
        self._began = time.monotonic()
        self._tokens = 0

    def advance(self, count: int) -> None:
        """`count` more units are done."""
        self._progress.update(self._task, advance=count)

    def set(self, done: int, total: int) -> None:
        """`done` of `total` units are done."""
        self._progress.update(self._task, completed=done, total=total)

    def tokens(self, count: int) -> None:
        """`count` more tokens were drawn."""
        self._tokens += count
        rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
        self.note(f"{rate:,.0f} tokens/s")

    def note(self, text: str) -> None:
        """Show `text` behind the bar."""
        self._progress.update(self._task, note=text)


@contextmanager
def progress_bar(title: str, total: int, unit: str) -> Iterator[Bar]:
    """A bar of `total` units (0: not known yet); silent when there is nothing to do."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        refresh_per_second=4,
    ) as progress:
        yield Bar(progress, title, total, unit)
