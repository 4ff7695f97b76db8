"""Read clips of a video file: which frames a clip has, and the pictures of those that are wanted.

`read_clips` opens a video once, decodes it forward once, and serves all clips that are asked of it. A video that
cannot be read is an outcome, never an exception. The rules (times, damage, colour) are at the functions that hold them.
"""

import itertools
import math
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vivit.pipeline.errors import DataError
from vivit.pipeline.frame_source import frames_of, read_frame_clips
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.picture import quarter_turns
from vivit.pipeline.video_clip import (
    END_SLACK_SEC,
    ClipInWork,
    ClipResult,
    ClipSpan,
    FrameSink,
    why_no_frames,
)
from vivit.pipeline.video_decoder import OpenVideo, Reader
from vivit.pipeline.video_location import FrameSource, VideoSource
from vivit.pipeline.video_pass import FrameRange, Pass, Trouble, count_in, frames_that_come
from vivit.pipeline.video_source import Failure, Limit, Stopped, source_name
from vivit.pipeline.video_timeline import TIME_EPSILON_SEC, Timeline

__all__ = ["ClipResult", "ClipSpan", "FrameSink", "VideoInfo", "probe", "read_clips", "read_frames"]


def read_clips(
    source: VideoSource,
    spans: Sequence[ClipSpan],
    sinks: Sequence[FrameSink],
    *,
    timeout_sec: float = 120.0,
    stop: threading.Event | None = None,
) -> Generator[tuple[int, ClipResult]]:
    """(position in `spans`, result) of each clip as it is finished, in one forward pass over the video.

    A clip's result and pictures depend on the file, its own span and its own plan, never on the other clips.
    `timeout_sec` bounds the time spent on decoding for one clip (not the sinks' time). After `stop` is set, the
    iterator ends without results for the clips not finished. A store that cannot be reached is a StorageError, and no
    result of any clip.
    """
    clips = [ClipInWork(i, span, sink) for i, (span, sink) in enumerate(zip(spans, sinks, strict=True))]
    unfinished = {clip.position for clip in clips}
    limit = Limit(timeout_sec, stop or threading.Event())
    try:
        if isinstance(source, FrameSource):
            for clip, result in read_frame_clips(source, clips, limit):
                unfinished.discard(clip.position)
                yield clip.position, result
            return
        with OpenVideo(source, limit) as video:
            for clip, result in _read(video, clips):
                video.check_store()
                unfinished.discard(clip.position)
                yield clip.position, result
    except Stopped:
        return
    except Failure as failure:
        for position in sorted(unfinished):
            yield position, ClipResult(failure.outcome, failure.message)


def read_frames(source: VideoSource, times_sec: Sequence[float] | NDArray[np.float64]) -> NDArray[np.uint8]:
    """The frames [time, height, width, 3] shown at these seconds; the first or last one for times outside the video."""
    sink = _ShownAt(np.asarray(times_sec, np.float64))
    [(_, result)] = read_clips(source, [ClipSpan()], [sink])
    if not result.outcome.usable:
        raise _data_error(source, result)
    sizes = {picture.shape for picture in sink.pictures.values()}
    if len(sizes) > 1:
        raise DataError(
            f"{source_name(source)} changes its picture size ({sizes}): read its frames one by one"
        )
    return np.stack([sink.pictures[index] for index in sink.indices.tolist()])


class _ShownAt:
    """Keeps the frames shown at given seconds."""

    def __init__(self, times_sec: NDArray[np.float64]) -> None:
        self._times_sec = times_sec
        self.indices: NDArray[np.int64] = np.zeros(0, np.int64)
        self.pictures: dict[int, NDArray[np.uint8]] = {}

    def plan(self, times_sec: NDArray[np.float64]) -> NDArray[np.int64]:
        self.pictures = {}
        shown = np.searchsorted(times_sec, self._times_sec + TIME_EPSILON_SEC, side="right") - 1
        self.indices = np.clip(shown, 0, len(times_sec) - 1).astype(np.int64)
        return self.indices

    def add(self, index: int, picture: NDArray[np.uint8]) -> None:
        self.pictures[index] = picture


@dataclass(frozen=True)
class VideoInfo:
    """What a video says of itself."""

    container: str
    codec: str
    num_frames: int
    """Frames that its packets promise."""
    frame_rate: float
    duration_sec: float
    """From the first frame to the end of the last one."""
    width: int
    """As shown, that is after rotation."""
    height: int


