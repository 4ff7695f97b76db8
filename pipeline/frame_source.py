"""Read clips of a video that is there as JPEG or PNG frames, in a folder or a tar, as `read_clips` does of a file.

Frames are numbered in their names, `frame_0000000001.jpg`; number 1 is shown at 0 s (0, where there is one). Only those
that a clip wants are read. A frame that is missing or damaged is left out, and the clip's outcome says so.
"""

import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vivit.pipeline.errors import DataError
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.storage import Location, Url
from vivit.pipeline.tar_index import NotInTarError, read_member, tar_index
from vivit.pipeline.tar_walk import ENDS_INSIDE
from vivit.pipeline.video_clip import END_SLACK_SEC, ClipInWork, ClipResult, why_no_frames
from vivit.pipeline.video_location import FrameSource
from vivit.pipeline.video_source import Failure, Limit
from vivit.pipeline.video_timeline import TIME_EPSILON_SEC, Timeline

_NAME = re.compile(r"(.*?)(\d+)\.(?:jpe?g|png)", re.IGNORECASE | re.DOTALL)
_FOLDERS_KEPT = 8


@dataclass(frozen=True)
class Frames:
    """The frames of one video."""

    place: Location
    names: Sequence[str]
    """[frame], as they lie in the folder or tar."""
    timeline: Timeline
    ordinals: NDArray[np.int64] = field(repr=False)
    """[frame]: which frame of the whole video it is, from 0."""
    is_cut: bool = False
    """Whether the tar ends too early."""

    @classmethod
    def of(cls, source: FrameSource) -> "Frames":
        """Looks into the folder or tar; Failure where there are no frames."""
        names, is_cut = _names(source.place)
        prefixes = Counter(found[1] for name in names if (found := _NAME.fullmatch(_base(name))))
        if not prefixes:
            raise Failure(Outcome.NO_FRAMES, f"no numbered .jpg or .png frames in {source.place}")
        # mmaction2 puts optical flow, flow_x_00001.jpg, beside the pictures
        prefix = min(prefixes, key=lambda name: ("flow" in name.lower(), -prefixes[name], name))
        numbered = {
            int(found[2]): name
            for name in sorted(names, reverse=True)
            if (found := _NAME.fullmatch(_base(name))) and found[1] == prefix
        }
        numbers = np.array(sorted(numbered), np.int64)
        ordinals = numbers - min(1, int(numbers[0]))
        timeline = Timeline(ordinals / source.rate, 1 / source.rate, None)
        return cls(source.place, [numbered[n] for n in numbers.tolist()], timeline, ordinals, is_cut)

    def num_missing(self, clip: ClipInWork, rate: float) -> int:
        """Frames of a clip, up to the last one of the video, that are not there."""
        last = int(self.ordinals[-1])
        first, end = (
            int(np.ceil(min(sec, (last + 1) / rate) * rate - TIME_EPSILON_SEC * rate))
            for sec in (clip.span.start, clip.span.end)
        )
        return max(0, end - first) - len(clip.frames_in(self.timeline))

    def picture(self, frame: int) -> NDArray[np.uint8] | None:
        """[height, width, 3] RGB; None where the file is damaged or gone."""
        try:
            with Image.open(io.BytesIO(self._bytes(self.names[frame])), formats=("JPEG", "PNG")) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, NotInTarError, Image.DecompressionBombError):
            return None

    def _bytes(self, name: str) -> bytes:
        if isinstance(self.place, Path) and self.place.suffix != ".tar":
            return (self.place / name).read_bytes()
        return read_member(self.place, name)


def read_frame_clips(
    source: FrameSource, clips: Sequence[ClipInWork], limit: Limit
) -> Iterator[tuple[ClipInWork, ClipResult]]:
    """The result of each clip; Failure where none can be read."""
    frames = _frames_now(source)
    for clip in clips:
        yield clip, _read(frames, clip, source.rate, limit)


def frames_of(source: FrameSource) -> Frames:
    """The frames that are there now; Failure where there are none."""
    return _frames_now(source)


def _read(frames: Frames, clip: ClipInWork, rate: float, limit: Limit) -> ClipResult:
    """Hands out the frames that the clip wants; where some are damaged, it is asked again without them."""
    began = limit.clock()
    damaged: set[int] = set()
    while True:
        clip.plan(frames.timeline, [n for n in clip.frames_in(frames.timeline) if n not in damaged])
        known = len(damaged)
        for number in clip.wanted:
            limit.check_stop()
            if limit.clock() - began > limit.timeout_sec:
                return ClipResult(Outcome.TIMEOUT, f"reading took more than {limit.timeout_sec:g} s")
            picture = frames.picture(number)
            if picture is None:
                damaged.add(number)
            elif len(damaged) == known:
                clip.sink.add(clip.index_of[number], picture)
        if len(damaged) == known:
            return _result(frames, clip, rate, len(damaged))


def _result(frames: Frames, clip: ClipInWork, rate: float, num_damaged: int) -> ClipResult:
    end_sec, count = frames.timeline.end_sec, clip.num_frames
    if count == 0 and num_damaged:
        return ClipResult(Outcome.NO_FRAMES, f"none of {num_damaged} frames can be decoded")
    if count == 0:
        return ClipResult(Outcome.NO_FRAMES, why_no_frames(clip.span, frames.timeline))
    beyond_sec = clip.span.end - end_sec
    if frames.is_cut and beyond_sec > TIME_EPSILON_SEC:
        return ClipResult(Outcome.PARTIAL, f"truncated: the tar is cut short, {count} frames are left", count)
    if END_SLACK_SEC < beyond_sec < np.inf:
        message = f"the clip ends at {clip.span.end:.3f} s, but the frames at {end_sec:.3f} s"
        return ClipResult(Outcome.PARTIAL, message, count)
    if missing := frames.num_missing(clip, rate):
        return ClipResult(Outcome.PARTIAL, f"{missing} frames are missing", count)
    if num_damaged:
        return ClipResult(Outcome.CORRUPT, f"corrupt: {num_damaged} frames cannot be decoded", count)
    return ClipResult(Outcome.OK, "", count)


def _frames_now(source: FrameSource) -> Frames:
    """The frames of a folder or tar as it is now: those of a folder are listed once, unless it changes."""
    if isinstance(source.place, Path):
        try:
            return _listed(source, os.stat(source.place).st_mtime_ns)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Failure(Outcome.MISSING, f"no such folder or tar: {source.place}") from error
        except OSError as error:
            raise Failure(Outcome.UNREADABLE, str(error)) from error
    return _listed(source, 0)


@lru_cache(_FOLDERS_KEPT)
def _listed(source: FrameSource, changed_ns: int) -> Frames:
    return Frames.of(source)


def _names(place: Location) -> tuple[list[str], bool]:
    """Names in a folder or tar, and whether the tar is damaged."""
    if isinstance(place, Path) and place.is_dir():
        return os.listdir(place), False
    if place.suffix != ".tar":
        what = "frames by URL must be in a tar" if isinstance(place, Url) else "neither a folder nor a tar"
        raise Failure(Outcome.NOT_A_VIDEO, f"{what}: {place}")
    try:
        index = tar_index(place)
    except FileNotFoundError as error:
        raise Failure(Outcome.MISSING, f"no such file: {place}") from error
    except DataError as error:
        raise Failure(Outcome.UNREADABLE_CONTAINER, str(error)) from error
    is_cut = any(reason == ENDS_INSIDE for _, reason in index.content.refused)
    return list(index.members), is_cut or bool(index.content.damage)


def _base(name: str) -> str:
    return PurePosixPath(name).name
