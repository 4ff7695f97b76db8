"""What a tar holds, read from its headers in one walk: nothing is extracted, and no link is followed."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO

from vivit.pipeline.errors import DataError

BLOCK_BYTES = 512
"""Unit of a tar: each header is one, and the data of each member fill whole ones."""
ENDS_INSIDE = "the tar ends inside it"
"""Why the last member of a tar that was cut short is not read."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_PROGRAMS = {"gzip": "gunzip", "bzip2": "bunzip2", "xz": "unxz", "zstd": "unzstd"}
_SUFFIXES = {"gzip": ".gz", "bzip2": ".bz2", "xz": ".xz", "zstd": ".zst"}
_NEVER_READ = {
    tarfile.LNKTYPE: "hard link: links are never followed",
    tarfile.SYMTYPE: "symlink: links are never followed",
    tarfile.CHRTYPE: "character device",
    tarfile.BLKTYPE: "block device",
    tarfile.FIFOTYPE: "FIFO: opening one blocks for ever",
}


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in a tar."""

    name: str
    offset: int
    """Of its first byte in the tar."""
    size_bytes: int
    sha256: str | None = None
    """Of its bytes, where the tar's writer told."""


@dataclass
class TarContent:
    """What a walk over the headers of a tar found."""

    members: list[TarMember] = field(default_factory=list)
    """The files that can be read, in the order of the tar; no two have the same name."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of each member that is not read."""
    damage: str = ""
    """Why the tar does not go on after these members; empty where it is whole."""


def walk(file: BinaryIO, size_bytes: int, name: str) -> TarContent:
    """The content of a tar of `size_bytes`; `name` is used in messages. DataError where it is no tar, or compressed.

    A tar that was cut short gives the members that are whole. Missing end blocks are no damage: many writers leave
    them out.
    """
    _check_start(file, name)
    content, names, links = TarContent(), set[str](), set[str]()
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            for info in _headers(tar, name):
                readable = _utf8(info.name)
                reason = _why_not(info, size_bytes, links, names)
                if info.issym() or info.islnk():
                    links.add(info.name)
                if reason:
                    content.refused.append((readable, reason))
                elif info.isreg():
                    names.add(info.name)
                    content.members.append(TarMember(info.name, info.offset_data, info.size))
            content.damage = _damage_at(file, tar.offset)
    except tarfile.TarError as error:
        if not content.members and not content.refused:
            raise DataError(f"{name} cannot be read as a tar: {error}") from error
        content.damage = f"cut short: {error}"
    return content


def is_header_of(block: bytes, member: TarMember) -> bool:
    """Whether the 512 bytes in front of a member's data are its header."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    # a long name, one that is not ASCII, and a size from 8 GiB on may stand in another header
    is_short = member.name.isascii() and len(member.name) < tarfile.LENGTH_NAME
    has_size = info.size == member.size_bytes or member.size_bytes >= 8 << 30
    return info.isreg() and has_size and (info.name == member.name or not is_short)


def _check_start(file: BinaryIO, name: str) -> None:
    file.seek(0)
    head = file.read(6)
    file.seek(0)
    if not head:
        raise DataError(f"{name} is an empty file, which is no tar")
    kind = next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), None)
    if kind is not None:
        packed = name.removesuffix(_SUFFIXES[kind]) + _SUFFIXES[kind]
        rename = "" if packed == name else f"mv {name} {packed} && "
        raise DataError(
            f"{name} is compressed ({kind}), so no member can be read by its offset: {rename}{_PROGRAMS[kind]} {packed}"
        )


def _headers(tar: tarfile.TarFile, name: str) -> Iterator[tarfile.TarInfo]:
    """The members in order, without keeping them."""
    before = -1
    while (info := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # it would hold all of them
        if info.size < 0 or tar.offset <= before:
            raise tarfile.ReadError(f"the header at byte {info.offset} has a negative size")
        before = tar.offset
        yield info


def _damage_at(file: BinaryIO, offset: int) -> str:
    """What is wrong with the end of a tar whose headers stop here."""
    file.seek(offset)
    block = file.read(BLOCK_BYTES)
    if not any(block):  # the end blocks, or none at all
        return ""
    if len(block) < BLOCK_BYTES:
        return f"cut short: the header at byte {offset} is not whole"
    return f"damaged: what stands at byte {offset} is no header, so members after it are lost"


def _why_not(info: tarfile.TarInfo, size_bytes: int, links: set[str], names: set[str]) -> str:
    """Why a member is not read; empty where it is, and for a folder."""
    if info.type in _NEVER_READ:
        return _NEVER_READ[info.type]
    if info.isdir():
        return ""
    path = PurePosixPath(info.name)
    if not info.isreg():
        return f"member of the unknown type {info.type!r}"
    if info.issparse():
        return "sparse file: its bytes do not lie in one piece"
    if path.is_absolute():
        return "absolute path"
    if ".." in path.parts:
        return "path leaves the folder"
    if any(str(parent) in links for parent in path.parents):
        return "through a symlink"
    if _utf8(info.name) != info.name:
        return "the name is not UTF-8"
    if info.offset_data + info.size > size_bytes:
        return ENDS_INSIDE
    if info.name in names:
        return "the name stands twice: the first one counts"
    return ""


def _utf8(name: str) -> str:
    """The name with what is not UTF-8 as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()
