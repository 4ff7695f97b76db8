"""The folder that holds manifests, caches and runs, and the newest of each."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vivit.pipeline.errors import CacheError, CheckpointError, ConfigError, StorageError
from vivit.pipeline.storage import Location, Url


@dataclass(frozen=True)
class Workspace:
    """`manifests/`, `caches/` and `runs/` below one root."""

    root: Path

    def __post_init__(self) -> None:
        if re.match(r"\w{2,}:/", str(self.root)):  # Path makes one slash of a URL's two
            raise ConfigError(
                f"the work folder must be on this machine, not at a URL ({self.root}): manifests and caches may be given "
                "by URL one by one, with --manifest and --cache"
            )

    @property
    def manifests(self) -> Path:
        return self.root / "manifests"

    @property
    def caches(self) -> Path:
        return self.root / "caches"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def manifest_of(self, dataset: str) -> Path:
        """Where the manifest of a data set is kept."""
        return self.manifests / f"{file_name(dataset)}.parquet"

    def newest_cache(self) -> Path:
        """The cache made last; raises CacheError when there is none."""
        found = _by_age(self.caches, "zarr.json")
        if not found:
            raise CacheError(f"no feature cache in {self.caches}: run `vivit extract` first, or pass --cache")
        return found[-1]

    def newest_run(self) -> Path:
        """The run that was written to last; raises CheckpointError when there is none."""
        found = _by_age(self.runs, "config.json", "last/state.safetensors")
        if not found:
            raise CheckpointError(f"no run in {self.runs}: run `vivit train-temporal` first, or pass --run")
        return found[-1]


def file_name(text: str) -> str:
    """`text` with everything that a file name should not hold replaced by `_`."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("._") or "unnamed"


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _by_age(folder: Path, mark: str, *others: str) -> list[Path]:
    """Folders with a file `mark`, the one where it or one of `others` was written last at the end."""

    def written(path: Path) -> int:
        files = [path / name for name in (mark, *others)]
        return max(file.stat().st_mtime_ns for file in files if file.is_file())

    # A name with a dot in front is a folder in the making, or what a killed process left of it.
    marked = [p for p in _children(folder) if not p.name.startswith(".") and (p / mark).is_file()]
    return sorted(marked, key=lambda p: (written(p), p.name))


@contextmanager
def storage_errors(path: Location) -> Iterator[None]:
    """Turn what the file system refuses into one sentence with the remedy."""
    import errno

    try:
        yield
    except OSError as error:
        where = error.filename or path
        reasons = {
            errno.ENOSPC: f"the disk is full at {where}: free space there, then run the same command again",
            errno.EDQUOT: f"your disk quota is used up at {where}: free space, then run the same command again",
            errno.EROFS: f"{where} is on a read-only file system: choose another --workdir",
            errno.EACCES: f"no permission to write {where}: choose another --workdir, or change its permissions",
            errno.EPERM: f"no permission to write {where}: choose another --workdir, or change its permissions",
            errno.ENOTDIR: f"{where} lies below a file, not a folder: choose another --workdir",
            errno.EEXIST: f"{where} exists and is not a folder: choose another --workdir",
        }
        if error.errno not in reasons:
            raise
        raise StorageError(reasons[error.errno]) from error


def write_atomically(path: Location, data: bytes) -> None:
    """Write `path` so that a reader sees all of it or nothing, also after a power cut."""
    if isinstance(path, Url):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def user_caches() -> Path:
    """Folder for what can be made again: `$XDG_CACHE_HOME/vivit`, or `~/.cache/vivit`; ConfigError where there is no home."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "vivit"
    except RuntimeError:  # no HOME and a user without a name, as in some containers
        raise ConfigError(
            "there is no home folder to keep copies in: set XDG_CACHE_HOME to a folder"
        ) from None


def partial_of(path: Path) -> Path:
    """Where `path` is made before it gets its name: another for each writer, also on other machines (in containers
    process numbers are often the same)."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def nearest(name: str, known: list[str], what: str) -> ConfigError:
    """An error for an unknown `name` that suggests the most similar known one."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}? " if close else ""
    return ConfigError(f"unknown {what} {name!r}: {hint}(known: {', '.join(known)})")
