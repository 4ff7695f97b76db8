"""Rows of Zarr v3 shards, read by position: one system call per run of rows instead of a trip through zarr.

The measured reason is in `docs/performance.md`: zarr-python needs about 1 ms for a row, a positioned read some
microseconds. What is read is the standard layout (the index of a shard lies at its end), no more than that.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd

from vivit.pipeline.errors import CacheError

_READ_THREADS = 4
_PARALLEL_FROM_BYTES = 8 << 20


@dataclass(frozen=True)
class ShardReader:
    """Reads one array whose shards hold `block_size` rows of one view, one chunk per row."""

    path: Callable[[int, int], Path]
    """The shard of (block, view)."""
    block_size: int
    codec: str
    """`none` or `zstd`."""

    def read(self, rows: npt.NDArray[np.int64], views: Sequence[int], out: npt.NDArray[np.float16]) -> None:
        """Fill `out` [view, row, time, dim], C-contiguous."""
        blocks = rows // self.block_size
        edges = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(rows)] if len(rows) else [0]
        pieces = [
            (int(blocks[start]), view, rows[start:stop] % self.block_size, out[at, start:stop])
            for at, view in enumerate(views)
            for start, stop in itertools.pairwise(edges)
        ]
        if out.nbytes < _PARALLEL_FROM_BYTES:
            for piece in pieces:
                self._read_shard(*piece)
            return
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            list(pool.map(lambda piece: self._read_shard(*piece), pieces))

    def _read_shard(
        self, block: int, view: int, rows: npt.NDArray[np.int64], out: npt.NDArray[np.float16]
    ) -> None:
        """Fill `out` [row, time, dim] with rows of one shard."""
        path = self.path(block, view)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CacheError(
                f"{path} cannot be read ({error.strerror}): run `vivit extract` again"
            ) from error
        try:
            index = self._index(descriptor, path)[rows]
            for start, stop in (
                _runs(index) if self.codec == "none" else [(i, i + 1) for i in range(len(rows))]
            ):
                self._read_run(descriptor, path, index[start:stop], out[start:stop])
        finally:
            os.close(descriptor)

    def _read_run(
        self, descriptor: int, path: Path, index: npt.NDArray[np.uint64], out: npt.NDArray[np.float16]
    ) -> None:
        """Fill `out` [row, time, dim] from chunks that lie one behind the other in the file."""
        offset, size = int(index[0, 0]), int(index[:, 1].sum())
        if self.codec == "none":
            target = memoryview(out).cast("B")
            if size == len(target) and _read_into(descriptor, target, offset):
                return
        else:
            data = bytearray(size)
            if _read_into(descriptor, memoryview(data), offset):
                Zstd().decode(bytes(data), out)
                return
        raise CacheError(
            f"{path} is damaged: its index points at bytes that are not there; run `vivit extract` again"
        )

    def _index(self, descriptor: int, path: Path) -> npt.NDArray[np.uint64]:
        """Offset and size in bytes of each chunk [row, 2], from the end of the shard."""
        size = self.block_size * 16
        end = os.fstat(descriptor).st_size
        data = bytearray(size + 4)
        whole = end >= len(data) and _read_into(descriptor, memoryview(data), end - len(data))
        if not whole or google_crc32c.value(bytes(data[:size])) != int.from_bytes(data[size:], "little"):
            raise CacheError(
                f"{path} is damaged: the checksum of its index is wrong; run `vivit extract` again"
            )
        return np.frombuffer(data, "<u8", count=size // 8).reshape(-1, 2)


def _runs(index: npt.NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Ranges of entries whose chunks lie one behind the other in the file."""
    breaks = np.flatnonzero(index[1:, 0] != index[:-1, 0] + index[:-1, 1]) + 1
    edges = [0, *breaks.tolist(), len(index)]
    return list(itertools.pairwise(edges))


def _read_into(descriptor: int, target: memoryview, offset: int) -> bool:
    """Fill `target` from `offset`; False where the file ends too early."""
    while len(target):
        count = os.preadv(descriptor, [target], offset)
        if count == 0:
            return False
        target, offset = target[count:], offset + count
    return True
