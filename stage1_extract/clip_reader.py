"""From videos to the crops of every view, decoded ahead of the encoder in a bounded number of threads."""

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from vivit.pipeline.manifest import Clip
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.video import ClipResult, ClipSpan, read_clips
from vivit.pipeline.views import Box, ViewSpec, span, views_of

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


@dataclass(frozen=True)
class ClipCrops:
    """One clip as the encoder wants it."""

    clip: Clip
    result: ClipResult
    crops: npt.NDArray[np.uint8] | None
    """[view, frame, height, width, channel]; None where the outcome is not usable."""
    decode_sec: float
    """Seconds that a thread spent on it."""


class ViewCutter:
    """Cuts the crops of all views of one clip out of its frames as they come (a `FrameSink`)."""

    def __init__(self, clip: Clip, settings: CropSettings) -> None:
        self._settings = settings
        self._views = views_of(settings.views, split=clip.split, seed=settings.seed, clip_id=clip.clip_id)
        self._places: dict[int, list[tuple[int, int]]] = {}
        self._boxes: dict[tuple[int, int], list[Box]] = {}
        self.crops: npt.NDArray[np.uint8] | None = None

    def plan(self, times_sec: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """The frames that the views want, each once."""
        size = self._settings.views.crop_size
        self.crops = np.zeros((len(self._views), self._settings.views.num_frames, size, size, 3), np.uint8)
        self._places = {}
        for at, view in enumerate(self._views):
            for time_index, frame in enumerate(view.frames(times_sec).tolist()):
                self._places.setdefault(frame, []).append((at, time_index))
        return np.array(sorted(self._places), dtype=np.int64)

    def add(self, index: int, picture: npt.NDArray[np.uint8]) -> None:
        """Cut frame `index`, [height, width, 3] RGB, for every view that wants it."""
        assert self.crops is not None
        image = Image.fromarray(picture)
        boxes = self._boxes_for(image.height, image.width)
        done: dict[int, npt.NDArray[np.uint8]] = {}
        for at, time_index in self._places[index]:
            if at not in done:
                done[at] = boxes[at].crop(image, self._settings.views.crop_size, self._settings.interpolation)
            self.crops[at, time_index] = done[at]

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
    started = time.perf_counter()
    with closing(read_clips(source, spans, cutters, timeout_sec=settings.timeout_sec, stop=stop)) as results:
        for at, result in results:
            now = time.perf_counter()
            ready[at] = _finished(clips[at], result, cutters[at], settings.views, now - started)
            while due in ready:
                yield ready.pop(due)
                due += 1
            started = time.perf_counter()


def _finished(
    clip: Clip, result: ClipResult, cutter: ViewCutter, views: ViewSpec, seconds: float
) -> ClipCrops:
    if result.outcome is Outcome.OK and result.num_frames < span(views):
        message = f"{result.num_frames} frames, a view reaches over {span(views)}: views start over"
        result = ClipResult(Outcome.SHORT, message, result.num_frames)
    return ClipCrops(clip, result, cutter.crops if result.outcome.usable else None, seconds)


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

    def __init__(self, data_root: Path, settings: CropSettings, *, threads: int, budget_bytes: int) -> None:
        self._data_root, self._settings, self._threads = data_root, settings, threads
        self._budget_bytes = budget_bytes
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def read(self, clips: Iterable[Sequence[Clip]]) -> Iterator[ClipCrops]:
        """The crops of all clips of `clips` (lists of one split each), in order."""
        waiting = (job for together in clips for job in jobs_of(together))
        running: list[_Job] = []
        while True:
            while len(running) < self._threads + 1 and (job := next(waiting, None)) is not None:
                running.append(self._begin(job))
            if not running:
                return
            yield from self._results(running.pop(0))

    def _begin(self, clips: Sequence[Clip]) -> _Job:
        spec = self._settings.views
        clip_bytes = spec.num_views(clips[0].split) * spec.num_frames * spec.crop_size**2 * 3
        room = self._budget_bytes // ((self._threads + 1) * clip_bytes)
        job = _Job(clips, queue.Queue(max(1, room)))
        self._pool.submit(self._work, job)
        return job

    def _work(self, job: _Job) -> None:
        """Decode one job into its queue; runs in a thread of the pool."""
        try:
            source = self._data_root / job.clips[0].video
            for crops in crop_clips(source, job.clips, self._settings, stop=self._stop):
                self._put(job, crops)
        except BaseException as error:  # noqa: BLE001  # the consumer raises it
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
