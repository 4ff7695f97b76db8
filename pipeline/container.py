"""What the bytes of a file say about its container, without FFmpeg and without reading the payload.

FFmpeg decides by content what a file is, follows playlists to other files, and often does not notice that a file
has been cut short. These checks come first, and read headers only.
"""

import os
from typing import BinaryIO, Literal

Container = Literal["mp4", "matroska", "avi", "mpegts", "gif", "flv", "asf", "ogg", "mpeg"]
Kind = Literal[Container, "image", "playlist", "unknown"]

HEAD_BYTES = 4096
"""As many bytes from the start of a file as `sniff` wants to see."""

_PREFIXES: tuple[tuple[bytes, Kind], ...] = (
    (b"\x1a\x45\xdf\xa3", "matroska"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"FLV\x01", "flv"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (b"OggS", "ogg"),
    (b"\x00\x00\x01\xba", "mpeg"),
    (b"\x00\x00\x01\xb3", "mpeg"),
    (b"\xff\xd8\xff", "image"),  # JPEG
    (b"\x89PNG\r\n\x1a\n", "image"),
    (b"II*\x00", "image"),  # TIFF
    (b"MM\x00*", "image"),
    (b"8BPS", "image"),  # Photoshop
    (b"\x00\x00\x00\x0cjP  ", "image"),  # JPEG 2000
    (b"\x00\x00\x00\x0cJXL ", "image"),
)
_RIFF_KINDS: dict[bytes, Kind] = {b"AVI ": "avi", b"WEBP": "image"}
_TOP_BOXES = frozenset(
    (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"moof", b"styp", b"sidx")
)
_STILL_BRANDS = frozenset((b"heic", b"heix", b"mif1", b"avif"))
_SCRIPT_STARTS = (
    b"#extm3u",
    b"ffconcat",
    b"[playlist]",
    b"[reference]",
    b"<mpd",
    b"<smil",
    b"<asx",
    b"v=0\r\no=",
    b"v=0\no=",
)
_XML_SCRIPTS = (b"<mpd", b"<smil", b"<asx", b"<playlist", b"<smoothstreamingmedia", b"<compositionplaylist")


def sniff(head: bytes) -> Kind:
    """The kind of file that begins with these bytes (`HEAD_BYTES` of them, or the whole file if it is shorter)."""
    if head[:4] == b"RIFF":
        return _RIFF_KINDS.get(head[8:12], "unknown")
    if head[4:8] in _TOP_BOXES:
        return "image" if head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS else "mp4"
    for prefix, kind in _PREFIXES:
        if head.startswith(prefix):
            return kind
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "image"
    if _is_transport_stream(head):
        return "mpegts"
    return "playlist" if _names_other_files(head) else "unknown"


def is_truncated(file: BinaryIO) -> bool:
    """Whether the file surely ends inside an element of its container; False also means "cannot tell"."""
    file.seek(0)
    kind = sniff(file.read(HEAD_BYTES))
    size_bytes = file.seek(0, os.SEEK_END)
    match kind:
        case "mp4":
            return _mp4_is_cut(file, size_bytes)
        case "matroska":
            return _matroska_is_cut(file, size_bytes)
        case "avi":
            return _riff_is_cut(file, size_bytes)
        case _:
            return False


def _is_transport_stream(head: bytes) -> bool:
    """Sync bytes at two packets in a row: of 188 bytes, or of 192 (Blu-ray, cameras), which begin with a time."""
    return any(
        len(head) > start + packet and head[start] == 0x47 and head[start + packet] == 0x47
        for start, packet in ((0, 188), (4, 192))
    )


def _names_other_files(head: bytes) -> bool:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return text.startswith(_SCRIPT_STARTS) or (
        text.startswith((b"<?xml", b"<!--")) and any(tag in text for tag in _XML_SCRIPTS)
    )


def _read_at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)


def _mp4_is_cut(file: BinaryIO, size_bytes: int) -> bool:
    """Walk the boxes of the top level. What is no box (padding, junk behind the last one) ends the walk."""
    position = 0
    while position < size_bytes:
        header = _read_at(file, position, 16)
        name, length = header[4:8], int.from_bytes(header[:4], "big")
        if not any(header):  # padding
            return False
        if len(header) < 8:
            return True
        if not all(0x20 <= byte < 0x7F or byte == 0xA9 for byte in name) or length == 0:
            return False  # length 0: to the end of the file
        if length == 1:
            if len(header) < 16:
                return True
            length = int.from_bytes(header[8:16], "big")
        if length < 8:
            return False
        position += length
    return position > size_bytes


def _matroska_is_cut(file: BinaryIO, size_bytes: int) -> bool:
    """Walk the elements of the top level; one of unknown size (a live recording) is entered instead of skipped."""
    position = 0
    while position < size_bytes:
        header = _read_at(file, position, 12)
        id_bytes = _vint_bytes(header)
        length_bytes = _vint_bytes(header[id_bytes:]) if id_bytes else 0
        if not 0 < id_bytes <= 4 or length_bytes == 0:
            return position + len(header) == size_bytes and len(header) < 12 and any(header)
        if len(header) < id_bytes + length_bytes:
            return True
        length = int.from_bytes(header[id_bytes : id_bytes + length_bytes], "big")
        length -= 1 << (7 * length_bytes)  # the marker bit
        position += id_bytes + length_bytes
        if length != (1 << (7 * length_bytes)) - 1:
            position += length
    return position > size_bytes


def _vint_bytes(data: bytes) -> int:
    """Bytes of the EBML number that starts here, 0 if none does."""
    return 9 - data[0].bit_length() if data and data[0] else 0


def _riff_is_cut(file: BinaryIO, size_bytes: int) -> bool:
    """Walk the RIFF chunks. Eight bytes too many are forgiven: writers that count the chunk's own header."""
    position = 0
    while position < size_bytes:
        header = _read_at(file, position, 8)
        length = int.from_bytes(header[4:8], "little")
        if header[:4] != b"RIFF" or length in (0, 0xFFFFFFFF):
            return False  # junk behind the last chunk, or a size never filled in
        position += 8 + length + length % 2
    return position > size_bytes + 8
