"""From a manifest's `video` to something that can be opened: a file, an object in a store, or a member of a tar."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vivit.pipeline.errors import DataError
from vivit.pipeline.storage import Location, Url, is_url, location
from vivit.pipeline.tar_index import tar_index

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

_IN_TAR = ".tar::"
"""Ends the name of a tar, and a member's name follows."""
_FRAMES = "::frames@"
"""Behind a folder or tar of frames; their rate follows."""
_REQUESTS = 32
"""Requests to a store that are made at a time."""


@dataclass(frozen=True)
class TarVideo:
    """A video in a tar."""

    tar: Location
    member: str

    def __str__(self) -> str:
        return f"{self.tar}::{self.member}"


@dataclass(frozen=True)
class FrameSource:
    """A video as JPEG or PNG frames in a folder or a tar, numbered from 1, at a fixed rate."""

    place: Location
    """The folder, or the tar."""
    rate: float
    """Frames a second."""

    def __str__(self) -> str:
        return frames_name(str(self.place), self.rate)


VideoSource = Path | Url | TarVideo | FrameSource | bytes
"""What can be opened as a video."""


def frames_name(place: str, rate: float) -> str:
    """The manifest's `video` of frames in a folder or tar: `P01/rgb_frames/P01_01.tar::frames@60`."""
    return f"{place}{_FRAMES}{rate:g}"


def split_frames(video: str) -> tuple[str, float] | None:
    """Folder or tar, and frames a second, of what `frames_name` made; None for any other video."""
    place, found, rate = video.rpartition(_FRAMES)
    return (place, float(rate)) if found and re.fullmatch(r"\d+(\.\d+)?", rate) and float(rate) > 0 else None


def split_video(video: str) -> tuple[str, str | None]:
    """`folder/shard.tar::member` as its two parts; (video, None) for a file of its own."""
    tar, found, member = video.partition(_IN_TAR)
    return (tar + ".tar", member) if found else (video, None)


def video_at(data_root: Location, video: str) -> Path | Url | TarVideo | FrameSource:
    """Where a manifest's `video` lies: below the data root, or where its URL or absolute path says."""
    if (frames := split_frames(video)) is not None:
        return FrameSource(_place(data_root, frames[0]), frames[1])
    name, member = split_video(video)
    return _place(data_root, name) if member is None else TarVideo(_place(data_root, name), member)


def _place(data_root: Location, name: str) -> Location:
    return location(name) if is_url(name) else data_root / name


def missing_videos(data_root: Location, videos: Iterable[str]) -> list[str]:
    """Those of `videos` that are not there, each once, in the order given.

    Indexes of tars are read, and folders and stores are asked for lists, rather than for one video after the other.
    """
    places = {video: video_at(data_root, video) for video in videos}
    tars: dict[Location, set[str]] = {}
    for place in places.values():
        if isinstance(place, TarVideo):
            tars.setdefault(place.tar, set())
    for tar, members in zip(tars, _each(_members, tars), strict=True):
        tars[tar] = members
    there = _there({_file_of(place) for place in places.values() if not isinstance(place, TarVideo)})
    return [
        video
        for video, place in places.items()
        if (
            place.member not in tars[place.tar]
            if isinstance(place, TarVideo)
            else _file_of(place) not in there
        )
    ]


def is_video_file(data_root: Location, video: str) -> bool:
    """Whether a video is a file, an object, a member of a tar that can be read, or frames."""
    place = video_at(data_root, video)
    if isinstance(place, FrameSource):
        return place.place.exists()
    return place.member in _members(place.tar) if isinstance(place, TarVideo) else place.is_file()


def first_local(data_root: Location, videos: Iterable[str]) -> Path | None:
    """The first file on this machine (a video, or the tar that holds one) that is there."""
    for video in videos:
        file = _file_of(video_at(data_root, video))
        if isinstance(file, Path) and file.is_file():
            return file
    return None


def _file_of(place: Path | Url | TarVideo | FrameSource) -> Location:
    """The file or folder that holds a video."""
    if isinstance(place, TarVideo):
        return place.tar
    return place.place if isinstance(place, FrameSource) else place


def _members(tar: Location) -> set[str]:
    """Names of the members that can be read; none where the tar is missing or none, after a warning."""
    try:
        return set(tar_index(tar).members)
    except DataError as error:
        logger.warning("%s", error)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            logger.warning("%s cannot be read: %s", tar, error.strerror or error)
    return set()


def _there(files: set[Location]) -> set[Location]:
    """Those of some files that exist."""
    folders: dict[Location, list[Location]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file)
    found: set[Location] = set()
    for some in _each(_listed, folders.items()):
        found |= some
    return found


def _listed(entry: tuple[Location, list[Location]]) -> set[Location]:
    """Those of some files of one folder that exist: single ones are asked for by name, many by one listing."""
    folder, files = entry
    if isinstance(folder, Path):
        names = _names_in(folder) if len(files) >= _REQUESTS else None
        # Path.exists raises for a name that is too long; os.path.exists says False.
        if names is None:
            return {file for file in files if isinstance(file, Path) and os.path.exists(file)}
        return {file for file in files if file.name in names}
    if len(files) < _REQUESTS:
        return {file for file in files if file.is_file()}
    objects = folder.sizes_below()
    return {file for file in files if file.name in objects}


def _names_in(folder: Path) -> set[str] | None:
    """Names of what is in a folder and, if it is a link, leads somewhere; None where the folder cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not entry.is_symlink() or os.path.exists(entry.path)}
    except FileNotFoundError:
        return set()
    except OSError:
        return None


def _each(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results in order, from a few threads."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        yield from pool.map(work, items)
