"""Forward passes over an open video: frames get their numbers, clips get their frames, and trouble is noted."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from vivit.pipeline.picture import PictureConverter
from vivit.pipeline.video_clip import ClipInWork
from vivit.pipeline.video_decoder import OpenVideo, Reader
from vivit.pipeline.video_timeline import Timeline

FrameRange = tuple[int, int]
"""Numbers of the first and of the last frame."""


@dataclass
class Trouble:
    """Where a pass over a video met something else than promised, by frame number."""

    missing: list[FrameRange] = field(default_factory=list)
    """Frames that did not come."""
    disorder: list[int] = field(default_factory=list)
    """Where a frame came without PTS, with an unknown one, or with one that goes back."""
    damage: list[int] = field(default_factory=list)
    """Where a packet could not be decoded, or a frame was flagged as corrupt."""
    cut: list[int] = field(default_factory=list)
    """Where the last packet of a truncated file could not be decoded."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.disorder or self.damage or self.cut)

    def touches(self, needed: Sequence[FrameRange]) -> bool:
        """Whether the frames in these ranges are not just those that were promised."""
        gaps = [*self.missing, *((n, n) for n in (*self.disorder, *self.damage, *self.cut))]
        return any(first <= b and a <= last for a, b in gaps for first, last in needed)


def count_in(numbers: Sequence[int], needed: Sequence[FrameRange]) -> int:
    """How many of these frame numbers lie in the ranges."""
    return sum(any(first <= number <= last for first, last in needed) for number in numbers)


class Tracker:
    """Gives decoded frames their numbers, and notes trouble."""

    def __init__(self, video: OpenVideo, reader: Reader, timeline: Timeline) -> None:
        self._video = video
        self._reader = reader
        self._timeline = timeline
        self._num_damaged = 0
        self.trouble = Trouble()
        self.expected = self._floor = 0
        """The number that the next frame should have; what comes below the floor is not to be used."""
        self.note_start()

    def note_start(self) -> None:
        """The reader starts, or goes on, at another key frame."""
        if self._reader.start > 0:
            self.expected = self._floor = max(self.expected, self._video.scan.frame_at(self._reader.start))

    def number(self, frame: VideoFrame) -> int | None:
        """Number of the frame in the timeline, None if it cannot be used."""
        number = self.expected if self._timeline.pts is None else self._timeline.frame_with(frame.pts)
        if number is not None and number < self._floor:
            return None
        if number is None or number < self.expected:
            self.trouble.disorder.append(self.expected if number is None else number)
            return None
        if number > self.expected:
            self.trouble.missing.append((self.expected, number - 1))
        if frame.is_corrupt:
            self.trouble.damage.append(number)
        self.expected = number + 1
        return number

    def note_damage(self) -> None:
        """Take over what the reader could not decode since the last call."""
        last = len(self._video.scan.pts) - 1
        for ordinal in self._reader.damaged[self._num_damaged :]:
            number = self.expected if self._timeline.pts is None else self._video.scan.frame_at(ordinal)
            is_cut = self._video.is_truncated and ordinal >= last
            (self.trouble.cut if is_cut else self.trouble.damage).append(number)
        self._num_damaged = len(self._reader.damaged)

    def note_end(self) -> None:
        """No more frames come."""
        if self.expected < self._timeline.num_frames:
            self.trouble.missing.append((self.expected, self._timeline.num_frames - 1))


