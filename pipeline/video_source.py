"""From a source to an open container and its video stream, with all checks that come before decoding.

FFmpeg is given an open regular file, never a name, and no file that could make it open others.
"""

import io
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import av
import av.error
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

from vivit.pipeline.byte_file import NotRegularError, StoreFile, open_regular
from vivit.pipeline.container import HEAD_BYTES, is_truncated, sniff
from vivit.pipeline.errors import DataError
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.storage import Url
from vivit.pipeline.tar_index import NotInTarError, open_member
from vivit.pipeline.video_location import FrameSource, TarVideo, VideoSource

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,gif,flv,asf,ogg,mpeg"
"""The demuxers that may open a file: none of them follows names of other files."""


class Failure(Exception):
    """The whole video cannot be read."""

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.message = message


class Stopped(Exception):
    """The caller's stop event is set."""


def _now() -> float:
    return time.monotonic()


@dataclass(frozen=True)
class Limit:
    """When to give up."""

    timeout_sec: float
    stop: threading.Event = field(default_factory=threading.Event)
    started: float = field(default_factory=_now)
    clock: Callable[[], float] = _now
    """What time is told by; that of a video in a store stands still while its bytes are waited for."""

    def check_stop(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def check_opening(self) -> None:
        """Opening and scanning serve all clips, and so the limit of one clip holds for both together."""
        self.check_stop()
        if self.clock() - self.started > self.timeout_sec:
            raise Failure(Outcome.TIMEOUT, f"reading the packets took more than {self.timeout_sec:g} s")


def source_name(source: VideoSource) -> str:
    """What messages call it."""
    return f"video of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def open_source(source: VideoSource) -> BinaryIO:
    """A seekable file of a regular file, an object in a store, a member of a tar, or bytes.

    A store that cannot be reached is no failure of the video: that stays a StorageError.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, FrameSource):
        raise Failure(Outcome.NOT_A_VIDEO, f"frames, not a video file: {source}")
    try:
        if isinstance(source, Path):
            return open_regular(source)
        if isinstance(source, Url):
            return cast(BinaryIO, StoreFile(source))
        return open_member(source.tar, source.member)
    except FileNotFoundError as error:
        what = source.tar if isinstance(source, TarVideo) else source
        raise Failure(Outcome.MISSING, f"no such file: {what}") from error
    except NotRegularError as error:
        raise Failure(Outcome.NOT_A_VIDEO, f"not a regular file: {source}") from error
    except OSError as error:
        raise Failure(Outcome.UNREADABLE, str(error)) from error
    except NotInTarError as error:
        raise Failure(Outcome.UNREADABLE if error.is_there else Outcome.MISSING, str(error)) from error
    except DataError as error:
        raise Failure(Outcome.UNREADABLE_CONTAINER, str(error)) from error


def check_file(file: BinaryIO) -> tuple[bool, bool]:
    """Whether the file begins like a known container, and whether it is cut short.

    Raises where FFmpeg is better not asked.
    """
    try:
        head = file.read(HEAD_BYTES)
        if not head:
            raise Failure(Outcome.EMPTY_FILE, "the file has no bytes")
        kind = sniff(head)
        if kind == "playlist":
            raise Failure(Outcome.PLAYLIST_OR_SCRIPT, "a playlist or script, which names other files")
        if kind == "image":
            raise Failure(Outcome.NOT_A_VIDEO, "an image")
        return kind != "unknown", is_truncated(file)
    except OSError as error:
        raise Failure(Outcome.UNREADABLE, str(error)) from error


def open_container(file: BinaryIO, *, is_known: bool) -> InputContainer:
    """FFmpeg's view of the file; `is_known`: it begins like a known container, so that a refusal means damage."""
    file.seek(0)
    try:
        return av.open(
            file, mode="r", container_options={"format_whitelist": _FORMATS}, metadata_errors="replace"
        )
    except av.error.FFmpegError as error:
        outcome = Outcome.UNREADABLE_CONTAINER if is_known else Outcome.NOT_A_VIDEO
        raise Failure(outcome, error.strerror or str(error)) from error
    except OSError as error:
        raise Failure(Outcome.UNREADABLE, str(error)) from error


def first_video_stream(container: InputContainer) -> VideoStream:
    """The first video stream that is not a cover or thumbnail. Not the "best": that depends on the others."""
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    stream = next((s for s in container.streams.video if not s.disposition & pictures), None)
    if stream is None:
        raise Failure(Outcome.NO_VIDEO_STREAM, "there is no video stream")
    if stream.codec_context is None:
        raise Failure(Outcome.NO_VIDEO_STREAM, "this FFmpeg has no decoder for the video stream")
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all
    # Threads inside a video cost more than they bring, and frame threads can hang for ever on corrupt packets.
    stream.codec_context.thread_count = 1
    return stream
