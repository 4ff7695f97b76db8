"""What is asked of a video, clip by clip, and what came of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vivit.pipeline.outcome import Outcome
from vivit.pipeline.video_timeline import Timeline

END_SLACK_SEC = 0.5
"""Annotations may reach this far past the end of a whole video."""


@dataclass(frozen=True)
class ClipSpan:
    """A part of a video, in seconds from its first frame; a frame at `t` belongs to it if start <= t < end."""

    start_sec: float | None = None
    end_sec: float | None = None

    @property
    def start(self) -> float:
        return 0.0 if self.start_sec is None else self.start_sec

    @property
    def end(self) -> float:
        return math.inf if self.end_sec is None else self.end_sec


@dataclass(frozen=True)
class ClipResult:
    """What became of a clip, and how many frames of it can be decoded (0 if it failed)."""

    outcome: Outcome
    message: str = ""
    num_frames: int = 0


class FrameSink(Protocol):
    """Takes the pictures of one clip."""

    def plan(self, times_sec: NDArray[np.float64]) -> NDArray[np.int64]:
        """Indices of the wanted frames, in any order, of a clip whose frames lie at these times [frame].

        Called again when the video's frames differ from what its packets promised: what was delivered is then void.
        """
        ...

    def add(self, index: int, picture: NDArray[np.uint8]) -> None:
        """One wanted frame, RGB [height, width, 3], not to be written to. Each index comes once, ascending."""
        ...


@dataclass(eq=False)
class ClipInWork:
    """A clip while it is read."""

    position: int
    span: ClipSpan
    sink: FrameSink
    wanted: list[int] = field(default_factory=list)
    """Frame numbers of the video, ascending; `served` of them are done."""
    served: int = 0
    first: int = 0
    """Frame number of the clip's frame 0."""
    num_frames: int = 0
    index_of: dict[int, int] = field(default_factory=dict)
    """The clip's index of each wanted frame."""
    spent_sec: float = 0.0
    """Time spent on decoding for it."""

    @property
    def is_served(self) -> bool:
        return self.served == len(self.wanted)

    def frames_in(self, timeline: Timeline) -> range:
        """The frames of the video that belong to the clip."""
        return timeline.frames_between(self.span.start, self.span.end)

    def plan(self, timeline: Timeline, frames: Sequence[int]) -> None:
        """Ask the sink which of these frames it wants, from the start; where there are none it is not asked."""
        self.wanted, self.served, self.num_frames = [], 0, len(frames)
        if not frames:
            return
        indices = np.unique(self.sink.plan(timeline.times_sec[np.asarray(frames, np.int64)])).tolist()
        if indices and not 0 <= indices[0] <= indices[-1] < len(frames):
            asked = f"frames {indices[0]} to {indices[-1]}"
            raise IndexError(f"a clip of {len(frames)} frames was asked for {asked}")
        self.first = frames[0]
        self.index_of = {frames[index]: index for index in indices}
        self.wanted = list(self.index_of)


def why_no_frames(span: ClipSpan, timeline: Timeline) -> str:
    """Why no frame of a video belongs to a clip."""
    if timeline.num_frames == 0:
        return "no frame can be decoded"
    if span.start >= timeline.end_sec:
        return f"the clip starts at {span.start:.3f} s, but the video ends at {timeline.end_sec:.3f} s"
    end = "the end" if span.end == math.inf else f"{span.end:.3f} s"
    return f"no frame can be decoded from {span.start:.3f} s to {end}"
