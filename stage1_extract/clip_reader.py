"""From videos to the crops of every view, decoded ahead of the encoder in a bounded number of threads."""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from typing import Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Clip
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.storage import Location
from vivit.pipeline.video import ClipResult, ClipSpan, read_clips
from vivit.pipeline.video_location import VideoSource, video_at
from vivit.pipeline.views import Box, ViewSpec, resample, span, views_of

logger = logging.getLogger(__name__)

CLIPS_PER_JOB = 8
"""Clips of one video that one thread reads in one pass."""
HANG_FACTOR = 1.5
"""A decoder that gives no sign of life for this many times the time limit of a clip is given up."""
_POLL_SEC = 0.1
_JOIN_SEC = 10.0


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


def clip_bytes(settings: Sequence[CropSettings], split: str) -> int:
    """Size of the crops of one clip."""
    return sum(
        each.views.num_views(split) * each.views.num_frames * each.views.crop_size**2 * 3 for each in settings
    )


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
    crops_of: tuple[npt.NDArray[np.uint8], ...] | None
    """For each of the settings [view, frame, height, width, channel]; None where the outcome is not usable."""

    @property
    def crops(self) -> npt.NDArray[np.uint8] | None:
        """Those of the first, and mostly the only, settings."""
        return None if self.crops_of is None else self.crops_of[0]

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


