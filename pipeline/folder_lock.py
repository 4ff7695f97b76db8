"""One writer at a time in a folder."""

import errno
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vivit.pipeline.errors import VivitError
from vivit.pipeline.workspace import storage_errors

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What a file system answers that has no locks."""


@contextmanager
def folder_lock(folder: Path, error: type[VivitError], remedy: str) -> Iterator[bool]:
    """Hold `folder`, which is made if need be; `error` with the `remedy` where another process does.

    A killed process holds nothing. Gives False on a file system without locks, after a warning.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    with file:
        with storage_errors(folder):
            held = _hold(file, folder, error, remedy)
        yield held


def _hold(file: IO[str], folder: Path, error: type[VivitError], remedy: str) -> bool:
    """Lock the file, and write into it who holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise error(
            f"{folder} is being written by another process ({file.read().strip() or 'unknown'}): {remedy}"
        ) from None
    except OSError as refused:
        if refused.errno not in _NO_LOCKS:
            raise
        logger.warning("%s is on a file system without locks: let one process at a time write it", folder)
        return False
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return True
