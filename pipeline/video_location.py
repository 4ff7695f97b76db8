"""From a manifest's `video` to something that can be opened: a file, an object in a store, or a member of a tar."""

import logging
import os
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
_REQUESTS = 32
"""Requests to a store that are made at a time."""


@dataclass(frozen=True)
class TarVideo:
    """A video in a tar."""

    tar: Location
    member: str

    def __str__(self) -> str:
        return f"{self.tar}::{self.member}"


VideoSource = Path | Url | TarVideo | bytes
"""What can be opened as a video."""


def split_video(video: str) -> tuple[str, str | None]:
    """`folder/shard.tar::member` as its two parts; (video, None) for a file of its own."""
    tar, found, member = video.partition(_IN_TAR)
    return (tar + ".tar", member) if found else (video, None)


def video_at(data_root: Location, video: str) -> Path | Url | TarVideo:
    """Where a manifest's `video` lies: below the data root, or where its URL or absolute path says."""
    name, member = split_video(video)
    place = location(name) if is_url(name) else data_root / name
    return place if member is None else TarVideo(place, member)


def missing_videos(data_root: Location, videos: Iterable[str]) -> list[str]:
    """Those of `videos` that are not there, each once, in the order given.

    Indexes of tars are read, and stores are asked for lists, rather than for one video after the other.
    """
    places = {video: video_at(data_root, video) for video in videos}
    files = {video: place for video, place in places.items() if not isinstance(place, TarVideo)}
    tars: dict[Location, set[str]] = {}
    for place in places.values():
        if isinstance(place, TarVideo):
            tars.setdefault(place.tar, set())
    for tar, members in zip(tars, _each(_members, tars), strict=True):
        tars[tar] = members
    there = _there(set(files.values()))
    return [
        video
        for video, place in places.items()
        if (place.member not in tars[place.tar] if isinstance(place, TarVideo) else place not in there)
    ]


def is_video_file(data_root: Location, video: str) -> bool:
    """Whether a video is a file, an object or a member of a tar that can be read."""
    place = video_at(data_root, video)
    return place.member in _members(place.tar) if isinstance(place, TarVideo) else place.is_file()


def first_local(data_root: Location, videos: Iterable[str]) -> Path | None:
    """The first file on this machine (a video, or the tar that holds one) that is there."""
    for video in videos:
        place = video_at(data_root, video)
        file = place.tar if isinstance(place, TarVideo) else place
        if isinstance(file, Path) and file.is_file():
            return file
    return None


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


def _there(files: set[Path | Url]) -> set[Path | Url]:
    """Those of some files that exist."""
    # Path.exists raises for a name that is too long; os.path.exists says False.
    found: set[Path | Url] = {file for file in files if isinstance(file, Path) and os.path.exists(file)}
    urls = [file for file in files if isinstance(file, Url)]
    folders: dict[Url, list[Url]] = {}
    for url in urls:
        folders.setdefault(url.parent, []).append(url)
    for some in _each(_listed, folders.items()):
        found |= some
    return found


def _listed(entry: tuple[Url, list[Url]]) -> set[Url]:
    """Those of some objects of one folder that exist: single ones are asked for by name, many by one listing."""
    folder, urls = entry
    if len(urls) < _REQUESTS:
        return {url for url in urls if url.is_file()}
    names = folder.sizes_below()
    return {url for url in urls if url.name in names}


def _each(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results in order, from a few threads."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        yield from pool.map(work, items)
