"""A smaller copy of a video: the same frames at the same times, without sound."""

import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from av.video.stream import VideoStream
from numpy.typing import NDArray

from vivit.pipeline.outcome import Outcome
from vivit.pipeline.video import ClipSpan, read_clips
from vivit.pipeline.video_location import VideoSource
from vivit.pipeline.video_source import Failure, Stopped

CODEC_OPTIONS = {"preset": "fast", "crf": "20"}
"""Of libx264."""
_FLAGS = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.BITEXACT
)
_SMPTE170M = 6
"""H.264's number of the matrix of BT.601."""
_FINE = Fraction(1, 1_000_000)
_DAY_SEC = 86400.0


class _KeepAsItIs(Exception):
    """The video is small enough, or changes its picture size."""


def write_resized(source: VideoSource, short_side: int, target: Path, stop: threading.Event) -> bool:
    """Write an MP4 whose short side has so many pixels; False where the video is better kept as it is.

    That is where its short side is not longer, where its picture changes size, and where it is damaged: then what reads
    it later can say so. Failure where it cannot be read, Stopped after `stop` is set.
    """
    writer = _Writer(target, short_side)
    try:
        results = list(read_clips(source, [ClipSpan()], [writer], timeout_sec=_DAY_SEC, stop=stop))
    except _KeepAsItIs:
        return False
    finally:
        writer.close()
    if not results:
        raise Stopped
    ((_, result),) = results
    if not result.outcome.usable:
        raise Failure(result.outcome, result.message)
    return result.outcome is Outcome.OK


class _Writer:
    """Encodes the frames of a whole video as they come (a `FrameSink`)."""

    def __init__(self, target: Path, short_side: int) -> None:
        self._target, self._short_side = target, short_side
        self._container: OutputContainer | None = None
        self._shape: tuple[int, ...] = ()

    def plan(self, times_sec: NDArray[np.float64]) -> NDArray[np.int64]:
        """All frames."""
        self._abandon()
        self._times_sec = times_sec
        self._rate, self._time_base, self._pts = _timing(times_sec)
        return np.arange(len(times_sec), dtype=np.int64)

    def add(self, index: int, picture: NDArray[np.uint8]) -> None:
        if self._container is None:
            self._begin(picture)
        elif picture.shape != self._shape:
            raise _KeepAsItIs
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            width=self._stream.width,
            height=self._stream.height,
            format="yuv420p",
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.MPEG,
            interpolation=_FLAGS,
            threads=1,
        )
        frame.pts, frame.time_base = int(self._pts[index]), self._time_base
        assert self._container is not None
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what the encoder still holds."""
        if self._container is not None:
            self._container.mux(self._stream.encode(None))
            self._container.close()

    def _begin(self, picture: NDArray[np.uint8]) -> None:
        height, width = picture.shape[:2]
        if min(height, width) <= self._short_side:
            raise _KeepAsItIs
        self._shape = picture.shape
        scale = self._short_side / min(height, width)
        self._container = av.open(str(self._target), "w", format="mp4")
        stream: VideoStream = self._container.add_stream("libx264", rate=self._rate, options=CODEC_OPTIONS)
        stream.height, stream.width = (max(2, 2 * round(side * scale / 2)) for side in (height, width))
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = self._time_base
        stream.codec_context.colorspace = _SMPTE170M
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.thread_count = 1  # with more the bytes depend on how many
        self._stream = stream

    def _abandon(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None


def _timing(times_sec: NDArray[np.float64]) -> tuple[Fraction, Fraction, NDArray[np.int64]]:
    """Frame rate, time base and PTS [frame]: one tick per frame where these are evenly spaced, else microseconds."""
    number = len(times_sec)
    span_sec = float(times_sec[-1] - times_sec[0]) if number > 1 else 0.0
    rate = Fraction((number - 1) / span_sec).limit_denominator(1001) if span_sec > 0 else Fraction(25)
    if rate <= 0:  # less than a frame in a quarter of an hour
        rate = Fraction(1)
    if np.abs(times_sec - np.arange(number) / float(rate)).max(initial=0.0) < 5e-7:
        return rate, 1 / rate, np.arange(number, dtype=np.int64)
    return rate, _FINE, np.round(times_sec / float(_FINE)).astype(np.int64)
