"""From a manifest's `video` to something that can be opened: a file, an object in a store, or a member of a tar."""

import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
    in_tars: dict[str, list[tuple[str, str]]] = {}
    in_folders: dict[str, list[tuple[str, str]]] = {}
    unique = dict.fromkeys(videos)
    for video in unique:
        frames = split_frames(video)
        file, member = (frames[0], None) if frames else split_video(video)
        if member is None:
            folder, slash, name = file.rpartition("/")
            in_folders.setdefault(folder + slash, []).append((video, name))
        else:
            in_tars.setdefault(file, []).append((video, member))
    there: set[str] = set()
    for found in _each(partial(_in_tar, data_root), in_tars.items()):
        there |= found
    for found in _each(partial(_in_folder, data_root), in_folders.items()):
        there |= found
    return [video for video in unique if video not in there]


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


def _in_tar(data_root: Location, entry: tuple[str, list[tuple[str, str]]]) -> set[str]:
    """Those of some videos, given with their members, that are in a tar."""
    tar, videos = entry
    members = _members(_place(data_root, tar))
    return {video for video, member in videos if member in members}


def _in_folder(data_root: Location, entry: tuple[str, list[tuple[str, str]]]) -> set[str]:
    """Those of some videos of one folder, given with their names, that exist.

    Single ones are asked for by name, many by one listing.
    """
    name, videos = entry
    names: Collection[str] | None = None
    if len(videos) >= _REQUESTS:
        folder = _place(data_root, name)
        names = _names_in(folder) if isinstance(folder, Path) else folder.sizes_below()
    if names is not None:
        return {video for video, file in videos if file in names}
    return {video for video, file in videos if _exists(_place(data_root, name + file))}


def _exists(file: Location) -> bool:
    # Path.exists raises for a name that is too long; os.path.exists says False.
    return os.path.exists(file) if isinstance(file, Path) else file.is_file()


def _names_in(folder: Path) -> set[str] | None:
    """Names of what is in a folder and, if it is a link, leads somewhere; None where the folder cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not entry.is_symlink() or os.path.exists(entry.path)}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return None


def _each(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results in order, from a few threads."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        yield from pool.map(work, items)