def probe(source: VideoSource, *, timeout_sec: float = 120.0) -> VideoInfo:
    """Reads all packets and decodes the first frame."""
    try:
        if isinstance(source, FrameSource):
            return _frames_info(source)
        with OpenVideo(source, Limit(timeout_sec)) as video:
            frame = next(itertools.chain.from_iterable(Reader(video).steps()), None)
            if frame is None:
                raise Failure(Outcome.NO_FRAMES, "no frame can be decoded")
            is_turned = quarter_turns(frame) % 2 == 1
            return VideoInfo(
                container=video.container.format.name,
                codec=video.stream.codec_context.name,
                num_frames=video.scan.timeline.num_frames,
                frame_rate=float(video.scan.rate),
                duration_sec=video.scan.timeline.end_sec,
                width=frame.height if is_turned else frame.width,
                height=frame.width if is_turned else frame.height,
            )
    except Failure as failure:
        raise _data_error(source, failure) from failure


def _frames_info(source: FrameSource) -> VideoInfo:
    frames = frames_of(source)
    picture = next(
        (p for n in range(frames.timeline.num_frames) if (p := frames.picture(n)) is not None), None
    )
    if picture is None:
        raise Failure(Outcome.NO_FRAMES, "no frame can be decoded")
    return VideoInfo(
        container="frames",
        codec=frames.names[0].rpartition(".")[2].lower(),
        num_frames=frames.timeline.num_frames,
        frame_rate=source.rate,
        duration_sec=frames.timeline.end_sec,
        width=picture.shape[1],
        height=picture.shape[0],
    )


def _data_error(source: VideoSource, reason: ClipResult | Failure) -> DataError:
    return DataError(f"{source_name(source)} cannot be read ({reason.outcome}): {reason.message}")


def _read(video: OpenVideo, clips: Sequence[ClipInWork]) -> Iterator[tuple[ClipInWork, ClipResult]]:
    """By PTS if they tell which frame is which, else by the order in which frames come."""
    if video.scan.timeline.pts is None:
        yield from _read_by_order(video, clips)
    else:
        yield from _read_by_pts(video, clips)


def _read_by_pts(video: OpenVideo, clips: Sequence[ClipInWork]) -> Iterator[tuple[ClipInWork, ClipResult]]:
    """First all clips by what the packets promise; then each clip that met damage or other frames again, alone."""
    scan = video.scan
    planned, done = _plan(video, clips)
    yield from done
    # the packets of a file that was cut short promise more than can be decoded: what is left has to be counted
    again = [clip for clip in planned if _reaches_beyond_a_cut(video, clip)]
    ready = [clip for clip in planned if not _reaches_beyond_a_cut(video, clip)]
    if ready:
        forward = Pass(video, ready, scan.timeline)
        for clip, is_late in forward.run():
            needed = [(scan.frame_at(scan.start_for(w)), w) for w in clip.wanted] if forward.trouble else []
            if is_late:
                yield clip, _timeout(video)
            elif not clip.is_served or forward.trouble.touches(needed):
                again.append(clip)
            else:
                yield clip, _result(video, clip, scan.timeline, Trouble(), [])
    unordered: list[ClipInWork] = []
    for clip in again:
        result = _reread_by_pts(video, clip)
        if result is None:
            unordered.append(clip)
        else:
            yield clip, result
    if unordered:
        yield from _read_counted(video, unordered)


def _reaches_beyond_a_cut(video: OpenVideo, clip: ClipInWork) -> bool:
    return video.is_truncated and clip.span.end - video.scan.timeline.end_sec > TIME_EPSILON_SEC


def _reread_by_pts(video: OpenVideo, clip: ClipInWork) -> ClipResult | None:
    """Reads one clip by the frames that really come, None if their PTS do not tell which they are.

    Starts one key frame earlier than needed, for key frames from which decoding only recovers.
    """
    scan = video.scan
    frames = clip.frames_in(scan.timeline)
    start = scan.start_for(frames[0], keys_before=1)
    needed = [(scan.frame_at(scan.start_for(frames[0])), frames[-1])]
    come = frames_that_come(video, [clip], scan.timeline, start, last=frames[-1])
    if come is None:
        return _timeout(video)
    arrived, trouble = come
    if count_in(trouble.disorder, needed):
        return None
    clip.plan(scan.timeline, [number for number in arrived if number in frames])
    failed = _deliver_again(video, [clip], scan.timeline, start)
    return failed.get(clip.position) or _result(video, clip, scan.timeline, trouble, needed)


