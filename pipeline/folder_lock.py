"""One writer at a time in a folder."""

import errno
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


@contextmanager
def part_lock(folder: Path, part: tuple[int, int], error: type[VivitError], remedy: str) -> Iterator[bool]:
    """Hold part i of n of a folder that exists, beside the holders of its other parts; `error` where another process
    holds the whole folder, the same part, or a part of another number of parts."""
    index, count = part
    with ExitStack() as files, storage_errors(folder):
        whole, parts, own = (
            files.enter_context((folder / name).open("a+"))
            for name in (".lock", f".lock-of-{count}", f".lock-{index}-of-{count}")
        )
        held = (
            _hold(whole, folder, error, remedy, shared=True)
            and _hold(parts, folder, error, remedy, shared=True)
            and _hold(own, folder, error, remedy)
        )
        for other in folder.glob(".lock-of-*"):
            if held and other.name != f".lock-of-{count}":
                with other.open("a+") as file:
                    _hold(file, folder, error, f"it is in parts of another number than {count}; {remedy}")
        yield held


def _hold(file: IO[str], folder: Path, error: type[VivitError], remedy: str, *, shared: bool = False) -> bool:
    """Lock the file, and write into it who holds it; several may hold it `shared`."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
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
