"""Where the files of a feature cache lie: in a folder, or as objects below a prefix of a store.

Both keep the same contract: a file appears whole or not at all, and stays once `write` or `write_shards` returned.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from vivit.pipeline.errors import CacheError
from vivit.pipeline.folder_lock import folder_lock, part_lock
from vivit.pipeline.lease import check_held, folder_lease, lease
from vivit.pipeline.parallel import in_parallel
from vivit.pipeline.storage import Location, Url
from vivit.pipeline.workspace import partial_of, sync_folder, write_atomically

Shards = dict[str, dict[str, Any]]
"""`bytes` and `sha256` of each shard, by its name in the cache."""

_ABOUT = "zarr.json"
"""The document whose existence makes a cache."""
_SYNC_THREADS = 4
_PUT_THREADS = 8
_LEDGER_THREADS = 16
_MAKING = ".making"
_SETTINGS = ".lock-settings"
_WAIT_SEC, _POLL_SEC = 60.0, 0.2
"""How long another process that makes the cache, or changes its settings, is waited for."""
_REMEDY = "wait for it, or choose another --cache"


class CacheStore(Protocol):
    """The files of one cache, by their names in it."""

    def make(self, documents: Mapping[str, bytes]) -> None:
        """Make the cache, so that it appears whole or not at all; CacheError where something else is in its place."""

    def read(self, name: str) -> bytes:
        """A whole file; FileNotFoundError where there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all, and durably."""

    def discard(self, name: str) -> None:
        """Delete a file durably, if it is there, with whatever a killed process left of it."""

    def ledger(self, split: str) -> dict[str, bytes]:
        """The ledger entries of a split, by the names of their files."""

    def write_shards(
        self,
        split: str,
        block: int,
        rows: slice,
        views: range,
        features: npt.NDArray[np.float16],
        array: bytes,
    ) -> Shards:
        """Write some views of a block, features [clip, view, time, dim]; `array` is the zarr.json of an array that has them."""

    def sizes(self, split: str, names: Iterable[str]) -> Mapping[str, int]:
        """Bytes of shards of a split; those that are not there are left out."""

    def lock(self, part: tuple[int, int] | None) -> AbstractContextManager[None]:
        """Hold the cache, or part i of n of it, for writing; CacheError where another process does."""

    def settings_lock(self) -> AbstractContextManager[None]:
        """Hold the cache's settings for a moment, to read and change them; waits for holders of other parts."""

    def check_held(self) -> None:
        """CacheError where this process held the cache and lost it."""


def cache_store(path: Location) -> CacheStore:
    """The files of the cache at a path or URL."""
    return ObjectFiles(path) if isinstance(path, Url) else FolderFiles(path)


def shard_name(split: str, block: int, view: int) -> str:
    """The shard of a block's clips in one view."""
    return f"{split}/features/c/{block}/{view}/0/0"


def ledger_name(split: str, block: int, views: range) -> str:
    """The ledger entry of some views of a block: the first views have the plain name."""
    appended = f".{views.start}-{views.stop - 1}" if views.start else ""
    return f"ledger/{split}/{block:06d}{appended}.json"


class FolderFiles:
    """A cache in a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def make(self, documents: Mapping[str, bytes]) -> None:
        path = self._path
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise _not_a_cache(path)
        partial = partial_of(path)
        with _removed_on_failure(partial):
            for name, data in documents.items():
                write_atomically(partial / name, data)
            try:
                partial.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise _made_by_another(path) from error

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        write_atomically(self._path / name, data)

    def discard(self, name: str) -> None:
        path = self._path / name
        _clear(path.parent, f".{path.name}.*.partial")
        if path.exists():
            path.unlink()
            sync_folder(path.parent)

    def ledger(self, split: str) -> dict[str, bytes]:
        entries = {}
        for path in sorted((self._path / "ledger" / split).glob("[0-9]*.json")):
            with suppress(FileNotFoundError):  # its block is being written anew just now
                entries[path.name] = path.read_bytes()
        return entries

    def write_shards(
        self,
        split: str,
        block: int,
        rows: slice,
        views: range,
        features: npt.NDArray[np.float16],
        array: bytes,
    ) -> Shards:
        synced = {}
        with ThreadPoolExecutor(_SYNC_THREADS) as pool:  # one is written while others go to the disk
            for at, view in enumerate(views):
                name = shard_name(split, block, view)
                path = self._path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                _clear(path.parent, "*")  # what a killed run left
                path.write_bytes(_encoded(array, block, view, rows, features[:, at]))
                synced[name] = pool.submit(_synced, path)
        return {name: shard.result() for name, shard in synced.items()}

    def sizes(self, split: str, names: Iterable[str]) -> Mapping[str, int]:
        found = {}
        for name in names:
            with suppress(OSError):
                found[name] = (self._path / name).stat().st_size
        return found

    @contextmanager
    def lock(self, part: tuple[int, int] | None) -> Iterator[None]:
        path = self._path
        with (
            folder_lock(path, CacheError, _REMEDY)
            if part is None
            else part_lock(path, part, CacheError, _REMEDY)
        ):
            yield

    @contextmanager
    def settings_lock(self) -> Iterator[None]:
        with (self._path / _SETTINGS).open("a") as file:
            with suppress(OSError):  # a file system without locks, of which the lock of the cache has warned
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def check_held(self) -> None:
        """A file's lock is held until the process ends."""