class Pass:
    """One forward pass over a video that hands out the wanted frames of some clips."""

    def __init__(
        self, video: OpenVideo, clips: Sequence[ClipInWork], timeline: Timeline, start: int | None = None
    ) -> None:
        """`start` fixes the packet to decode from, all frames from there on; None jumps from key frame to key frame."""
        self._video = video
        self._heap = [(clip.wanted[0], clip.position, clip) for clip in clips]
        """Of each clip the frame that it wants next."""
        heapq.heapify(self._heap)
        self._may_jump = start is None and video.scan.can_seek
        if start is None:
            start = video.scan.start_for(self._heap[0][0]) if self._may_jump else 0
        self._reader = Reader(video, start)
        self._tracker = Tracker(video, self._reader, timeline)
        self._converter = PictureConverter()
        self._decoding_sec = self._wait_began_sec = 0.0

    @property
    def trouble(self) -> Trouble:
        return self._tracker.trouble

    @property
    def num_frames(self) -> int:
        """Frames seen so far."""
        return self._tracker.expected

    def run(self, *, to_the_end: bool = False) -> Iterator[tuple[ClipInWork, bool]]:
        """Each clip when it has got its frames, or cannot get one, and whether it ran out of time."""
        steps = self._reader.steps()
        while self._heap or to_the_end:
            began = self._video.limit.clock()
            frames = next(steps, None)
            self._decoding_sec += self._video.limit.clock() - began
            if frames is None or (not self._heap and self._is_over(0.0)):
                break
            self._tracker.note_damage()
            for frame in frames:
                yield from self._hand_out(frame)
            for clip in self._take_overdue():
                yield clip, True
            self._jump()
        else:
            return
        self._tracker.note_end()
        for _, _, clip in sorted(self._heap, key=lambda entry: entry[1]):
            yield clip, False

    def _hand_out(self, frame: VideoFrame) -> Iterator[tuple[ClipInWork, bool]]:
        number = self._tracker.number(frame)
        if number is None or not self._heap or self._heap[0][0] > number:
            return
        picture: NDArray[np.uint8] | None = None
        while self._heap and self._heap[0][0] <= number:
            wanted, _, clip = heapq.heappop(self._heap)
            clip.spent_sec += self._decoding_sec - self._wait_began_sec
            if wanted == number:
                picture = self._converter.picture(frame) if picture is None else picture
                clip.sink.add(clip.index_of[wanted], picture)
                clip.served += 1
            if wanted < number or clip.is_served:
                yield clip, False
            else:
                heapq.heappush(self._heap, (clip.wanted[clip.served], clip.position, clip))
        self._wait_began_sec = self._decoding_sec

    def _is_over(self, spent_sec: float) -> bool:
        waited_sec = self._decoding_sec - self._wait_began_sec
        return spent_sec + waited_sec > self._video.limit.timeout_sec

    def _take_overdue(self) -> list[ClipInWork]:
        """Takes out the clips that have waited too long for the frame that is wanted next."""
        if not self._heap or not self._is_over(self._heap[0][2].spent_sec):
            return []
        due = [e for e in self._heap if e[0] == self._heap[0][0] and self._is_over(e[2].spent_sec)]
        self._heap = [entry for entry in self._heap if entry not in due]
        heapq.heapify(self._heap)
        self._wait_began_sec = self._decoding_sec
        return [clip for _, _, clip in due]

    def _jump(self) -> None:
        if not self._may_jump or not self._heap:
            return
        start = self._video.scan.start_for(self._heap[0][0])
        if start > max(self._reader.ordinal, self._reader.start):
            self._reader.jump(start)
            self._tracker.note_start()


def frames_that_come(
    video: OpenVideo, clips: Sequence[ClipInWork], timeline: Timeline, start: int, last: int | None = None
) -> tuple[list[int], Trouble] | None:
    """Numbers of the frames from packet `start` to frame `last` or to the end, decoding every packet for these clips.

    None if their time runs out.
    """
    video.reopen()
    reader = Reader(video, start)
    tracker = Tracker(video, reader, timeline)
    arrived: list[int] = []
    budget_sec = video.limit.timeout_sec - max(clip.spent_sec for clip in clips)
    began = video.limit.clock()
    for frames in reader.steps():
        tracker.note_damage()
        arrived.extend(number for frame in frames if (number := tracker.number(frame)) is not None)
        if video.limit.clock() - began > budget_sec:
            return None
        if last is not None and tracker.expected > last:
            break
    for clip in clips:
        clip.spent_sec += video.limit.clock() - began
    return arrived, tracker.trouble
