"""Rows of Zarr v3 shards, read by position: one system call per run of rows instead of a trip through zarr.

The measured reason is in `docs/performance.md`: zarr-python needs about 1 ms for a row, a positioned read some
microseconds. What is read is the standard layout (the index of a shard lies at its end), no more than that.
"""

import itertools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd

from vivit.pipeline.errors import CacheError
from vivit.pipeline.parallel import in_parallel
from vivit.pipeline.storage import Location, Url

Index = npt.NDArray[np.uint64]
"""Offset and size in bytes of each chunk of a shard [row, 2]."""

_Piece = tuple[int, int, npt.NDArray[np.int64], npt.NDArray[np.float16]]
"""Block, view, rows in the block, and where they go [row, time, dim]."""

_READ_THREADS = 4
_PARALLEL_FROM_BYTES = 8 << 20
_REQUEST_THREADS = 16
"""Requests to an object store at a time; waiting for an answer takes no processor."""
_WHOLE_FROM_SHARE = 0.25
"""Share of a shard's rows from which on all of it is fetched, in one request with its index."""
_LARGEST_GAP_BYTES = 256 << 10
"""Bytes that nobody asked for, and that are fetched all the same where that saves a request."""


def aligned_empty(shape: tuple[int, ...]) -> npt.NDArray[np.float16]:
    """An uninitialised array that starts at a multiple of 64 bytes.

    A large array of NumPy's starts 16 bytes into a page. Chunks start at the beginning of one in the file, and AMD processors
    copy three times slower between places that lie just so in their pages.
    """
    size = 2 * math.prod(shape)
    space = np.empty(size + 64, np.uint8)
    start = -space.ctypes.data % 64
    return space[start : start + size].view(np.float16).reshape(shape)


def shard_reader(array: Location, *, block_size: int, codec: str) -> "ShardReader":
    """A reader for the Zarr array at a path or URL; `codec`: none or zstd."""
    if isinstance(array, Url):
        return ObjectShardReader(array, block_size=block_size, codec=codec)
    return FileShardReader(array, block_size=block_size, codec=codec)


class ShardReader(ABC):
    """Reads one array whose shards hold `block_size` rows of one view, one chunk per row. Thread-safe."""

    def __init__(self, *, block_size: int, codec: str) -> None:
        """`codec`: none or zstd."""
        self._block_size, self._codec = block_size, codec
        self._indexes: dict[tuple[int, int], Index] = {}

    def forget(self, block: int) -> None:
        """Read the indexes of a block again: its shards were written anew."""
        for key in [key for key in self._indexes if key[0] == block]:
            del self._indexes[key]

    def read(self, rows: npt.NDArray[np.int64], views: Sequence[int], out: npt.NDArray[np.float16]) -> None:
        """Fill `out` [view, row, time, dim], C-contiguous."""
        blocks = rows // self._block_size
        edges = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(rows)] if len(rows) else [0]
        pieces = [
            (int(blocks[start]), view, rows[start:stop] % self._block_size, out[at, start:stop])
            for at, view in enumerate(views)
            for start, stop in itertools.pairwise(edges)
        ]
        self._read_pieces(pieces, out.nbytes)

    @abstractmethod
    def _read_pieces(self, pieces: Sequence[_Piece], size_bytes: int) -> None:
        """`_read_shard` for each piece; all together are so many bytes."""

    @abstractmethod
    def _read_shard(
        self, block: int, view: int, rows: npt.NDArray[np.int64], out: npt.NDArray[np.float16]
    ) -> None:
        """Fill `out` [row, time, dim] with rows of one shard."""


class FileShardReader(ShardReader):
    """Reads files by position."""

    def __init__(self, array: Path, *, block_size: int, codec: str) -> None:
        """`array`: folder of the Zarr array."""
        super().__init__(block_size=block_size, codec=codec)
        # joining text is several times faster than joining Paths, for each row read
        self._chunks = str(array / "c")

    def _read_pieces(self, pieces: Sequence[_Piece], size_bytes: int) -> None:
        if size_bytes < _PARALLEL_FROM_BYTES:
            for piece in pieces:
                self._read_shard(*piece)
            return
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            list(pool.map(lambda piece: self._read_shard(*piece), pieces))

    def _read_shard(
        self, block: int, view: int, rows: npt.NDArray[np.int64], out: npt.NDArray[np.float16]
    ) -> None:
        path = f"{self._chunks}/{block}/{view}/0/0"
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CacheError(
                f"{path} cannot be read ({error.strerror}): run `vivit extract` again"
            ) from error
        try:
            index = self._index_of(block, view, descriptor, path)[rows]
            runs = _runs(index) if self._codec == "none" else [(i, i + 1) for i in range(len(rows))]
            for start, stop in runs:
                self._read_run(descriptor, path, index[start:stop], out[start:stop])
        finally:
            os.close(descriptor)

    def _index_of(self, block: int, view: int, descriptor: int, path: str) -> Index:
        index = self._indexes.get((block, view))
        if index is None:
            index = self._indexes[block, view] = _read_index(descriptor, path, self._block_size)
        return index

    def _read_run(self, descriptor: int, path: str, index: Index, out: npt.NDArray[np.float16]) -> None:
        """Fill `out` [row, time, dim] from chunks that lie one behind the other in the file."""
        offset, size = int(index[0, 0]), int(index[:, 1].sum())
        if self._codec == "none":
            target = out.data.cast("B")
            if size == len(target) and _read_into(descriptor, target, offset):
                return
        else:
            data = bytearray(min(size, os.fstat(descriptor).st_size))
            if _read_into(descriptor, memoryview(data), offset):
                _decompress(bytes(data), out, path)
                return
        raise _points_nowhere(path)