class ObjectFiles:
    """A cache in an object store: an object per file, each put in one request."""

    def __init__(self, url: Url) -> None:
        self._url = url

    def make(self, documents: Mapping[str, bytes]) -> None:
        url, until = self._url, time.monotonic() + _WAIT_SEC
        others = {name for name in url.sizes_below() if name not in documents and not name.startswith(".")}
        if url.is_file() or others:
            raise _not_a_cache(url)
        while True:
            self._refuse_if_made()
            try:
                with lease(url / _MAKING, url, CacheError, _REMEDY):
                    self._refuse_if_made()
                    for name, data in sorted(documents.items(), key=lambda item: item[0] == _ABOUT):
                        (url / name).write_bytes(data)  # zarr.json of the group last
                    return
            except CacheError:  # others that make it now: the jobs of an array begin together
                if (url / _ABOUT).is_file() or time.monotonic() > until:
                    raise
                time.sleep(_POLL_SEC)

    def _refuse_if_made(self) -> None:
        if (self._url / _ABOUT).is_file():
            raise _made_by_another(self._url)

    def read(self, name: str) -> bytes:
        return (self._url / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (self._url / name).write_bytes(data)

    def discard(self, name: str) -> None:
        (self._url / name).unlink(missing_ok=True)

    def ledger(self, split: str) -> dict[str, bytes]:
        folder = self._url / "ledger" / split
        names = [name for name in folder.names() if name[:1].isdigit() and name.endswith(".json")]

        def read(name: str) -> bytes | None:
            try:
                return (folder / name).read_bytes()
            except FileNotFoundError:  # its block is being written anew just now
                return None

        found = zip(names, in_parallel(read, names, _LEDGER_THREADS), strict=True)
        return {name: data for name, data in found if data is not None}

    def write_shards(
        self,
        split: str,
        block: int,
        rows: slice,
        views: range,
        features: npt.NDArray[np.float16],
        array: bytes,
    ) -> Shards:
        encoded = {
            shard_name(split, block, view): _encoded(array, block, view, rows, features[:, at])
            for at, view in enumerate(views)
        }
        in_parallel(lambda name: (self._url / name).write_bytes(encoded[name]), encoded, _PUT_THREADS)
        return {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in encoded.items()
        }

    def sizes(self, split: str, names: Iterable[str]) -> Mapping[str, int]:
        folder = f"{split}/features/c"
        return {f"{folder}/{name}": size for name, size in (self._url / folder).sizes_below().items()}

    def lock(self, part: tuple[int, int] | None) -> AbstractContextManager[None]:
        return folder_lease(self._url, part, CacheError, _REMEDY)

    @contextmanager
    def settings_lock(self) -> Iterator[None]:
        until = time.monotonic() + _WAIT_SEC
        with ExitStack() as held:
            while True:
                try:
                    held.enter_context(lease(self._url / _SETTINGS, self._url, CacheError, _REMEDY))
                    break
                except CacheError:
                    if time.monotonic() > until:
                        raise
                time.sleep(_POLL_SEC)
            yield

    def check_held(self) -> None:
        check_held(self._url, CacheError)


def _encoded(array: bytes, block: int, view: int, rows: slice, features: npt.NDArray[np.float16]) -> bytes:
    """The bytes of one shard, features [clip, time, dim], as zarr makes them."""
    key, buffer = f"c/{block}/{view}/0/0", default_buffer_prototype().buffer
    files = {"zarr.json": buffer.from_bytes(array)}
    target = zarr.open_array(MemoryStore(files), mode="r+").with_config({"write_empty_chunks": True})
    target[rows, view] = features
    return files[key].to_bytes()


def _made_by_another(path: Location) -> CacheError:
    return CacheError(f"{path} was made by another process just now: run the same command again")


def _not_a_cache(path: Location) -> CacheError:
    return CacheError(f"{path} exists and is not a feature cache: choose another --cache")


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _synced(path: Path) -> dict[str, Any]:
    """Size and digest of a shard that is on the disk now, its name included."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    sync_folder(path.parent)
    return {"bytes": path.stat().st_size, "sha256": digest}


def _clear(folder: Path, pattern: str) -> None:
    for leftover in folder.glob(pattern):
        if not leftover.name.startswith(
            ".nfs"
        ):  # deleted, and open in another process: NFS removes it by itself
            leftover.unlink(missing_ok=True)
