"""What is said of a file by its bytes alone."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from vivit.pipeline.container import HEAD_BYTES, is_truncated, sniff

CUT = {
    "avi_cut60.avi",
    "faststart_cut60.mp4",
    "faststart_cut_in_first_frame.mp4",
    "faststart_last_100_bytes_missing.mp4",
    "fragmented_cut60.mp4",
    "mkv_cut60.mkv",
    "moov_at_end_cut60.mp4",
}
KINDS = {
    ".mp4": "mp4",
    ".mov": "mp4",
    ".mkv": "matroska",
    ".webm": "matroska",
    ".avi": "avi",
    ".ts": "mpegts",
    ".gif": "gif",
}
OTHER_KINDS = {
    "ffconcat_script.mp4": "playlist",
    "hls_playlist.mp4": "playlist",
    "html_error_page.mp4": "unknown",
    "random_bytes.mp4": "unknown",
    "real_jpeg_named.mp4": "image",
    "text_renamed.mp4": "unknown",
    "zero_byte.mp4": "unknown",
}


def videos_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix in KINDS]


@pytest.mark.parametrize("folder", ["videos", "bad_videos"])
def test_every_real_file_is_known_by_its_first_bytes(shared: Callable[[str], Path], folder: str) -> None:
    for path in videos_in(shared(folder)):
        with path.open("rb") as file:
            assert sniff(file.read(HEAD_BYTES)) == OTHER_KINDS.get(path.name, KINDS[path.suffix]), path.name


@pytest.mark.parametrize("folder", ["videos", "bad_videos"])
def test_files_that_were_cut_are_found_and_no_others(shared: Callable[[str], Path], folder: str) -> None:
    paths = videos_in(shared(folder))
    found = {path.name for path in paths if is_truncated(io.BytesIO(path.read_bytes()))}
    assert found == CUT & {path.name for path in paths}


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\xef\xbb\xbf \n#EXTM3U\n", "playlist"),
        (b"ffconcat version 1.0\n", "playlist"),
        (b'<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash">', "playlist"),
        (b"[playlist]\nFile1=a.mp4", "playlist"),
        (b"v=0\r\no=- 0 0 IN IP4 127.0.0.1", "playlist"),
        (b'<?xml version="1.0"?><note/>', "unknown"),
        (b"\x89PNG\r\n\x1a\n", "image"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "image"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", "unknown"),
        (b"\x00\x00\x00\x18ftypheic", "image"),
        (b"\x00\x00\x00\x18ftypisom", "mp4"),
        (b"OggS\x00", "ogg"),
        (b"FLV\x01\x05", "flv"),
        (b"G" + bytes(187) + b"G" + bytes(20), "mpegts"),
        (bytes(4) + b"G" + bytes(191) + b"G" + bytes(20), "mpegts"),
        (b"Good morning", "unknown"),
        (b"", "unknown"),
    ],
)
def test_first_bytes_tell_the_kind(head: bytes, kind: str) -> None:
    assert sniff(head) == kind


FTYP = struct.pack(">I4s8x", 16, b"ftyp")
EBML = b"\x1a\x45\xdf\xa3\x84" + bytes(4)
SEGMENT = b"\x18\x53\x80\x67"


WALKS = {
    "mp4 whole": (FTYP + struct.pack(">I4s4x", 12, b"mdat"), False),
    "mp4 cut in a payload": (FTYP + struct.pack(">I4s4x", 13, b"mdat"), True),
    "mp4 cut in a header": (FTYP + b"\x00\x00\x01", True),
    "mp4 64 bit whole": (FTYP + struct.pack(">I4sQ4x", 1, b"mdat", 20), False),
    "mp4 64 bit cut": (FTYP + struct.pack(">I4sQ4x", 1, b"mdat", 1 << 33), True),
    "mp4 to the end": (FTYP + struct.pack(">I4s9x", 0, b"mdat"), False),
    "mp4 padded with zeros": (FTYP + bytes(5000), False),
    "mp4 with junk behind": (FTYP + bytes(range(240, 256)) * 3, False),
    "matroska whole": (EBML + SEGMENT + b"\x84" + bytes(4), False),
    "matroska cut": (EBML + SEGMENT + b"\x85" + bytes(4), True),
    "matroska 8 byte size cut": (EBML + SEGMENT + b"\x01\x00\x00\x00\x00\x01\x00\x00" + bytes(9), True),
    "matroska live": (EBML + SEGMENT + b"\xff" + b"\x1f\x43\xb6\x75\xff" + b"\xa3\x84" + bytes(4), False),
    "matroska live cut in a block": (
        EBML + SEGMENT + b"\xff" + b"\x1f\x43\xb6\x75\xff" + b"\xa3\x84\x00",
        True,
    ),
    "avi whole": (struct.pack("<4sI4s6x", b"RIFF", 10, b"AVI "), False),
    "avi of two parts, cut": (
        struct.pack("<4sI4s6x4sI4s", b"RIFF", 10, b"AVI ", b"RIFF", 100, b"AVIX"),
        True,
    ),
    "avi that counts its own header": (struct.pack("<4sI4s6x", b"RIFF", 18, b"AVI "), False),
    "avi never finished": (struct.pack("<4sI4s6x", b"RIFF", 0, b"AVI "), False),
    "no container": (b"Good morning", False),
    "empty": (b"", False),
}


@pytest.mark.parametrize("case", WALKS)
def test_the_walk_over_the_elements_tells_cut_from_whole(case: str) -> None:
    data, is_cut = WALKS[case]
    assert is_truncated(io.BytesIO(data)) is is_cut


@pytest.mark.parametrize("name", ["faststart_cut60.mp4", "mkv_cut60.mkv", "avi_cut60.avi"])
def test_no_prefix_of_a_file_breaks_the_walk(shared: Callable[[str], Path], name: str) -> None:
    data = shared(f"bad_videos/{name}").read_bytes()
    for length in range(0, 600, 7):
        is_truncated(io.BytesIO(data[:length]))
