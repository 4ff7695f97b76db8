"""Files to read from by position: regular files of this machine, objects in a store, and parts of either."""

import errno
import os
import stat
import time
from collections.abc import Hashable
from pathlib import Path
from typing import BinaryIO

from vivit.pipeline.errors import VivitError
from vivit.pipeline.positioned_file import PositionedFile
from vivit.pipeline.storage import Url


class NotRegularError(OSError):
    """A folder, FIFO, socket or device, which has no bytes to read from by position."""


def open_regular(path: Path) -> BinaryIO:
    """A regular file without a buffer; FileNotFoundError, NotRegularError or another OSError."""
    try:  # without O_NONBLOCK a FIFO would block here for ever
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (NotADirectoryError, ValueError) as error:  # ValueError: a zero byte in the name
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path)) from error
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise NotRegularError(errno.ENXIO, "not a regular file", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise NotRegularError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "rb", buffering=0)


def identity_of(file: BinaryIO) -> tuple[Hashable, ...] | None:
    """What changes when a file is replaced or written to; None for bytes in memory."""
    if isinstance(file, FilePart | StoreFile):
        return file.identity
    try:
        about = os.fstat(file.fileno())
    except OSError:  # io.UnsupportedOperation
        return None
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


class FilePart(PositionedFile):
    """`size_bytes` of an open file from `start` on, as a file; closes the other one."""

    def __init__(self, file: BinaryIO, start: int, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self._file, self._start = file, start
        whole = identity_of(file)
        self.identity = None if whole is None else (*whole, start, size_bytes)
        """As of `identity_of`."""

    def _read_at(self, at: int, count: int) -> bytes:
        self._file.seek(at)
        return self._file.read(count)

    def close(self) -> None:
        self._file.close()
        super().close()


class StoreFile(PositionedFile):
    """An object in a store, or part of one, as a file.

    FFmpeg may take an error of the network for the end of a file, and the time that it took for time spent on decoding:
    so both are kept, for those who judge the video.
    """

    def __init__(self, url: Url, start: int = 0, size_bytes: int | None = None) -> None:
        """The whole object, or `size_bytes` of it from `start` on; FileNotFoundError."""
        began = time.monotonic()
        self._url = url
        size_bytes = url.size() if size_bytes is None else size_bytes
        super().__init__(size_bytes)
        self._file = url.open_binary(start, size_bytes)
        self.identity: tuple[Hashable, ...] = (str(url), start, size_bytes)
        """As of `identity_of`."""
        self.error: VivitError | None = None
        """Why the last request failed for good."""
        self.waited_sec = time.monotonic() - began
        """Time spent on requests."""

    def clock(self) -> float:
        """`time.monotonic`, without the time spent on requests."""
        return time.monotonic() - self.waited_sec

    def check(self) -> None:
        """Raise the error of a request that failed."""
        if self.error is not None:
            raise self.error

    def _read_at(self, at: int, count: int) -> bytes:
        began = time.monotonic()
        try:
            self._file.seek(at)
            return self._file.read(count)
        except VivitError as error:
            self.error = error
            raise
        except EOFError as error:
            raise OSError(errno.EIO, f"{self._url} became shorter while it was read") from error
        finally:
            self.waited_sec += time.monotonic() - began

    def close(self) -> None:
        self._file.close()
        super().close()
