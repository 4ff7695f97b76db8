"""Progress of long work: a live bar with rate and ETA on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

PLAIN_INTERVAL_SEC = 10.0
"""Seconds between two plain lines when there is no terminal."""


def format_duration(seconds: float) -> str:
    """`75` as `1m15s`: short enough for a status line."""
    total = round(seconds)
    hours, rest = divmod(total, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    if minutes:
        return f"{minutes}m{secs:02d}s"
    return f"{secs}s"


class _RateColumn(ProgressColumn):
    """Average rate since the start, and the time left at that rate."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(_rate_and_eta(task.completed, task.total or 0, task.elapsed or 0.0, self._unit))


def _rate_and_eta(done: float, total: float, elapsed: float, unit: str) -> str:
    if done <= 0 or elapsed <= 0:
        return f"- {unit}/s"
    rate = done / elapsed
    left = format_duration((total - done) / rate)
    return f"{rate:.1f} {unit}/s, {left} left" if done < total else f"{rate:.1f} {unit}/s"


class _Bar(RichProgress):
    """A bar with something below it."""

    def __init__(
        self, *columns: ProgressColumn, details: Callable[[], RenderableType] | None, **options: Any
    ) -> None:
        self._details = details
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn some times a second."""
        yield from super().get_renderables()
        if self._details is not None:
            yield self._details()


class Progress:
    """Count `total` units of work; use as a context manager.

    `unit` names what is counted, in the plural (`clips`). `advance` takes an optional status that is shown behind
    the rate, for example what limits the run. `details` gives what a terminal shows below the bar instead of it.
    """

    def __init__(
        self,
        description: str,
        total: int,
        unit: str,
        *,
        console: Console | None = None,
        is_shown: bool = True,
        details: Callable[[], RenderableType] | None = None,
    ) -> None:
        self._details = details
        self._is_shown = is_shown
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._description, self._total, self._unit = description, total, unit
        self._done, self._status = 0, ""
        self._started = self._last_line = time.monotonic()
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        self._started = self._last_line = time.monotonic()
        if self._is_shown and self._console.is_terminal:
            self._bar = _Bar(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                _RateColumn(self._unit),
                TimeElapsedColumn(),
                TextColumn("{task.fields[status]}" if self._details is None else ""),
                console=self._console,
                details=self._details,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._description, total=self._total, status="")
        return self

    def advance(self, count: int = 1, status: str | None = None) -> None:
        """`count` more units are done."""
        self.set(self._done + count, status)

    def set(self, done: int, status: str | None = None) -> None:
        """`done` units are done now: fewer than before where work was lost."""
        self._done = done
        if status is not None:
            self._status = status
        if self._bar is not None:
            self._bar.update(self._task, completed=done, status=self._status)
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL_SEC:
            self._line()

    def _line(self) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._started
        text = f"{self._description}: {self._done}/{self._total} {self._unit}, "
        text += _rate_and_eta(self._done, self._total, elapsed, self._unit)
        if self._status:
            text += f", {self._status}"
        if self._is_shown:
            print(text, file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._done:
            self._line()
