"""An open video, and forward decoding of it from any key frame."""

import contextlib
import itertools
from collections.abc import Hashable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Self

import av.error
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vivit.pipeline.byte_file import StoreFile, identity_of
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.video_location import VideoSource
from vivit.pipeline.video_source import (
    Failure,
    Limit,
    check_file,
    first_video_stream,
    open_container,
    open_source,
)
from vivit.pipeline.video_timeline import Scan, scan_packets

_SEEK_FROM_PACKETS = 64
"""A jump over fewer packets reads through them: cheaper than a seek."""


_SCANS: dict[tuple[Hashable, ...], tuple[Scan, bool]] = {}
_SCANS_KEPT = 8


class OpenVideo:
    """An open video, its first real video stream, and what its packets promise."""

    def __init__(self, source: VideoSource, limit: Limit) -> None:
        self.limit = limit
        with contextlib.ExitStack() as cleanup:
            self._file = cleanup.enter_context(open_source(source))
            if isinstance(self._file, StoreFile):
                self.limit = replace(limit, clock=self._file.clock)
            cleanup.push(self._blame_store)
            self._is_known, is_cut = check_file(self._file)
            self.container = open_container(self._file, is_known=self._is_known)
            cleanup.callback(self._close_container)
            self.stream = first_video_stream(self.container)
            self.scan, is_readable = self._scan()
            self.is_truncated = is_cut or not is_readable
            self._resources = cleanup.pop_all()

    def _scan(self) -> tuple[Scan, bool]:
        """The scan of this very file, remembered: the clips of a long video are read in several passes."""
        key = identity_of(self._file)
        if key is not None and (known := _SCANS.get(key)) is not None:
            return known
        result = scan_packets(self.container, self.stream, self.limit)
        self.check_store()
        if key is not None:
            _SCANS[key] = result
            for old in list(_SCANS)[:-_SCANS_KEPT]:
                _SCANS.pop(old, None)
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.__exit__(kind, error, trace)

    def check_store(self) -> None:
        """Raise the StorageError of the store where it failed: what was read of the video since is void."""
        if isinstance(self._file, StoreFile):
            self._file.check()

    def _blame_store(self, kind: type[BaseException] | None, *_: object) -> None:
        """On the way out with an error that a failing store has caused, put the store's in its place."""
        if kind is not None and issubclass(kind, Exception):
            self.check_store()

    def packets_from(self, ordinal: int) -> "Iterator[Packet[VideoStream]]":
        """The stream's packets from the one of this number or an earlier one, with a decoder that knows nothing."""
        if self.scan.can_seek and (packets := self._seek(ordinal)) is not None:
            return packets
        self.reopen()
        return self.container.demux(self.stream)

    def reopen(self) -> None:
        """Start with a new decoder: how one conceals damage depends on all that it has decoded before."""
        self._close_container()
        self.container = open_container(self._file, is_known=self._is_known)
        self.stream = first_video_stream(self.container)

    def _seek(self, ordinal: int) -> "Iterator[Packet[VideoStream]] | None":
        """The packets from this one or an earlier one on, None if the demuxer does not find it."""
        try:
            self.container.seek(self.scan.seek_times[ordinal], stream=self.stream)
            packets = self.container.demux(self.stream)
            first = next(packets, None)
        except av.error.FFmpegError:
            return None
        except OSError as error:
            raise Failure(Outcome.UNREADABLE, str(error)) from error
        if first is None or self.scan.ordinals.get(first.pts, ordinal + 1) > ordinal:
            return None
        return itertools.chain([first], packets)

    def _close_container(self) -> None:
        self.container.close()


class Reader:
    """Decodes packets one by one, forward from a key frame. A packet that cannot be decoded is noted and skipped."""

    def __init__(self, video: OpenVideo, start: int = 0) -> None:
        self._video = video
        self._packets = video.packets_from(start)
        self.start = start
        """The packet from which it decodes; those before it are dropped."""
        self.ordinal = -1
        """The packet last read."""
        self.damaged: list[int] = []
        """Packets that could not be read or decoded."""

    def jump(self, ordinal: int) -> None:
        """Go on decoding at a later key frame; what the decoder still holds is dropped."""
        if ordinal - self.ordinal > _SEEK_FROM_PACKETS:
            self._packets = self._video.packets_from(ordinal)
        self._video.stream.codec_context.flush_buffers()
        self.start = ordinal

    def steps(self) -> Iterator[list[VideoFrame]]:
        """The frames that each packet brings, and at the end those that the decoder still holds."""
        while (packet := self._next()) is not None:
            yield self._decode(packet) if packet.size and self.ordinal >= self.start else []
        self.ordinal += 1
        yield self._decode(None)

    def _next(self) -> "Packet[VideoStream] | None":
        self._video.limit.check_stop()
        try:
            packet = next(self._packets, None)
        except av.error.FFmpegError:
            self.damaged.append(self.ordinal + 1)
            return None
        except OSError as error:
            raise Failure(Outcome.UNREADABLE, str(error)) from error
        if packet is not None and packet.size:
            self.ordinal = self._video.scan.ordinals.get(packet.pts, self.ordinal + 1)
        return packet

    def _decode(self, packet: "Packet[VideoStream] | None") -> list[VideoFrame]:
        """The frames that come out after this packet, None to get the rest."""
        try:
            return self._video.stream.codec_context.decode(packet)
        except av.error.EOFError:
            return []
        except av.error.FFmpegError:
            self.damaged.append(self.ordinal)
            return []
