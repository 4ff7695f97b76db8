"""What files have in common that are read by position: the place in them."""

import errno
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class PositionedFile(io.RawIOBase):
    """A file of known size with a position."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self._start, self._size, self._at = 0, size_bytes, 0

    def drop_front(self, count: int) -> None:
        """Let the file begin `count` bytes later, and go there."""
        self._start, self._size, self._at = self._start + count, self._size - count, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset
        if at < 0:
            raise OSError(errno.EINVAL, "a position before the beginning")
        self._at = at
        return at

    def read(self, size: int | None = -1, /) -> bytes:
        """Without room for more than there is: the header of a broken tar may ask for any number of bytes."""
        left = max(0, self._size - self._at)
        return super().read(left if size is None or size < 0 else min(size, left)) or b""

    def readinto(self, target: "WriteableBuffer") -> int:
        view = memoryview(target).cast("B")
        data = self._read_at(self._start + self._at, min(len(view), max(0, self._size - self._at)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read_at(self, at: int, count: int) -> bytes:
        raise NotImplementedError
