"""Files that other libraries open by their path, such as weights: an object is fetched once per machine and kept.

Copies lie below `$XDG_CACHE_HOME/vivit` (`~/.cache/vivit`), under a name that changes with the object.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vivit.pipeline.errors import StorageError, WeightsError
from vivit.pipeline.parallel import in_parallel
from vivit.pipeline.storage import Location, Url, location
from vivit.pipeline.workspace import sync_folder, user_caches

_PIECE_BYTES = 16 << 20
_FETCH_THREADS = 8


def local_file(text: str) -> Path:
    """The file that a path or URL names, fetched where it is an object."""
    return local_copy(location(text))


def local_copy(place: Location) -> Path:
    """`place` where it is a path; otherwise a file with the content of the object. WeightsError where there is none."""
    if isinstance(place, Path):
        return place
    try:
        size, version = place.size(), place.version()
    except FileNotFoundError:
        raise WeightsError(f"there is no object {place}: correct the URL, or pass a file") from None
    name = hashlib.sha256(f"{place} {version} {size}".encode()).hexdigest()[:32]
    # with the name of the object's folder, which messages show
    path = copies_folder() / name / (place.parent.name or place.bucket) / place.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                _fetch(place, size, path)
    except OSError as error:
        if error.filename == str(place):
            raise StorageError(
                f"{place} was deleted while it was fetched: run the same command again"
            ) from None
        raise StorageError(
            f"{place} cannot be kept at {path} ({error.strerror or error}): set XDG_CACHE_HOME to a folder with room for it"
        ) from error
    if place.version() != version:
        path.unlink(missing_ok=True)
        raise StorageError(f"{place} changed while it was fetched: run the same command again")
    return path


def copies_folder() -> Path:
    """Where the copies lie."""
    return user_caches() / "objects"


def _fetch(url: Url, size: int, path: Path) -> None:
    """Write the object's bytes to `path`, which appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:

        def piece(offset: int) -> None:
            data = url.read_range(offset, min(_PIECE_BYTES, size - offset))
            # The number only now: after an interruption the file is closed, and the number may be another one's.
            os.pwrite(file.fileno(), data, offset)

        in_parallel(piece, range(0, size, _PIECE_BYTES), _FETCH_THREADS)
        os.fsync(file.fileno())
    if partial.stat().st_size != size:
        raise StorageError(f"{url} became shorter while it was fetched: run the same command again")
    partial.replace(path)
    sync_folder(path.parent)


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait for other processes of this machine that fetch the same object."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
