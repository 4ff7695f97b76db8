"""Decoding in processes of its own, on whatever nodes have cores free: ready crops travel to the worker that encodes.

Ray retries nothing: it would retry a decode that ran out of memory for ever. A task never waits for the encoder, since it
would keep its core meanwhile: those of a block that is decoded ahead would take the cores from the one that is encoded.
"""

import contextlib
import faulthandler
import logging
import platform
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

from vivit.pipeline.errors import StorageError
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Clip
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.storage import Location
from vivit.pipeline.video import ClipResult
from vivit.pipeline.video_location import video_at
from vivit.stage1_extract.clip_reader import (
    CLIPS_PER_JOB,
    HANG_FACTOR,
    ClipCrops,
    CropSettings,
    Watch,
    clip_bytes,
    crop_clips,
    jobs_of,
)

logger = logging.getLogger(__name__)

CRASHES_OF_SEVERAL, CRASHES_OF_ONE = 2, 3
"""Processes that a job takes with it before its clips are read one by one, and a single clip before it has crashed."""
LOSSES = 5
"""Times that a job is begun again because a node, its memory or its results were lost."""
_BEAT_SEC = 1.0
_STDERR = 2
"""The descriptor: in a worker `sys.stderr` may be no file."""
_WAIT_SEC, _GET_SEC = 5.0, 30.0


def decode_job(
    data_root: Location, clips: Sequence[Clip], settings: Sequence[CropSettings], witness: Path | None = None
) -> Iterator[ClipCrops]:
    """The crops of clips of one video, one after the other. Runs in a process of its own, which ends when it hangs.

    `witness`: see `check_node`.
    """
    stop = threading.Event()
    watch = Watch(stop)
    watch.alive_at = time.monotonic()
    limit_sec = HANG_FACTOR * settings[0].timeout_sec

    def beat() -> None:
        while watch.silent_sec < limit_sec and not stop.wait(_BEAT_SEC):
            faulthandler.dump_traceback_later(limit_sec, exit=True, file=_STDERR)

    faulthandler.dump_traceback_later(limit_sec, exit=True, file=_STDERR)
    keeper = threading.Thread(target=beat, name="beat", daemon=True)
    keeper.start()
    try:
        for crops in crop_clips(video_at(data_root, clips[0].video), clips, settings, stop=watch):
            check_node([crops.record], witness)
            watch.alive_at = None  # Ray takes them over
            yield crops
            watch.alive_at = time.monotonic()
    finally:
        stop.set()
        keeper.join()
        faulthandler.cancel_dump_traceback_later()


@dataclass(eq=False)
class _Job:
    clips: Sequence[Clip]
    results: Any = None
    """Ray's generator of the crops."""
    taken: int = 0
    """Clips whose crops came."""
    crashes: int = 0
    losses: int = 0


