"""What the packets of a video promise: which frames it has, at what times, and from where each can be decoded."""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Self

import av.error
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

from vivit.pipeline.outcome import Outcome
from vivit.pipeline.video_source import Failure, Limit

TIME_EPSILON_SEC = 1e-6
"""Times that differ by less are the same."""
_SEEKABLE = frozenset(("mov", "mp4", "matroska", "webm"))
"""Containers whose key frames and times are good enough to jump to."""
_NO_TIME = -(2**63)


@dataclass(frozen=True)
class Timeline:
    """The frames of a video, and how a decoded one is known: by its PTS, or by its place in the order of decoding."""

    times_sec: NDArray[np.float64]
    """[frame], from the first frame."""
    interval_sec: float
    """From the last frame to its end."""
    pts: NDArray[np.int64] | None
    """[frame], ascending; None: frames come in this order, whatever their PTS."""

    @classmethod
    def by_order(cls, num_frames: int, rate: Fraction) -> Self:
        return cls(np.arange(num_frames) / float(rate), float(1 / rate), None)

    @property
    def num_frames(self) -> int:
        return len(self.times_sec)

    @property
    def end_sec(self) -> float:
        return float(self.times_sec[-1]) + self.interval_sec if self.num_frames else 0.0

    def frames_between(self, start_sec: float, end_sec: float) -> range:
        """The frames at start <= time < end, within a microsecond."""
        bounds = np.array([start_sec, end_sec]) - TIME_EPSILON_SEC
        first, end = np.searchsorted(self.times_sec, bounds, side="left").tolist()
        return range(first, end)

    def frame_with(self, pts: int | None) -> int | None:
        """The frame of a timeline by PTS that has this one, None if there is none."""
        assert self.pts is not None
        if pts is None:
            return None
        frame = int(np.searchsorted(self.pts, pts))
        return frame if frame < len(self.pts) and self.pts[frame] == pts else None


@dataclass(frozen=True)
class Scan:
    """All packets of the stream, read once without decoding. Arrays are [packet], in the order of decoding.

    The last four are empty if the container, its times or its marks of key frames are not good enough to jump.
    """

    pts: NDArray[np.int64]
    rate: Fraction
    timeline: Timeline
    """The frames as promised."""
    key_ordinals: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[key]: packets from which decoding can start."""
    frame_keys: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[frame]: the key that each frame needs, -1 if none."""
    seek_times: list[int] = field(default_factory=list)
    """[packet]: the time by which the demuxer finds it."""
    ordinals: dict[int | None, int] = field(default_factory=dict)
    """Packet of each PTS."""

    @property
    def can_seek(self) -> bool:
        return bool(self.seek_times)

    def start_for(self, frame: int, *, keys_before: int = 0) -> int:
        """Packet from which to decode so as to get this frame, or some key frames earlier."""
        key = int(self.frame_keys[frame]) - keys_before if self.can_seek else -1
        return int(self.key_ordinals[key]) if key >= 0 else 0

    def frame_at(self, ordinal: int) -> int:
        """The first frame of a timeline by PTS that is not shown before this packet; 0 for the first packet."""
        assert self.timeline.pts is not None
        if ordinal == 0:
            return 0
        return int(np.searchsorted(self.timeline.pts, self.pts[min(ordinal, len(self.pts) - 1)]))


@dataclass(frozen=True)
class _Packets:
    """Times and flags of packets, each [packet] in the order of decoding."""

    pts: NDArray[np.int64]
    dts: NDArray[np.int64]
    is_shown: NDArray[np.bool_]
    is_key: NDArray[np.bool_]


