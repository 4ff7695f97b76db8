"""Where the bytes of each member of a tar lie, so that it is read by offset and never extracted.

`vivit pack` writes the index of a tar beside it. That of a tar by others is made by one walk over its headers, and kept
in the user's cache folder. The format is in docs/webdataset.md.
"""

import hashlib
import json
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar, cast

from vivit.pipeline.byte_file import FilePart, StoreFile, open_regular
from vivit.pipeline.errors import StorageError
from vivit.pipeline.storage import Location, Url
from vivit.pipeline.tar_walk import BLOCK_BYTES, TarContent, TarMember, is_header_of, walk
from vivit.pipeline.workspace import user_caches, write_atomically

logger = logging.getLogger(__name__)

Place = TypeVar("Place", Path, Url, Path | Url)

FORMAT = 1
INDEX_SUFFIX = ".index.json"
"""Behind the name of the tar."""
FOLDER_VARIABLE = "VIVIT_TAR_INDEXES"
"""Names the folder of the indexes of tars that have none beside them."""
_COLUMNS = ("name", "key", "extension", "offset", "size_bytes", "sha256")
_KEPT_IN_MEMORY = 256
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)


class NotInTarError(Exception):
    """A tar has no member of a name that can be read."""

    def __init__(self, tar: Location, name: str, reason: str | None) -> None:
        super().__init__(f"{reason or 'no such member'}: {name} in {tar}")
        self.is_there = reason is not None
        """Whether there is a member of that name."""


def split_name(name: str) -> tuple[str | None, str | None]:
    """Key and extension of a member as in the webdataset library: cut at the first dot of the base name."""
    found = _KEY.fullmatch(name)
    return (found[1], found[2]) if found else (None, None)


@dataclass(frozen=True)
class TarIndex:
    """The members of one tar, as of a state of it."""

    content: TarContent
    size_bytes: int
    """Of the tar."""
    version: str | None = None
    """Time of the last change in ns, or a store's name of the version; None in the index beside a tar, to copy both."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What the writer of the tar says of it."""
    is_stored: bool = False
    """Whether it was read from a file."""

    @cached_property
    def members(self) -> dict[str, TarMember]:
        """The files that can be read, by name, in the order of the tar."""
        return {member.name: member for member in self.content.members}

    @cached_property
    def refused(self) -> dict[str, str]:
        """Why members are not read, by name."""
        return dict(self.content.refused)

    def to_json(self, name: str) -> bytes:
        """The index as a file, one line for each member; `name` is that of the tar."""
        head = {
            "format": FORMAT,
            "tar": name,
            "size_bytes": self.size_bytes,
            "version": self.version,
            "damage": self.content.damage,
            "about": dict(self.about),
            "refused": [list(pair) for pair in self.content.refused],
            "columns": _COLUMNS,
        }
        rows = [[m.name, *split_name(m.name), m.offset, m.size_bytes, m.sha256] for m in self.content.members]
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        start = json.dumps(head, ensure_ascii=False, indent=1).removesuffix("\n}")
        return f'{start},\n "members": [\n{lines}\n ]\n}}\n'.encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises ValueError where the data are not an index of this format."""
        try:
            stored = json.loads(data)
            if stored["format"] != FORMAT:
                raise ValueError(f"format {stored['format']!r}")
            rows = [dict(zip(stored["columns"], row, strict=True)) for row in stored["members"]]
            members = [TarMember(r["name"], r["offset"], r["size_bytes"], r["sha256"]) for r in rows]
            if any(m.offset < BLOCK_BYTES or m.size_bytes < 0 for m in members):
                raise ValueError("a member lies outside the tar")
            content = TarContent(members, [(n, why) for n, why in stored["refused"]], stored["damage"])
            return cls(content, stored["size_bytes"], stored["version"], stored["about"], is_stored=True)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not an index: {error!r}") from error


def index_path(tar: Place) -> Place:
    """Where the index of a tar lies that has one beside it."""
    return tar.with_name(tar.name + INDEX_SUFFIX)


def tar_index(tar: Location) -> TarIndex:
    """The index of a tar as it is now: from memory, from a file, or from the headers of the tar.

    FileNotFoundError where there is no such tar, DataError where it cannot be read as one.
    """
    return _INDEXES.get(tar)


def open_member(tar: Location, name: str) -> BinaryIO:
    """A member of a tar as a file; NotInTarError where it has none of that name that can be read.

    FileNotFoundError, DataError as of `tar_index`.
    """
    file = _open_found(tar, tar_index(tar), name)
    if file is None:
        logger.info("the index of %s is out of date: its headers are read again", tar)
        index = _INDEXES.renew(tar)
        file = _open_found(tar, index, name)
        if file is None:  # headers that contradict each other: what the walk found counts
            _INDEXES.trust(tar)
            file = _open_found(tar, index, name)
    assert file is not None
    return cast(BinaryIO, file)


def read_member(tar: Location, name: str) -> bytes:
    """All bytes of a member; errors as of `open_member`."""
    with open_member(tar, name) as file:
        return file.read()


def _open_found(tar: Location, index: TarIndex, name: str) -> FilePart | StoreFile | None:
    """The member as a file, None where it does not have its header in front of it: the index is of another tar."""
    member = index.members.get(name)
    if member is None:
        raise NotInTarError(tar, name, index.refused.get(name))
    file = _open_part(tar, member.offset - BLOCK_BYTES, BLOCK_BYTES + member.size_bytes)
    if not _INDEXES.trusts(tar) and not is_header_of(_first_block(file), member):
        file.close()
        return None
    file.drop_front(BLOCK_BYTES)
    return file


def _first_block(file: FilePart | StoreFile) -> bytes:
    try:
        return file.read(BLOCK_BYTES) or b""
    except OSError:  # the object is shorter
        return b""


class _Indexes:
    """The indexes of tars that were used last, each made once however many threads ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[Location, threading.Lock] = {}
        self._known: OrderedDict[Location, TarIndex] = OrderedDict()
        self._trusted: set[Location] = set()

    def get(self, tar: Location) -> TarIndex:
        """The index; that of a file on this machine is made again when the file was written to."""
        with self._lock_of(tar):
            known = self._known.get(tar)
            if known is not None and not isinstance(tar, Path):
                return known
            state = _state(tar)
            if known is None or state != (known.size_bytes, known.version):
                known = _stored(tar, *state) or _walked(tar, *state)
            self._keep(tar, known)
            return known

    def renew(self, tar: Location) -> TarIndex:
        """The index from the headers of the tar."""
        with self._lock_of(tar):
            index = _walked(tar, *_state(tar))
            self._keep(tar, index)
            return index

    def trust(self, tar: Location) -> None:
        """Let the index of a tar count for more than the header in front of a member."""
        self._trusted.add(tar)

    def trusts(self, tar: Location) -> bool:
        return tar in self._trusted

    def _lock_of(self, tar: Location) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(tar, threading.Lock())

    def _keep(self, tar: Location, index: TarIndex) -> None:
        with self._lock:
            self._known[tar] = index
            self._known.move_to_end(tar)
            while len(self._known) > _KEPT_IN_MEMORY:
                self._known.popitem(last=False)