class RayCropStream:
    """Like `CropStream`, with Ray tasks in the place of threads: at most `processes` at a time, each for as many clips of
    a video as fit into `budget_bytes` / `processes`, one at least."""

    def __init__(
        self,
        data_root: Location,
        settings: Sequence[CropSettings],
        *,
        processes: int,
        budget_bytes: int,
        witness: Path | None = None,
    ) -> None:
        """`witness`: see `check_node`."""
        import ray

        self._ray, self._data_root, self._settings, self._witness = ray, data_root, settings, witness
        self._processes, self._budget_bytes = processes, budget_bytes
        self._running: deque[_Job] = deque()
        self._decode: Any = ray.remote(decode_job)  # ray's types know no argument with a default
        self._near = _near(ray)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for job in self._running:
            self._end(job)
        self._running.clear()

    def read(self, clips: Iterable[Sequence[Clip]]) -> Iterator[ClipCrops]:
        """The crops of all clips of `clips` (lists of one split each), in order; decoding begins with the call."""
        waiting = (job for together in clips for job in jobs_of(together, self._most(together)))
        self._begin_more(waiting)
        return self._in_order(waiting)

    def _in_order(self, waiting: Iterator[Sequence[Clip]]) -> Iterator[ClipCrops]:
        while self._running:
            yield from self._results(self._running[0])
            self._running.popleft()
            self._begin_more(waiting)

    def _begin_more(self, waiting: Iterator[Sequence[Clip]]) -> None:
        self._running += [
            self._begin(_Job(clips)) for clips in islice(waiting, self._processes - len(self._running))
        ]

    def _most(self, clips: Sequence[Clip]) -> int:
        """How many clips of one split may be a job: their crops wait for the encoder when the task is done."""
        if not clips:
            return 1
        room = self._budget_bytes // (self._processes * clip_bytes(self._settings, clips[0].split))
        return max(1, min(CLIPS_PER_JOB, room))

    def _begin(self, job: _Job) -> _Job:
        """Let a process read the clips of a job that did not come yet."""
        task = self._decode.options(
            name="decode",
            num_cpus=1,
            num_gpus=0,
            max_retries=0,
            num_returns="streaming",
            scheduling_strategy=self._near,
        )
        job.results = task.remote(self._data_root, job.clips[job.taken :], self._settings, self._witness)
        return job

    def _end(self, job: _Job) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.cancel(job.results, force=True)

    def _results(self, job: _Job) -> Iterator[ClipCrops]:
        errors = self._ray.exceptions
        while job.taken < len(job.clips):
            try:
                item = self._next(job)
            except errors.RayTaskError as error:
                raise error.cause from None
            except (errors.WorkerCrashedError, errors.OutOfMemoryError) as error:
                job.crashes += 1
                if job.crashes >= (CRASHES_OF_SEVERAL if len(job.clips) > 1 else CRASHES_OF_ONE):
                    yield from self._one_by_one(job, error)
                    return
                logger.warning("a process that decoded %s died: it is read again", job.clips[0].video)
                self._begin(job)
            except errors.RayError as error:  # a node, its memory or what it had done: not the clip's fault
                job.losses += 1
                if job.losses >= LOSSES:
                    raise
                logger.warning(
                    "decoding %s was lost (%s): it is begun again", job.clips[0].video, type(error).__name__
                )
                self._end(job)
                self._begin(job)
            else:
                job.taken += 1
                yield item

    def _next(self, job: _Job) -> ClipCrops:
        while not self._ray.wait([job.results], timeout=_WAIT_SEC, fetch_local=False)[0]:
            pass
        try:
            reference = next(job.results)
        except StopIteration:
            raise RuntimeError(f"{job.taken} of {len(job.clips)} clips came out") from None
        return self._ray.get(reference, timeout=_GET_SEC)  # type: ignore[no-any-return]

    def _one_by_one(self, job: _Job, cause: Exception) -> Iterator[ClipCrops]:
        """The crops of the clips that are left of a job that took processes with it; one clip alone has crashed."""
        left = job.clips[job.taken :]
        if len(job.clips) == 1:
            message = (
                "the process that decoded it died, hung or used up the memory, also when it read nothing else"
            )
            logger.warning("%s: %s", left[0].clip_id, message)
            yield ClipCrops(left[0], ClipResult(Outcome.CRASHED, message), None)
            return
        logger.warning(
            "processes that decoded %s died (%s): its clips are read one by one", left[0].video, cause
        )
        for clip in left:
            alone = self._begin(_Job([clip]))
            try:
                yield from self._results(alone)
            finally:
                self._end(alone)


def check_node(records: Sequence[ClipRecord], witness: Path | None) -> None:
    """StorageError where videos are missing and so is `witness`, which the driver sees: then it is this node that lacks
    them, and not the data set. None for no such video."""
    if witness is None or not any(record.outcome == Outcome.MISSING for record in records):
        return
    if not witness.is_file():
        raise StorageError(
            f"{witness} does not exist on {platform.node()}: the videos must be on a file system that all nodes share"
        )


def _near(ray: Any) -> Any:
    """On this node while it has cores free, elsewhere otherwise."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    try:
        return NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
    except TypeError:  # the parameter is not public
        return "DEFAULT"
