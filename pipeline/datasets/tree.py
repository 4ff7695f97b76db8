"""What lies below a folder, from one walk over it: files by name, videos by the clip they hold, folders of pictures."""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from vivit.pipeline.errors import DataError

VIDEO_SUFFIXES = frozenset(
    [
        ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".flv", ".wmv",
        ".asf", ".ogv", ".gif", ".3gp",
    ]
)  # fmt: skip
"""File names that count as videos; what is in them is checked when they are read."""

PICTURE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png"])
_PARENTS_OF_FRAMES = frozenset(["rgb_frames", "flow_frames", "frames"])
"""Folders whose folders hold frames: these may be millions, and are not listed."""


class FileTree:
    """The files below a folder, but for pictures, of which only the folders are kept. Names are relative, with `/`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: list[str] = []
        self.frame_folders: list[str] = []
        """Folders that hold pictures."""
        for folder, folders, files in _walk(root):
            if os.path.basename(folder or str(root)) in _PARENTS_OF_FRAMES:
                self.frame_folders += [_joined(folder, name) for name in folders]
                folders.clear()
            if files and PurePosixPath(files[0]).suffix.lower() in PICTURE_SUFFIXES:
                self.frame_folders.append(folder)
            else:
                self.files += [_joined(folder, name) for name in files if _is_utf8(_joined(folder, name))]

    @cached_property
    def by_name(self) -> dict[str, list[str]]:
        """Files by their base name."""
        found: dict[str, list[str]] = {}
        for file in self.files:
            found.setdefault(file.rpartition("/")[2], []).append(file)
        return found

    def nearest(self, name: str) -> str | None:
        """The file of this name, which may begin with folders, that lies least deep; DataError where two do."""
        same = self.by_name.get(name.rpartition("/")[2], ())
        found = sorted((f for f in same if f"/{f}".endswith(f"/{name}")), key=lambda f: (f.count("/"), f))
        if len(found) > 1 and found[0].count("/") == found[1].count("/"):
            raise DataError(
                f"{name} is there more than once below {self.root}: {found[0]} and {found[1]}. "
                "Pass the folder of the right one with --annotations"
            )
        return found[0] if found else None


class VideoFinder:
    """Finds the video of each clip by its name without suffix, wherever it lies."""

    def __init__(
        self,
        files: Iterable[str],
        *,
        suffixes: Collection[str] = VIDEO_SUFFIXES,
        repeated: dict[str, list[str]] | None = None,
    ) -> None:
        """`repeated` takes the videos that were found more than once: the one that was taken, and the others."""
        self._repeated = {} if repeated is None else repeated
        self._by_stem: dict[str, list[str]] = {}
        for file in files:
            stem, dot, suffix = file.rpartition("/")[2].rpartition(".")
            if dot and f".{suffix.lower()}" in suffixes:
                self._by_stem.setdefault(stem, []).append(file)

    @property
    def stems(self) -> Iterable[str]:
        """Names without suffix."""
        return self._by_stem.keys()

    def find(self, stem: str, *, folders: Sequence[str] = (), parent: str | None = None) -> str | None:
        """The video of this name, in a folder called `parent` where that is given.

        Of several it is the one below the first of `folders`; then the one below the next, and so on; then the least
        deep one.
        """
        found: Sequence[str] = self._by_stem.get(stem, ())
        if parent is not None:
            found = [file for file in found if file.split("/")[-2:-1] == [parent]]
        if len(found) < 2:
            return found[0] if found else None
        first, *others = sorted(found, key=lambda file: _rank(file, folders))
        self._repeated[first] = others
        return first

    @cached_property
    def _by_folded(self) -> dict[str, str]:
        return {stem.casefold(): stem for stem in self._by_stem}

    def spelling_of(self, stem: str) -> str:
        """`stem` in the capital and small letters of a video that is there."""
        return stem if stem in self._by_stem else self._by_folded.get(stem.casefold(), stem)


def files_below(root: Path, suffixes: Collection[str]) -> Iterator[PurePosixPath]:
    """Paths below the root of everything whose name ends so, in order; hidden files and folders are left out."""
    for folder, _, files in _walk(root):
        for name in files:
            if PurePosixPath(name).suffix.lower() in suffixes:
                if not _is_utf8(_joined(folder, name)):
                    file = os.fsencode(root / folder / name)
                    raise DataError(f"the name of the file {file!r} is not UTF-8: rename it")
                yield PurePosixPath(_joined(folder, name))


def _walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """(relative folder, its folders, its files), sorted; links are followed, but not round in circles."""
    for name, folders, files in os.walk(root, onerror=_refuse_folder, followlinks=True):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and not _leads_back(Path(name) / n))
        relative = os.path.relpath(name, root).replace(os.sep, "/")
        yield "" if relative == "." else relative, folders, sorted(n for n in files if not n.startswith("."))


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _rank(file: str, folders: Sequence[str]) -> tuple[tuple[bool, ...], int, str]:
    way = file.split("/")[:-1]
    return tuple(folder not in way for folder in folders), len(way), file


def _refuse_folder(error: OSError) -> None:
    raise DataError(
        f"the folder {error.filename} cannot be read ({error.strerror}): change its permissions or move it away"
    ) from error


def _leads_back(folder: Path) -> bool:
    """Whether `folder` is a link to one of the folders on the way to it."""
    return folder.is_symlink() and folder.resolve() in {parent.resolve() for parent in folder.parents}


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