_INDEXES = _Indexes()


def _state(tar: Location) -> tuple[int, str | None]:
    """Size and version."""
    if isinstance(tar, Path):
        about = os.stat(tar)
        return about.st_size, str(about.st_mtime_ns)
    return tar.state()


def _stored(tar: Location, size_bytes: int, version: str | None) -> TarIndex | None:
    """The index of this state of the tar from a file: beside it, or in the cache folder."""
    for path_of in (index_path, _cached_path):
        path: Location = path_of(tar)
        try:
            index = TarIndex.from_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (ValueError, PermissionError, StorageError) as error:
            # StorageError: a store that may not be listed answers 403 where there is no object.
            logger.warning("the index %s is not used (%s)", path, error)
            continue
        if index.size_bytes == size_bytes and index.version in (None, version):
            return replace(index, version=version)
        logger.info("the index %s is out of date: %s was written to since", path, tar)
    return None


def _walked(tar: Location, size_bytes: int, version: str | None) -> TarIndex:
    """The index of a tar from its headers, kept in the cache folder."""
    with _open_part(tar, 0, size_bytes) as file:
        content = walk(cast(BinaryIO, file), size_bytes, str(tar))
    index = TarIndex(content, size_bytes, version)
    path = _cached_path(tar)
    try:
        write_atomically(path, index.to_json(tar.name))
    except OSError as error:
        logger.debug("the index of %s is not kept: %s", tar, error)
    return index


def _cached_path(tar: Location) -> Path:
    """Where the index of a tar is kept that has none beside it."""
    folder = Path(os.environ.get(FOLDER_VARIABLE) or user_caches() / "tar-indexes")
    return folder / f"{hashlib.sha256(os.fsencode(str(tar.absolute()))).hexdigest()[:32]}.json"


def _open_part(tar: Location, start: int, size_bytes: int) -> FilePart | StoreFile:
    """A part of a tar as a file."""
    if isinstance(tar, Path):
        return FilePart(open_regular(tar), start, size_bytes)
    return StoreFile(tar, start, size_bytes)
