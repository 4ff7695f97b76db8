"""From videos to the crops of every view, decoded ahead of the encoder in a bounded number of threads."""

import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Clip
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.video import ClipResult, ClipSpan, read_clips
from vivit.pipeline.views import Box, ViewSpec, resample, span, views_of

CLIPS_PER_JOB = 8
"""Clips of one video that one thread reads in one pass; a fixed rule, so that bytes do not depend on threads."""
_POLL_SEC = 0.1


@dataclass(frozen=True, kw_only=True)
class CropSettings:
    """All that decides the crops of a clip."""

    views: ViewSpec
    seed: int
    interpolation: str
    """Filter for resizing, `bilinear` or `bicubic`."""
    timeout_sec: float = 120.0
    """Longest time that one clip may take to decode."""
    first_view: int = 0
    """Number of the first training view: each is another draw."""


@dataclass(frozen=True, kw_only=True)
class ClipViews(Clip):
    """A clip of which other training views are wanted than those of the `CropSettings`."""

    views: range
    """Numbers of the training views; a clip of another split has its fixed grid."""

    @classmethod
    def of(cls, clip: Clip, views: range) -> Self:
        """These views of a clip."""
        return cls(**vars(clip), views=views)


@dataclass(frozen=True)
class ClipCrops:
    """One clip as the encoder wants it."""

    clip: Clip
    result: ClipResult
    crops: npt.NDArray[np.uint8] | None
    """[view, frame, height, width, channel]; None where the outcome is not usable."""

    @property
    def record(self) -> ClipRecord:
        """What became of the clip."""
        return ClipRecord(
            clip_id=self.clip.clip_id,
            outcome=self.result.outcome.value,
            message=self.result.message,
            num_frames=self.result.num_frames,
        )