def _read_by_order(video: OpenVideo, clips: Sequence[ClipInWork]) -> Iterator[tuple[ClipInWork, ClipResult]]:
    """Reads clips by the order in which frames come, and checks that as many come as the packets promise."""
    promised = video.scan.timeline
    ready, done = _plan(video, clips)
    yield from done
    if not ready:
        return
    forward = Pass(video, ready, promised, start=0)
    late = {clip.position for clip, is_late in forward.run(to_the_end=True) if is_late}
    in_time = [clip for clip in ready if clip.position not in late]
    yield from ((clip, _timeout(video)) for clip in ready if clip.position in late)
    if forward.num_frames == promised.num_frames:
        for clip in in_time:
            needed = [(clip.first, clip.wanted[-1])]
            yield clip, _result(video, clip, promised, forward.trouble, needed)
    elif in_time:
        yield from _read_counted(video, in_time)


def _read_counted(video: OpenVideo, clips: Sequence[ClipInWork]) -> Iterator[tuple[ClipInWork, ClipResult]]:
    """Reads clips by the order in which frames come, at the average rate, after counting them."""
    come = frames_that_come(video, clips, Timeline.by_order(0, video.scan.rate), start=0)
    if come is None:
        yield from ((clip, _timeout(video)) for clip in clips)
        return
    arrived, trouble = come
    timeline = Timeline.by_order(len(arrived), video.scan.rate)
    for clip in clips:
        clip.plan(timeline, clip.frames_in(timeline))
    failed = _deliver_again(video, clips, timeline, start=0)
    for clip in clips:
        # damage behind the last frame has the number after it
        needed = [(clip.first, clip.first + clip.num_frames)]
        yield clip, failed.get(clip.position) or _result(video, clip, timeline, trouble, needed)


def _plan(
    video: OpenVideo, clips: Sequence[ClipInWork]
) -> tuple[list[ClipInWork], list[tuple[ClipInWork, ClipResult]]]:
    """Asks for the wanted of the promised frames: the clips that want some, and the results of those that do not."""
    timeline = video.scan.timeline
    for clip in clips:
        clip.plan(timeline, clip.frames_in(timeline))
    ready = [clip for clip in clips if clip.wanted]
    return ready, [(c, _result(video, c, timeline, Trouble(), [])) for c in clips if not c.wanted]


def _deliver_again(
    video: OpenVideo, clips: Sequence[ClipInWork], timeline: Timeline, start: int
) -> dict[int, ClipResult]:
    """Hands out wanted frames that are known to come; the result of each clip (by position) where that fails."""
    failed: dict[int, ClipResult] = {}
    if ready := [clip for clip in clips if clip.wanted]:
        video.reopen()
        for clip, is_late in Pass(video, ready, timeline, start).run():
            if is_late:
                failed[clip.position] = _timeout(video)
            elif not clip.is_served:
                message = "the file gave other frames when it was read again"
                failed[clip.position] = ClipResult(Outcome.UNREADABLE, message)
    return failed


def _timeout(video: OpenVideo) -> ClipResult:
    return ClipResult(Outcome.TIMEOUT, f"decoding took more than {video.limit.timeout_sec:g} s")


def _result(
    video: OpenVideo, clip: ClipInWork, timeline: Timeline, trouble: Trouble, needed: Sequence[FrameRange]
) -> ClipResult:
    """The result of a clip that was read, by the trouble in the ranges of frames that it needed.

    A truncated file is worse than damage, and its last packet, which is cut, counts as truncation. A span that lies
    inside what is left of a truncated file is whole.
    """
    num_frames = clip.num_frames
    if num_frames == 0:
        return ClipResult(Outcome.NO_FRAMES, why_no_frames(clip.span, timeline))
    beyond_sec = clip.span.end - timeline.end_sec
    if video.is_truncated and (beyond_sec > TIME_EPSILON_SEC or count_in(trouble.cut, needed)):
        message = f"truncated: the file ends inside an element, {num_frames} frames are left"
        return ClipResult(Outcome.PARTIAL, message, num_frames)
    if END_SLACK_SEC < beyond_sec < math.inf:
        message = f"the clip ends at {clip.span.end:.3f} s, but the video at {timeline.end_sec:.3f} s"
        return ClipResult(Outcome.PARTIAL, message, num_frames)
    if num_damaged := count_in(trouble.damage, needed):
        message = f"corrupt: {num_damaged} packets or frames are damaged"
        return ClipResult(Outcome.CORRUPT, message, num_frames)
    return ClipResult(Outcome.OK, "", num_frames)
