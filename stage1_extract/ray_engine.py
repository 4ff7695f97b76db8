"""Stage 1 in Ray workers: blocks are handed out one at a time, and dead workers are replaced.

Ray restarts nothing itself: a restarting actor goes on accepting calls and fails each, which would use up the attempts
of blocks that are not to blame.
"""

import logging
import os
import platform
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vivit.pipeline.cache_settings import Backbone
from vivit.pipeline.errors import BlockError, CacheError, DataError, StorageError, VivitError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.progress import Progress
from vivit.pipeline.storage import Location
from vivit.stage1_extract.blocks import (
    BlockExtractor,
    BlockReport,
    ComputedBlock,
    Seconds,
    Work,
    commit,
    create_encoder,
    joined,
)
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.ray_session import Placement, for_workers, ray_session
from vivit.stage1_extract.tally import Tally

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Times that a block is tried before the run goes on without it."""
DEATHS_BEFORE_SINGLE = 2
"""Workers that a block may take with it before its clips are tried one at a time."""
_BLOCKS_IN_WORK = 2
"""Blocks that a worker has: one goes through the encoder while the next is decoded."""
_START_SEC = 900.0
"""Longest time that all workers may take to start, weights loaded; a GPU that another job holds comes never."""
_WAIT_SEC, _GET_SEC = 5.0, 60.0


@dataclass(frozen=True)
class Loaded:
    """What a worker says of itself."""

    backbone: Backbone
    weights_file: Location | None


@dataclass(frozen=True)
class Mark:
    """A file of this run in the cache: a worker that does not see it would write elsewhere."""

    name: str
    token: str
    video: Path | None
    """A video that the driver sees."""


class Worker:
    """What runs in a process of its own: an encoder, and from `open` on a cache.

    Calls come in several threads; the encoder works for one at a time.
    """

    def __init__(self) -> None:
        self._encoding = threading.Lock()

    def load(self, config: ExtractConfig) -> Loaded:
        """Load the encoder."""
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        torch.set_num_threads(config.torch_threads)
        self._config = config
        self._encoder = create_encoder(config)
        return Loaded(self._encoder.backbone, self._encoder.weights_file)

    def open(self, mark: Mark, extractor: type[BlockExtractor]) -> int:
        """Open the cache to write, and give the process id; an error where this is another cache than the driver's."""
        config, node = self._config, platform.node()
        shared = f"worker on {node}: the cache and the videos must be on a file system that all workers share"
        try:
            token = (config.cache / mark.name).read_text()
        except OSError:
            token = ""
        if token != mark.token:
            raise CacheError(f"{config.cache} is another folder for a {shared}")
        if mark.video is not None and not mark.video.is_file():
            raise DataError(f"{mark.video} does not exist for a {shared}")
        cache = FeatureCache.open(config.cache, allow_partial=True)
        mine = config.settings(cache.settings.dataset, cache.settings.manifest_sha256, self._encoder.backbone)
        if differences := mine.differences(cache.settings):
            raise CacheError(
                f"a worker on {node} would write other features than the cache holds: "
                + "; ".join(differences)
            )
        self._extractor = extractor(self._encoder, cache, config)
        return os.getpid()

    def block(self, work: Work) -> BlockReport:
        """Compute and commit a block; it is decoded while the encoder works for another one."""
        torch.set_num_threads(self._config.torch_threads)  # holds for a thread
        with self._extractor.stream() as stream:
            crops = stream.read([self._extractor.clips(work)])
            with self._encoding:
                computed = self._extractor.compute(work, crops)
                with computed.seconds.of("write"):
                    self._extractor.commit(computed)
        return computed.report

    def rows(self, work: Work) -> ComputedBlock:
        """Compute some rows of a block, and do not commit them."""
        torch.set_num_threads(self._config.torch_threads)
        with self._extractor.stream() as stream, self._encoding:
            return self._extractor.compute(work, stream.read([self._extractor.clips(work)]))


@dataclass(eq=False)
class _Task:
    """A block, and what happened to it so far."""

    work: Work
    errors: int = 0
    deaths: int = 0
    cause: str = ""
    singles: list[ComputedBlock] = field(default_factory=list)
    """Its first rows, when they are tried one at a time."""

    @property
    def is_alone(self) -> bool:
        """Whether it has to be the only one on its worker: so that the next death is known to be its own."""
        return self.deaths > 0

    @property
    def is_single(self) -> bool:
        """Whether its clips are tried one at a time."""
        return self.deaths >= DEATHS_BEFORE_SINGLE

    @property
    def single(self) -> Work:
        """The row that is next."""
        return replace(self.work, rows=(self.work.rows[len(self.singles)],))

    def __str__(self) -> str:
        return f"{self.work.split} block {self.work.block} ({self.cause})"


