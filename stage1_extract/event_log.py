"""What happens in a run of stage 1 as JSON lines, for machines that watch it."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from vivit.pipeline.workspace import storage_errors

STDERR = "-"
"""Name that stands for standard error, where the lines then take the place of the progress."""


class EventLog:
    """One JSON object per line: `time` (UTC, ISO 8601), `event`, and what belongs to it. Thread-safe."""

    def __init__(self, file: IO[str] | None) -> None:
        """`file`: None keeps nothing."""
        self._file = file
        self._writing = threading.Lock()

    @property
    def takes_stderr(self) -> bool:
        """Whether standard error belongs to the lines."""
        return self._file is sys.stderr

    def write(self, event: str, **values: Any) -> None:
        """Add a line, at once visible to readers of the file."""
        if self._file is None:
            return
        line = json.dumps(
            {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event} | values,
            default=str,
        )
        with self._writing:
            self._file.write(line + "\n")
            self._file.flush()


@contextmanager
def event_log(name: str | None) -> Iterator[EventLog]:
    """The log in a file, to which it is appended; None is none, `-` standard error."""
    if name is None or name == STDERR:
        yield EventLog(None if name is None else sys.stderr)
        return
    path = Path(name)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    with file:
        yield EventLog(file)
