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
    """A progress bar with its rate in units, or in tokens once `tokens` is called."""

    def __init__(self, progress: Progress, title: str, total: int, unit: str) -> None:
        self._progress = progress
        self._unit = unit
        self._task = progress.add_task(title, total=total or None, note="")
        self._began = time.monotonic()
        self._tokens = 0
        self._done = 0
        self._first: int | None = None
        self._note = ""

    def advance(self, count: int) -> None:
        """Add `count` finished units."""
        self._done += count
        self._progress.update(self._task, advance=count)
        self._show()

    def set(self, done: int, total: int) -> None:
        """Set the finished and total units; those of the first call do not count for the rate."""
        if self._first is None:
            self._first, self._began = done, time.monotonic()
        self._done = done - self._first
        self._progress.update(self._task, completed=done, total=total)
        self._show()

    def tokens(self, count: int) -> None:
        """Add `count` drawn tokens."""
        self._tokens += count
        self._show()

    def note(self, text: str) -> None:
        """Show `text` after the bar and its rate."""
        self._note = text
        self._show()

    def _show(self) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        count, unit = (self._tokens, "tokens") if self._tokens else (self._done, self._unit)
        rate = f"{count / seconds:,.{0 if count > 20 * seconds else 1}f} {unit}/s" if count else ""
        self._progress.update(self._task, note=", ".join(filter(None, [rate, self._note])))


@contextmanager
def progress_bar(title: str, total: int, unit: str) -> Iterator[Bar]:
    """Yield a bar of `total` units (0: not known yet); silent when there is nothing to do."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        refresh_per_second=4,
    ) as progress:
        yield Bar(progress, title, total, unit)