@dataclass(eq=False)
class _Slot:
    """The place of one worker."""

    handle: Any
    since: float = field(default_factory=time.monotonic)
    is_ready: bool = False
    is_dead: bool = False
    tasks: list[_Task] = field(default_factory=list)

    def takes(self, task: _Task, most: int) -> bool:
        """Whether it may have this task beside those it has."""
        if not self.is_ready or self.is_dead or len(self.tasks) >= most:
            return False
        return not self.tasks or not (task.is_alone or self.tasks[0].is_alone)


@contextmanager
def ray_workers(config: ExtractConfig, extractor: type[BlockExtractor]) -> Iterator["RayWorkers"]:
    """Workers that load the encoder; they end with the `with` block."""
    with ray_session(config) as (ray, placement):
        workers = RayWorkers(ray, for_workers(config, placement), placement, extractor)
        try:
            yield workers
        finally:
            workers.end()


class RayWorkers:
    """The driver's side: which worker does what, and what came of it."""

    def __init__(
        self, ray: Any, config: ExtractConfig, placement: Placement, extractor: type[BlockExtractor]
    ) -> None:
        self._ray, self._config, self._placement, self._extractor = ray, config, placement, extractor
        self._calls: dict[Any, tuple[_Slot, _Task | None]] = {}
        """What is waited for: the call of a task, or of `load` or `open`."""
        self._slots: list[_Slot] = []
        self._mark: Mark | None = None
        self._loaded: Loaded | None = None
        self._deaths_in_row = 0
        for _ in range(placement.workers):
            self._spawn()

    def end(self) -> None:
        """Kill the workers; blocks in work are dropped."""
        for slot in self._slots:
            self._ray.kill(slot.handle, no_restart=True)

    def encoder(self) -> tuple[Backbone, Location | None]:
        """The encoder of the worker that loads it first, and the file of its weights."""
        while self._loaded is None:
            self._step()
        return self._loaded.backbone, self._loaded.weights_file

    def run(self, cache: FeatureCache, todo: Sequence[Work], tally: Tally) -> None:
        """Compute and commit the blocks; BlockError at the end where some of them failed every time."""
        if not todo:
            return
        self._cache, self._tally = cache, tally
        self._todo = deque(_Task(work) for work in todo)
        self._failed: list[_Task] = []
        with (
            self._marked(cache) as self._mark,
            Progress("extract", sum(len(work.rows) for work in todo), "clips") as self._progress,
        ):
            for slot in self._slots:
                if slot.is_ready:
                    slot.is_ready = False
                    self._open(slot)
            while self._todo or any(slot.tasks for slot in self._slots):
                self._hand_out()
                self._step()
        if self._failed:
            raise BlockError(
                f"{len(self._failed)} of {len(todo)} blocks failed {ATTEMPTS} times and are not in {cache.path}: "
                f"{', '.join(map(str, self._failed))}. The others stay; run the same command again to try these"
            )

    @contextmanager
    def _marked(self, cache: FeatureCache) -> Iterator[Mark]:
        """A file that tells this run's cache from every other."""
        part = "" if self._config.part is None else "-{}-of-{}".format(*self._config.part)
        videos = (self._config.data_root / clip.video for clip in cache.manifest.clips)
        mark = Mark(
            f".run{part}", secrets.token_hex(16), next((video for video in videos if video.is_file()), None)
        )
        path = self._config.cache / mark.name
        path.write_text(mark.token)
        try:
            yield mark
        finally:
            path.unlink(missing_ok=True)

    # --- workers ---

    def _spawn(self) -> None:
        actor = self._ray.remote(Worker).options(
            num_cpus=0 if self._placement.gpus else 1,
            num_gpus=self._placement.gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=_BLOCKS_IN_WORK,
            scheduling_strategy="SPREAD",
        )
        slot = _Slot(actor.remote())
        self._slots.append(slot)
        self._calls[slot.handle.load.remote(self._config)] = slot, None

    def _open(self, slot: _Slot) -> None:
        self._calls[slot.handle.open.remote(self._mark, self._extractor)] = slot, None

    def _replace(self, slot: _Slot, cause: str) -> None:
        """Put a new worker in the place of a dead one; BlockError when too many died with nothing done in between."""
        if slot.is_dead:
            return
        slot.is_dead = True
        self._slots.remove(slot)
        self._ray.kill(slot.handle, no_restart=True)
        self._deaths_in_row += 1
        most = 3 * self._placement.workers + 3
        if self._deaths_in_row > most:
            raise BlockError(
                f"{most} workers died one after the other and nothing was done in between, the last: {cause}. "
                "Committed blocks stay; --workers 0 shows what kills them"
            )
        logger.warning("a worker was lost and is replaced: %s", cause)
        self._spawn()

    # --- calls ---

    def _hand_out(self) -> None:
        """Give every ready worker a block; and the one after, to decode it ahead, while there are enough for all."""
        for most in range(1, _BLOCKS_IN_WORK + 1):
            for slot in self._slots:
                if most > 1 and len(self._todo) < len(self._slots):
                    return
                task = next((task for task in self._todo if slot.takes(task, most)), None)
                if task is not None:
                    self._todo.remove(task)
                    self._call(slot, task)

    def _call(self, slot: _Slot, task: _Task) -> None:
        slot.tasks.append(task)
        call = slot.handle.rows.remote(task.single) if task.is_single else slot.handle.block.remote(task.work)
        self._calls[call] = slot, task

    def _step(self) -> None:
        """Wait for a call to end, for some seconds, and go on from what it gave."""
        done, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=_WAIT_SEC, fetch_local=False)
        if not done:
            self._check_start()
        for call in done:
            slot, task = self._calls.pop(call)
            if task is not None:
                slot.tasks.remove(task)
            try:
                result = self._ray.get(call, timeout=_GET_SEC)
            except self._ray.exceptions.RayTaskError as error:
                self._raised(slot, task, error.cause)
            except self._ray.exceptions.RayError as error:
                self._died(slot, task, _first_line(error))
            else:
                self._succeeded(slot, task, result)

    def _check_start(self) -> None:
        """BlockError where no worker ever comes up."""
        waited = time.monotonic() - min(slot.since for slot in self._slots)
        if waited > _START_SEC and not any(slot.is_ready for slot in self._slots):
            raise BlockError(
                f"no worker started within {waited:.0f} s: `ray status` shows whether other jobs hold the GPUs"
            )

    def _succeeded(self, slot: _Slot, task: _Task | None, result: Any) -> None:
        if isinstance(result, Loaded):
            self._loaded = self._loaded or result
            if self._mark is None:
                slot.is_ready = True  # `run` opens the cache
            else:
                self._open(slot)
            return
        if task is None:
            slot.is_ready = True
            logger.debug("worker in process %d is ready", result)
            return
        self._deaths_in_row = 0
        if isinstance(result, ComputedBlock):
            self._single_done(task, result)
        else:
            self._block_done(result)

    def _raised(self, slot: _Slot, task: _Task | None, error: BaseException) -> None:
        """An error in a worker that lives: of ours, it is the user's to solve; of its start, the worker is given up."""
        if isinstance(error, StorageError) or (task is None and isinstance(error, VivitError)):
            raise error
        cause = f"{type(error).__name__}: {_first_line(error)}"
        if task is None:
            self._replace(slot, cause)
            return
        task.errors += 1
        self._again(task, cause)

    def _died(self, slot: _Slot, task: _Task | None, cause: str) -> None:
        self._replace(slot, cause)
        if task is None:
            return
        was_single = task.is_single
        task.deaths += 1
        if was_single:
            self._single_done(task, self._crashed(task, cause))
        else:
            self._again(task, f"its worker died {task.deaths} times, {cause}")

    def _again(self, task: _Task, cause: str) -> None:
        """Try a block again, or put it on the list of failed ones."""
        task.cause = cause
        if task.errors >= ATTEMPTS:
            self._failed.append(task)
            logger.error("%s failed %d times, the run goes on without it", task, ATTEMPTS)
            return
        if task.work.is_retry:
            task.work = self._whole_if_lost(task.work)
        logger.warning("%s is tried again%s", task, ", clip by clip" if task.is_single else "")
        self._todo.append(task)

    def _whole_if_lost(self, work: Work) -> Work:
        """A committed block that a worker was about to write anew is lost when the worker dies at the wrong moment."""
        now = FeatureCache.open(self._cache.path, allow_partial=True)
        if work.block not in now.missing_blocks(work.split):
            return work
        rows = tuple(range(*now.rows(work.split, work.block)))
        return replace(work, rows=rows, is_retry=False)

    # --- results ---

    def _block_done(self, report: BlockReport) -> None:
        self._tally.seconds.add(report.seconds)
        self._tally.blocks += 1
        self._progress.advance(len(report.records))
        for record in report.records:
            self._tally.clip(record, 0)
        self._tally.crops += report.crops
        self._progress.advance(0, str(self._tally))

    def _single_done(self, task: _Task, row: ComputedBlock) -> None:
        """Go on with the next clip of a block; after the last commit it."""
        task.singles.append(row)
        if len(task.singles) < len(task.work.rows):
            self._todo.appendleft(task)
            return
        whole = joined(task.work, task.singles)
        with whole.seconds.of("write"):
            commit(self._cache, whole)
        self._block_done(whole.report)

    def _crashed(self, task: _Task, cause: str) -> ComputedBlock:
        """The row of a clip that took its worker with it when it was alone."""
        (row,) = task.single.rows
        clip = self._cache.manifest.of_split(task.work.split)[row]
        message = f"the process that read it died, also when it read nothing else: {cause}"
        record = ClipRecord(clip_id=clip.clip_id, outcome=Outcome.CRASHED.value, message=message)
        logger.warning("%s: %s", clip.clip_id, message)
        shape = (1, *self._cache.shape(task.work.split)[1:])
        return ComputedBlock(task.single, [record], Seconds(), 0, np.zeros(shape, np.float16), {})


def _first_line(error: BaseException) -> str:
    """What Ray says, without colours and traces."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__