class ObjectShardReader(ShardReader):
    """Reads objects of a store: many rows of a shard in one request, few by ranges of bytes."""

    def __init__(self, array: Url, *, block_size: int, codec: str) -> None:
        """`array`: URL of the Zarr array."""
        super().__init__(block_size=block_size, codec=codec)
        self._chunks = array / "c"

    def _read_pieces(self, pieces: Sequence[_Piece], size_bytes: int) -> None:
        in_parallel(lambda piece: self._read_shard(*piece), pieces, _REQUEST_THREADS)

    def _read_shard(
        self, block: int, view: int, rows: npt.NDArray[np.int64], out: npt.NDArray[np.float16]
    ) -> None:
        url = self._chunks / f"{block}/{view}/0/0"
        try:
            if len(rows) >= _WHOLE_FROM_SHARE * self._block_size:
                data = url.read_bytes()
                index = self._indexes[block, view] = _parse_index(data, str(url), self._block_size)
                self._take(data, 0, index[rows], out, url)
                return
            index = self._index_of(block, view, url)[rows]
            for chosen in _near(index):
                low = int(index[chosen, 0].min())
                high = int(index[chosen].sum(axis=1).max())
                self._take(url.read_range(low, high - low), low, index[chosen], out, url, chosen)
        except FileNotFoundError as error:
            raise CacheError(f"{url} cannot be read (no such object): run `vivit extract` again") from error

    def _index_of(self, block: int, view: int, url: Url) -> Index:
        index = self._indexes.get((block, view))
        if index is None:
            data = url.read_end(self._block_size * 16 + 4)
            index = self._indexes[block, view] = _parse_index(data, str(url), self._block_size)
        return index

    def _take(
        self,
        data: bytes,
        start: int,
        index: Index,
        out: npt.NDArray[np.float16],
        url: Url,
        places: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Fill the `places` (None: all) of `out` [row, time, dim] with chunks from `data`, which begins at byte `start`."""
        for at, (offset, size) in enumerate(index.tolist()):
            target = out[at if places is None else places[at]]
            chunk = data[offset - start : offset - start + size]
            if len(chunk) != size or (self._codec == "none" and size != target.nbytes):
                raise _points_nowhere(str(url))
            if self._codec == "none":
                target[...] = np.frombuffer(chunk, "<f2").reshape(target.shape)
            else:
                _decompress(chunk, target, str(url))


def _near(index: Index) -> list[npt.NDArray[np.int64]]:
    """Positions of entries whose chunks lie so near each other that one request fetches them."""
    order = np.argsort(index[:, 0], kind="stable")
    starts, ends = index[order, 0], index[order].sum(axis=1)
    gaps = starts[1:].astype(np.int64) - np.maximum.accumulate(ends)[:-1].astype(np.int64)
    return np.split(order, np.flatnonzero(gaps > _LARGEST_GAP_BYTES) + 1)


def _decompress(data: bytes, out: npt.NDArray[np.float16], path: str) -> None:
    try:
        Zstd().decode(data, out)
    except RuntimeError as error:
        raise CacheError(f"{path} is damaged ({error}); run `vivit extract` again") from error


def _points_nowhere(path: str) -> CacheError:
    return CacheError(
        f"{path} is damaged: its index points at bytes that are not there; run `vivit extract` again"
    )


def _read_index(descriptor: int, path: str, block_size: int) -> Index:
    """The index at the end of a shard in a file."""
    size = block_size * 16 + 4
    end = os.fstat(descriptor).st_size
    data = bytearray(min(size, end))
    if not _read_into(descriptor, memoryview(data), end - len(data)):
        data.clear()
    return _parse_index(data, path, block_size)


def _parse_index(data: bytes | bytearray, path: str, block_size: int) -> Index:
    """The index at the end of the bytes of a shard, whose crc32c must be right."""
    size = block_size * 16
    tail = bytes(data[-(size + 4) :])
    if len(tail) < size + 4 or google_crc32c.value(tail[:size]) != int.from_bytes(tail[size:], "little"):
        raise CacheError(f"{path} is damaged: the checksum of its index is wrong; run `vivit extract` again")
    return np.frombuffer(tail, "<u8", count=size // 8).reshape(-1, 2)


def _runs(index: Index) -> list[tuple[int, int]]:
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