class _Cutters:
    """Cuts the crops of one clip for several settings out of the same frames (a `FrameSink`)."""

    def __init__(self, clip: Clip, settings: Sequence[CropSettings]) -> None:
        self._cutters = [ViewCutter(clip, each) for each in settings]
        self._wanted: list[set[int]] = []

    def plan(self, times_sec: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """The frames that any of them wants, each once."""
        plans = [cutter.plan(times_sec) for cutter in self._cutters]
        self._wanted = [set(plan.tolist()) for plan in plans]
        return np.unique(np.concatenate(plans))

    def add(self, index: int, picture: npt.NDArray[np.uint8]) -> None:
        """Cut frame `index`, [height, width, 3] RGB, for those that want it."""
        for cutter, wanted in zip(self._cutters, self._wanted, strict=True):
            if index in wanted:
                cutter.add(index, picture)

    @property
    def num_shown(self) -> int:
        """Frames that the views choose from: the settings differ in space only."""
        return self._cutters[0].num_shown

    def hand_over(self) -> tuple[npt.NDArray[np.uint8], ...] | None:
        """The crops for each of the settings; None where no frame came."""
        crops = [cutter.hand_over() for cutter in self._cutters]
        return (
            None if any(each is None for each in crops) else tuple(each for each in crops if each is not None)
        )


def crop_clips(
    source: VideoSource,
    clips: Sequence[Clip],
    settings: CropSettings | Sequence[CropSettings],
    *,
    stop: threading.Event | None = None,
) -> Iterator[ClipCrops]:
    """The crops of clips of one video, in the order given, from one pass over it.

    Several settings have the same views in time, and their clips the same outcomes.
    """
    several = [settings] if isinstance(settings, CropSettings) else settings
    settings = several[0]
    cutters = [_Cutters(clip, several) for clip in clips]
    spans = [ClipSpan(clip.start_sec, clip.end_sec) for clip in clips]
    ready: dict[int, ClipCrops] = {}
    due = 0
    with closing(read_clips(source, spans, cutters, timeout_sec=settings.timeout_sec, stop=stop)) as results:
        for at, result in results:
            ready[at] = _finished(clips[at], result, cutters[at], settings.views)
            while due in ready:
                yield ready.pop(due)
                due += 1


def _finished(clip: Clip, result: ClipResult, cutter: _Cutters, views: ViewSpec) -> ClipCrops:
    if result.outcome is Outcome.OK and cutter.num_shown < span(views):
        message = f"{cutter.num_shown} frames, a view reaches over {span(views)}: views start over"
        result = ClipResult(Outcome.SHORT, message, result.num_frames)
    crops = cutter.hand_over()
    return ClipCrops(clip, result, crops if result.outcome.usable else None)


def jobs_of(clips: Sequence[Clip], most: int = CLIPS_PER_JOB) -> Iterator[list[Clip]]:
    """Neighbouring clips of the same video, at most so many together."""
    for _, same in groupby(clips, key=lambda clip: clip.video):
        together = list(same)
        for start in range(0, len(together), most):
            yield together[start : start + most]


class Watch(threading.Event):
    """What a decoder asks, packet by packet, whether to stop: each question is a sign of life."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__()
        self._stream_stops = stop
        self.alive_at: float | None = None
        """`time.monotonic()` of the last sign; None while nothing is decoded."""

    def is_set(self) -> bool:
        self.alive_at = time.monotonic()
        return super().is_set() or self._stream_stops.is_set()

    @property
    def silent_sec(self) -> float:
        """Seconds since the last sign of life of a decoder at work."""
        return 0.0 if self.alive_at is None else time.monotonic() - self.alive_at


@dataclass
class _Job:
    clips: Sequence[Clip]
    done: queue.Queue[ClipCrops | BaseException]
    watch: Watch
    thread: threading.Thread | None = None
    """The one that decodes it, from its beginning on."""


class CropStream:
    """Crops of many clips in row order, decoded ahead by `threads` threads within `budget_bytes` of memory.

    The consumer always waits for the oldest job, and jobs are begun oldest first, so a full queue of a later job never
    blocks an earlier one. A decoder that hangs loses its thread; its clips are read again one by one, and the one that
    hangs alone has timed out. Use as a context manager: leaving it stops the threads.
    """

    def __init__(
        self,
        data_root: Location,
        settings: CropSettings | Sequence[CropSettings],
        *,
        threads: int,
        budget_bytes: int,
        jobs_ahead: int | None = None,
    ) -> None:
        """`jobs_ahead`: videos that are begun before their crops are asked for; None is one more than threads."""
        self._data_root = data_root
        self._settings = [settings] if isinstance(settings, CropSettings) else list(settings)
        self._hang_sec = HANG_FACTOR * self._settings[0].timeout_sec
        self._budget_bytes = budget_bytes
        self._jobs_ahead = max(threads + 1, jobs_ahead or 0)
        self._stop = threading.Event()
        self._begun: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._ending: list[_Job] = []
        """Jobs whose crops all came, and whose video may still have to be closed."""
        for _ in range(threads):
            self._threads.append(_started(self._serve))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for _ in self._threads:
            self._begun.put(None)
        deadline = time.monotonic() + _JOIN_SEC
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def read(self, clips: Iterable[Sequence[Clip]]) -> Iterator[ClipCrops]:
        """The crops of all clips of `clips` (lists of one split each), in order; decoding begins with the call."""
        waiting = (job for together in clips for job in jobs_of(together))
        return self._in_order(waiting, [self._begin(job) for job in islice(waiting, self._jobs_ahead)])

    def _in_order(self, waiting: Iterator[Sequence[Clip]], running: list[_Job]) -> Iterator[ClipCrops]:
        while running:
            job = running.pop(0)
            yield from self._results(job)
            self._ending = [*self._still_ending(), job]
            running += [self._begin(job) for job in islice(waiting, self._jobs_ahead - len(running))]

    def _job(self, clips: Sequence[Clip]) -> _Job:
        room = self._budget_bytes // (self._jobs_ahead * clip_bytes(self._settings, clips[0].split))
        return _Job(clips, queue.Queue(max(1, room)), Watch(self._stop))

    def _begin(self, clips: Sequence[Clip]) -> _Job:
        job = self._job(clips)
        self._begun.put(job)
        return job

    def _serve(self) -> None:
        """Decode jobs, the oldest first; runs in a thread."""
        while (job := self._begun.get()) is not None and not self._stop.is_set():
            self._work(job)

    def _work(self, job: _Job) -> None:
        """Decode one job into its queue."""
        job.thread = threading.current_thread()
        job.watch.alive_at = time.monotonic()
        try:
            count = 0
            source = video_at(self._data_root, job.clips[0].video)
            for crops in crop_clips(source, job.clips, self._settings, stop=job.watch):
                self._put(job, crops)
                count += 1
            if count < len(job.clips) and not job.watch.is_set():
                raise RuntimeError(f"{count} of {len(job.clips)} clips came out")
        except BaseException as error:  # noqa: BLE001  # the consumer raises it
            error.add_note(f"while reading {job.clips[0].video}")
            self._put(job, error)
        job.watch.alive_at = None

    def _put(self, job: _Job, item: ClipCrops | BaseException) -> None:
        while not job.watch.is_set():
            try:
                job.done.put(item, timeout=_POLL_SEC)
                return
            except queue.Full:
                continue

    def _results(self, job: _Job) -> Iterator[ClipCrops]:
        for at in range(len(job.clips)):
            item = self._next(job)
            if item is None:
                yield from self._after_hang(job.clips[at:])
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _next(self, job: _Job) -> ClipCrops | BaseException | None:
        """What comes next of a job; None where its decoder hangs, which is given up."""
        while True:
            try:
                return job.done.get(timeout=_POLL_SEC)
            except queue.Empty:
                self._replace_hung_enders()
                if job.watch.silent_sec < self._hang_sec:
                    continue
            self._give_up(job)
            return None

    def _replace_hung_enders(self) -> None:
        """Give up the threads that hang after their last clip: the next job may wait for one of them."""
        self._ending = self._still_ending()
        for job in [job for job in self._ending if job.watch.silent_sec >= self._hang_sec]:
            self._ending.remove(job)
            self._give_up(job)

    def _still_ending(self) -> list[_Job]:
        return [job for job in self._ending if job.watch.alive_at is not None]

    def _give_up(self, job: _Job) -> None:
        """Leave a decoder that hangs to itself, and put a new thread in the place of its."""
        job.watch.set()
        if job.thread in self._threads:
            self._threads.remove(job.thread)
            self._threads.append(_started(self._serve))

    def _after_hang(self, clips: Sequence[Clip]) -> Iterator[ClipCrops]:
        """The crops of clips whose decoder hung, each from a pass of its own; one clip alone has hung itself."""
        if len(clips) == 1:
            message = f"the decoder hung: no sign of life for {self._hang_sec:g} s"
            logger.warning("%s: %s", clips[0].clip_id, message)
            yield ClipCrops(clips[0], ClipResult(Outcome.TIMEOUT, message), None)
            return
        logger.warning("a decoder of %s hangs: its clips are read one by one", clips[0].video)
        for clip in clips:
            job = self._job([clip])
            _started(partial(self._work, job))  # the others may all wait until theirs are asked for
            yield from self._results(job)


def _started(work: Callable[[], None]) -> threading.Thread:
    """A thread at work, a daemon: one that hangs must not keep the process from ending."""
    thread = threading.Thread(target=work, name="decode", daemon=True)
    thread.start()
    return thread


def default_decode_threads(device: str) -> int:
    """One thread per core beside a GPU; half of them where the encoder needs the cores itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores if device == "cuda" else cores // 2)