class ViewCutter:
    """Cuts the crops of all views of one clip out of its frames as they come (a `FrameSink`)."""

    def __init__(self, clip: Clip, settings: CropSettings) -> None:
        self._settings = settings
        spec, first = settings.views, settings.first_view
        if isinstance(clip, ClipViews) and clip.split == "train":
            spec, first = replace(spec, train_views=len(clip.views)), clip.views.start
        self._views = views_of(spec, split=clip.split, seed=settings.seed, clip_id=clip.clip_id, first=first)
        self._places: dict[int, list[tuple[int, int]]] = {}
        self._boxes: dict[tuple[int, int], list[Box]] = {}
        self._crops: npt.NDArray[np.uint8] | None = None
        self.num_shown = 0
        """Frames that the views choose from: those of the clip, or the ticks of the target rate."""

    def plan(self, times_sec: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """The frames that the views want, each once."""
        self._crops, self._places = None, {}
        self.num_shown = len(resample(times_sec, self._settings.views.fps))
        for at, view in enumerate(self._views):
            for time_index, frame in enumerate(view.frames(times_sec).tolist()):
                self._places.setdefault(frame, []).append((at, time_index))
        return np.array(sorted(self._places), dtype=np.int64)

    def add(self, index: int, picture: npt.NDArray[np.uint8]) -> None:
        """Cut frame `index`, [height, width, 3] RGB, for every view that wants it."""
        if self._crops is None:
            spec = self._settings.views
            shape = (len(self._views), spec.num_frames, spec.crop_size, spec.crop_size, 3)
            self._crops = np.zeros(shape, np.uint8)
        image = Image.fromarray(picture)
        boxes = self._boxes_for(image.height, image.width)
        done: dict[int, npt.NDArray[np.uint8]] = {}
        for at, time_index in self._places[index]:
            if at not in done:
                done[at] = boxes[at].crop(image, self._settings.views.crop_size, self._settings.interpolation)
            self._crops[at, time_index] = done[at]

    def hand_over(self) -> npt.NDArray[np.uint8] | None:
        """The crops [view, frame, height, width, channel], which are not kept here; None where no frame came."""
        crops, self._crops = self._crops, None
        return crops

    def _boxes_for(self, height: int, width: int) -> list[Box]:
        if (height, width) not in self._boxes:
            self._boxes[height, width] = [view.box(height, width) for view in self._views]
        return self._boxes[height, width]


def crop_clips(
    source: Path, clips: Sequence[Clip], settings: CropSettings, *, stop: threading.Event | None = None
) -> Iterator[ClipCrops]:
    """The crops of clips of one video, in the order given, from one pass over it."""
    cutters = [ViewCutter(clip, settings) for clip in clips]
    spans = [ClipSpan(clip.start_sec, clip.end_sec) for clip in clips]
    ready: dict[int, ClipCrops] = {}
    due = 0
    with closing(read_clips(source, spans, cutters, timeout_sec=settings.timeout_sec, stop=stop)) as results:
        for at, result in results:
            ready[at] = _finished(clips[at], result, cutters[at], settings.views)
            while due in ready:
                yield ready.pop(due)
                due += 1


def _finished(clip: Clip, result: ClipResult, cutter: ViewCutter, views: ViewSpec) -> ClipCrops:
    if result.outcome is Outcome.OK and cutter.num_shown < span(views):
        message = f"{cutter.num_shown} frames, a view reaches over {span(views)}: views start over"
        result = ClipResult(Outcome.SHORT, message, result.num_frames)
    crops = cutter.hand_over()
    return ClipCrops(clip, result, crops if result.outcome.usable else None)


def jobs_of(clips: Sequence[Clip]) -> Iterator[list[Clip]]:
    """Neighbouring clips of the same video, at most `CLIPS_PER_JOB` together."""
    for _, same in groupby(clips, key=lambda clip: clip.video):
        together = list(same)
        for start in range(0, len(together), CLIPS_PER_JOB):
            yield together[start : start + CLIPS_PER_JOB]


@dataclass
class _Job:
    clips: Sequence[Clip]
    done: queue.Queue[ClipCrops | BaseException]


class CropStream:
    """Crops of many clips in row order, decoded ahead by `threads` threads within `budget_bytes` of memory.

    The consumer always waits for the oldest job, and jobs are begun oldest first, so a full queue of a later job never
    blocks an earlier one. Use as a context manager: leaving it stops the threads.
    """

    def __init__(
        self,
        data_root: Path,
        settings: CropSettings,
        *,
        threads: int,
        budget_bytes: int,
        jobs_ahead: int | None = None,
    ) -> None:
        """`jobs_ahead`: videos that are begun before their crops are asked for; None is one more than threads."""
        self._data_root, self._settings = data_root, settings
        self._budget_bytes = budget_bytes
        self._jobs_ahead = max(threads + 1, jobs_ahead or 0)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def read(self, clips: Iterable[Sequence[Clip]]) -> Iterator[ClipCrops]:
        """The crops of all clips of `clips` (lists of one split each), in order; decoding begins with the call."""
        waiting = (job for together in clips for job in jobs_of(together))
        return self._in_order(waiting, [self._begin(job) for job in islice(waiting, self._jobs_ahead)])

    def _in_order(self, waiting: Iterator[Sequence[Clip]], running: list[_Job]) -> Iterator[ClipCrops]:
        while running:
            yield from self._results(running.pop(0))
            running += [self._begin(job) for job in islice(waiting, self._jobs_ahead - len(running))]

    def _begin(self, clips: Sequence[Clip]) -> _Job:
        spec = self._settings.views
        clip_bytes = spec.num_views(clips[0].split) * spec.num_frames * spec.crop_size**2 * 3
        room = self._budget_bytes // (self._jobs_ahead * clip_bytes)
        job = _Job(clips, queue.Queue(max(1, room)))
        self._pool.submit(self._work, job)
        return job

    def _work(self, job: _Job) -> None:
        """Decode one job into its queue; runs in a thread of the pool."""
        source = self._data_root / job.clips[0].video
        try:
            count = 0
            for crops in crop_clips(source, job.clips, self._settings, stop=self._stop):
                self._put(job, crops)
                count += 1
            if count < len(job.clips) and not self._stop.is_set():
                raise RuntimeError(f"{count} of {len(job.clips)} clips came out")
        except BaseException as error:  # noqa: BLE001  # the consumer raises it
            error.add_note(f"while reading {source}")
            self._put(job, error)

    def _put(self, job: _Job, item: ClipCrops | BaseException) -> None:
        while not self._stop.is_set():
            try:
                job.done.put(item, timeout=_POLL_SEC)
                return
            except queue.Full:
                continue

    def _results(self, job: _Job) -> Iterator[ClipCrops]:
        for _ in job.clips:
            item = job.done.get()
            if isinstance(item, BaseException):
                raise item
            yield item


def default_decode_threads(device: str) -> int:
    """One thread per core beside a GPU; half of them where the encoder needs the cores itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores if device == "cuda" else cores // 2)
