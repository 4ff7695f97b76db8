"""Tars whose bytes depend on their content only: no times, owners or modes of the files that went in."""

import hashlib
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from vivit.pipeline.tar_walk import BLOCK_BYTES, TarMember

END_BYTES = bytes(2 * BLOCK_BYTES)


class WrongSizeError(Exception):
    """A file gave fewer or more bytes than it had when it was opened."""


class TarWriter:
    """Writes a new tar, member by member; use as a context manager, and call `finish` at its end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.members: list[TarMember] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def size_bytes(self) -> int:
        """Of what is written so far."""
        return self._file.tell()

    def add(self, name: str, size_bytes: int, pieces: Iterable[bytes]) -> None:
        """Write a member of `size_bytes`; WrongSizeError where the pieces are more or fewer."""
        info = tarfile.TarInfo(name)
        info.size = size_bytes
        self._file.write(info.tobuf(tarfile.PAX_FORMAT))
        offset = self._file.tell()
        digest, count = hashlib.sha256(), 0
        for piece in pieces:
            count += len(piece)
            if count > size_bytes:
                break
            digest.update(piece)
            self._file.write(piece)
        if count != size_bytes:
            raise WrongSizeError(
                f"{size_bytes} bytes were promised, but {'more' if count > size_bytes else count} came"
            )
        self._file.write(bytes(-size_bytes % BLOCK_BYTES))
        self.members.append(TarMember(name, offset, size_bytes, digest.hexdigest()))

    def cut_back(self, size_bytes: int) -> None:
        """Forget what was written behind the first `size_bytes`."""
        self._file.seek(size_bytes)
        self._file.truncate()
        self.members = [member for member in self.members if member.offset < size_bytes]

    def finish(self) -> int:
        """End the tar and make it durable: its size in bytes."""
        self._file.write(END_BYTES)
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.size_bytes


def space_of(size_bytes: int) -> int:
    """Bytes that a member of this size takes up in a tar, with its header."""
    return BLOCK_BYTES + size_bytes + -size_bytes % BLOCK_BYTES