def scan_packets(container: InputContainer, stream: VideoStream, limit: Limit) -> tuple[Scan, bool]:
    """What the packets promise, and whether the container could be read to its end."""
    pts: list[int] = []
    dts: list[int] = []
    is_shown: list[bool] = []
    is_key: list[bool] = []
    is_readable = True
    try:
        for packet in container.demux(stream):
            if len(pts) % 256 == 0:
                limit.check_opening()
            if packet.size:
                pts.append(_NO_TIME if packet.pts is None else packet.pts)
                dts.append(_NO_TIME if packet.dts is None else packet.dts)
                is_shown.append(not packet.is_discard)
                is_key.append(packet.is_keyframe)
    except av.error.FFmpegError:
        is_readable = False  # the reader meets the same error at the same packet, and notes it
    except OSError as error:
        raise Failure(Outcome.UNREADABLE, str(error)) from error
    packets = _Packets(
        pts=np.array(pts, np.int64),
        dts=np.array(dts, np.int64),
        is_shown=np.array(is_shown, np.bool_),
        is_key=np.array(is_key, np.bool_),
    )
    return _promise(container.format.name, stream, packets), is_readable


def _promise(container: str, stream: VideoStream, packets: _Packets) -> Scan:
    """What these packets promise, in a container of this FFmpeg name."""
    pts, dts, is_shown = packets.pts, packets.dts, packets.is_shown
    rate = next((r for r in (stream.average_rate, stream.guessed_rate) if r and 0 < r <= 1000), Fraction(25))
    if not _times_identify_frames(container, pts[is_shown], dts):
        return Scan(pts, rate, Timeline.by_order(int(is_shown.sum()), rate))
    frame_ordinals = np.flatnonzero(is_shown)[np.argsort(pts[is_shown])]
    frame_pts = pts[frame_ordinals]
    times_sec = (frame_pts - frame_pts[:1]).astype(np.float64) * float(stream.time_base or 1)
    interval_sec = float(times_sec[-1]) / (len(times_sec) - 1) if len(times_sec) > 1 else float(1 / rate)
    timeline = Timeline(times_sec, interval_sec, frame_pts)
    if not _can_seek(container, stream, packets):
        return Scan(pts, rate, timeline)
    key_ordinals = np.flatnonzero(packets.is_key)
    seek_times = dts if container.startswith("mov") else pts  # as in the demuxer's index
    return Scan(
        pts,
        rate,
        timeline,
        key_ordinals,
        frame_keys=_keys_for(frame_ordinals, key_ordinals, pts),
        seek_times=seek_times.tolist(),
        ordinals={time: ordinal for ordinal, time in enumerate(pts.tolist())},
    )


def _times_identify_frames(container: str, pts: NDArray[np.int64], dts: NDArray[np.int64]) -> bool:
    """Whether each shown frame has its own PTS. AVI stores none, and what FFmpeg invents is wrong with B-frames."""
    known_dts = dts[dts != _NO_TIME]
    return container != "avi" and _all_known_and_distinct(pts) and bool((np.diff(known_dts) >= 0).all())


def _can_seek(container: str, stream: VideoStream, packets: _Packets) -> bool:
    """Whether jumps are safe. If all are key frames, the file does not mark them, unless the codec has no others."""
    return (
        len(packets.pts) > 0
        and not _SEEKABLE.isdisjoint(container.split(","))
        and _all_known_and_distinct(packets.pts)
        and (not packets.is_key.all() or stream.codec_context.codec.intra_only)
    )


def _all_known_and_distinct(pts: NDArray[np.int64]) -> bool:
    return bool((pts != _NO_TIME).all()) and len(np.unique(pts)) == len(pts)


def _keys_for(
    frame_ordinals: NDArray[np.int64], key_ordinals: NDArray[np.int64], pts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The key [frame] that each frame needs, -1 for none.

    A key frame that is shown after the frame does not do, even if its packet comes before: frames shown before a
    key frame may need those before it (open GOP).
    """
    if not len(key_ordinals):
        return np.full(len(frame_ordinals), -1)
    keys = np.searchsorted(key_ordinals, frame_ordinals, side="right") - 1
    while (is_later := (keys >= 0) & (pts[key_ordinals[keys]] > pts[frame_ordinals])).any():
        keys[is_later] -= 1
    return keys.astype(np.int64)
