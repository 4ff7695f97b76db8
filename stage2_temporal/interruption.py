"""Ctrl-C and SIGTERM as a wish to stop, so that work ends where its state can be saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from vivit.pipeline.errors import InterruptedRunError


@contextmanager
def before_first_step() -> Iterator[None]:
    """For work that has nothing to save: Ctrl-C ends it at once, as InterruptedRunError."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise InterruptedRunError(
            "interrupted before the first step; nothing was lost: run the same command again"
        ) from error


class StopRequest:
    """While in use, the first SIGINT or SIGTERM only sets `requested`; a second one acts as it did before."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
