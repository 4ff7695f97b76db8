"""Stage 1 in Ray workers: blocks are handed out one at a time, and dead workers are replaced.

Ray restarts nothing itself: a restarting actor goes on accepting calls and fails each, which would use up the attempts
of blocks that are not to blame.
"""

import logging
import re
import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from vivit.pipeline.cache_settings import Backbone
from vivit.pipeline.errors import BlockError, ConfigError, StorageError, VivitError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.storage import Location
from vivit.pipeline.video_location import first_local
from vivit.stage1_extract.blocks import (
    BlockExtractor,
    BlockFeatures,
    BlockReport,
    ComputedBlock,
    Seconds,
    Work,
    commit,
    joined,
)
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.ray_session import Placement, for_workers, placement_on, ray_session
from vivit.stage1_extract.ray_worker import BlockKey, Loaded, Mark, Worker
from vivit.stage1_extract.tally import InWork, Tally, WorkerTally

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Times that a block is tried before the run goes on without it."""
DEATHS_BEFORE_SINGLE = 2
"""Workers that a block may take with it before its clips are tried one at a time."""
ERRORS_IN_ROW = 2
"""Blocks that a worker may fail one after the other before it is replaced: after some errors of a GPU, all calls fail."""
_BLOCKS_IN_WORK = 2
"""Blocks that a worker has: one goes through the encoder while the next is decoded."""
_START_SEC = 900.0
"""Longest time that all workers may take to start, weights loaded; a GPU that another job holds comes never."""
_WAIT_SEC, _GET_SEC = 5.0, 60.0
_PULSE_SEC = 1.0
_GROW_SEC = 10.0
_DRAIN_SEC = 60.0
_MOST_NAMED = 10
"""Failed blocks that an error names."""


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
    """When it was begun, or told to open the caches."""
    is_ready: bool = False
    is_dead: bool = False
    tasks: list[_Task] = field(default_factory=list)
    name: str = ""
    """Empty until it has loaded the encoder."""
    tally: WorkerTally | None = None
    """From the beginning of the run on."""
    asked_at: float = 0.0
    """When it was last asked for its pulse."""
    is_asked: bool = False
    """Whether the answer is still to come."""
    errors_in_row: int = 0
    """Blocks that failed in it since the last one that did not."""

    @property
    def is_spent(self) -> bool:
        """Whether it gets no more blocks, and is replaced when it has none."""
        return self.errors_in_row >= ERRORS_IN_ROW

    def has_room(self, most: int) -> bool:
        """Whether it may have another task at all."""
        if not self.is_ready or self.is_spent or len(self.tasks) >= most:
            return False
        return not self.tasks or not self.tasks[0].is_alone

    def takes(self, task: _Task) -> bool:
        """Whether it may have this task beside those it has, where there is room."""
        return not (self.tasks and task.is_alone)

    def show(self, done: dict[BlockKey, InWork]) -> None:
        """Take over what is done of the blocks that it still has."""
        keys = {(task.work.split, task.work.block) for task in self.tasks}
        if self.tally is not None:
            self.tally.state = "lost" if self.is_dead else "works" if self.tasks else "ready"
            self.tally.in_work = InWork.sum(part for key, part in done.items() if key in keys)


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a worker that is waited for."""

    slot: _Slot
    kind: Literal["load", "open", "preflight", "work", "pulse"]
    task: _Task | None = None


@contextmanager
def ray_workers(configs: Sequence[ExtractConfig], extractor: type[BlockExtractor]) -> Iterator["RayWorkers"]:
    """Workers that load the encoders; they end with the `with` block."""
    with ray_session(configs[0]) as (ray, placement):
        workers = RayWorkers(ray, configs, placement, extractor)
        try:
            yield workers
        finally:
            workers.end()


class RayWorkers:
    """The driver's side: which worker does what, and what came of it."""

    def __init__(
        self,
        ray: Any,
        configs: Sequence[ExtractConfig],
        placement: Placement,
        extractor: type[BlockExtractor],
    ) -> None:
        """`configs`: as the user gave them, one for each encoder."""
        self._ray, self._placement, self._extractor = ray, placement, extractor
        self._asked = configs[0]
        self._configs = [for_workers(config, placement) for config in configs]
        self._calls: dict[Any, _Call] = {}
        self._slots: list[_Slot] = []
        self._mark: Mark | None = None
        self._loaded: Loaded | None = None
        self._tally: Tally | None = None
        self._preflight: Work | None = None
        """A clip that a worker has to read before the blocks are handed out."""
        self._is_passed = False
        self._deaths_in_row = 0
        self._grown_at = time.monotonic()
        for _ in range(placement.workers):
            self._spawn()

    def end(self) -> None:
        """Kill the workers; blocks in work are dropped."""
        for slot in self._slots:
            self._ray.kill(slot.handle, no_restart=True)

    def encoders(self) -> list[tuple[Backbone, Location | None]]:
        """The encoders of the worker that loads them first, and the files of their weights."""
        while self._loaded is None:
            self._step()
        return self._loaded.encoders

    def run(self, caches: Sequence[FeatureCache], todo: Sequence[Work], tally: Tally) -> None:
        """Compute and commit the blocks; BlockError at the end where some of them failed every time."""
        if not todo:
            return
        self._caches, self._tally = caches, tally
        self._todo = deque(_Task(work) for work in todo)
        self._preflight = replace(todo[0], rows=todo[0].rows[:1])
        self._failed: list[_Task] = []
        with self._marked() as self._mark, tally.shown(sum(len(work.rows) for work in todo)):
            for slot in self._slots:
                if slot.is_ready:
                    slot.is_ready = False
                    self._open(slot)
            try:
                while self._todo or self._num_in_work:
                    for cache in caches:
                        cache.check_held()
                    self._grow()
                    self._hand_out()
                    self._ask_for_pulses()
                    self._step()
            except KeyboardInterrupt:
                self._drain()
                raise
        if self._failed:
            named = ", ".join(map(str, self._failed[:_MOST_NAMED]))
            others = len(self._failed) - _MOST_NAMED
            raise BlockError(
                f"{len(self._failed)} of {len(todo)} blocks failed {ATTEMPTS} times and are not in {caches[0].path}: "
                f"{named}{f' and {others} others' if others > 0 else ''}. "
                "The others stay; run the same command again to try these"
            )

    @property
    def _num_in_work(self) -> int:
        """Blocks whose calls did not end yet: those of a lost worker end when each call is seen to have failed."""
        return sum(call.task is not None for call in self._calls.values())

    def _drain(self) -> None:
        """Let the blocks in work be committed, for some time."""
        if not self._num_in_work:
            return
        logger.warning(
            "interrupted: the blocks in work (%d) are finished first, for at most %d s; once more stops at once",
            self._num_in_work, _DRAIN_SEC,
        )  # fmt: skip
        deadline = time.monotonic() + _DRAIN_SEC
        while self._num_in_work and time.monotonic() < deadline:
            self._ask_for_pulses()
            self._step()

    @contextmanager
    def _marked(self) -> Iterator[Mark]:
        """A file in each cache that tells this run's from every other."""
        config = self._configs[0]
        part = "" if config.part is None else "-{}-of-{}".format(*config.part)
        videos = (clip.video for clip in self._caches[0].manifest.clips)
        mark = Mark(f".run{part}", secrets.token_hex(16), first_local(config.data_root, videos))
        with ExitStack() as cleanup:
            for config in self._configs:
                path = config.cache / mark.name
                path.write_text(mark.token)
                cleanup.callback(path.unlink, missing_ok=True)
            yield mark

    # --- workers ---

    def _spawn(self) -> None:
        actor = self._ray.remote(concurrency_groups={"pulse": 1})(Worker).options(
            num_cpus=0 if self._placement.gpus else 1,
            num_gpus=self._placement.gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=_BLOCKS_IN_WORK,
            scheduling_strategy="SPREAD",
        )
        slot = _Slot(actor.remote())
        self._slots.append(slot)
        self._calls[slot.handle.load.remote(self._configs)] = _Call(slot, "load")

    def _open(self, slot: _Slot) -> None:
        slot.since = time.monotonic()
        self._calls[slot.handle.open.remote(self._mark, self._extractor)] = _Call(slot, "open")

    def _replace(self, slot: _Slot, cause: str) -> None:
        """Put a new worker in the place of a dead one; BlockError when too many died with nothing done in between."""
        if slot.is_dead:
            return
        slot.is_dead = True
        slot.show({})
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
        self._log("worker", worker=slot.name, state="lost", cause=cause)
        self._spawn()

    def _grow(self) -> None:
        """More workers where nodes have joined a cluster whose size decides how many there are."""
        if self._asked.workers is not None or self._asked.address in (None, "local"):
            return
        if time.monotonic() - self._grown_at < _GROW_SEC:
            return
        self._grown_at = time.monotonic()
        try:
            room = placement_on(self._ray, self._asked)
        except ConfigError:  # nodes have left: what is lost is seen elsewhere
            return
        for _ in range(len(self._slots), room.workers):
            logger.info("the cluster has grown: one worker more")
            self._spawn()

    def _log(self, event: str, **values: Any) -> None:
        if self._tally is not None:
            self._tally.log.write(event, **values)

    # --- calls ---

    def _hand_out(self) -> None:
        """Give every ready worker a block; and the one after, to decode it ahead, while there are enough for all."""
        if not self._is_passed:
            return
        for most in range(1, _BLOCKS_IN_WORK + 1):
            for slot in self._slots:
                if most > 1 and len(self._todo) < len(self._slots):
                    return
                if not slot.has_room(most):
                    continue
                task = next((task for task in self._todo if slot.takes(task)), None)
                if task is not None:
                    self._todo.remove(task)
                    self._call(slot, task)

    def _call(self, slot: _Slot, task: _Task) -> None:
        slot.tasks.append(task)
        call = slot.handle.rows.remote(task.single) if task.is_single else slot.handle.block.remote(task.work)
        self._calls[call] = _Call(slot, "work", task)

    def _ask_for_pulses(self) -> None:
        for slot in self._slots:
            if slot.tasks and not slot.is_asked and time.monotonic() - slot.asked_at >= _PULSE_SEC:
                slot.asked_at, slot.is_asked = time.monotonic(), True
                pulse = slot.handle.pulse.options(concurrency_group="pulse")
                self._calls[pulse.remote()] = _Call(slot, "pulse")

    def _step(self) -> None:
        """Wait for a call to end, for some seconds, and go on from what it gave."""
        done, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=_WAIT_SEC, fetch_local=False)
        if not done:
            self._check_start()
        for reference in done:
            call = self._calls.pop(reference)
            if call.task in call.slot.tasks:
                call.slot.tasks.remove(call.task)
            try:
                result = self._ray.get(reference, timeout=_GET_SEC)
            except self._ray.exceptions.RayTaskError as error:
                self._raised(call, error.cause)
            except self._ray.exceptions.RayError as error:
                self._died(call, _first_line(error))
            else:
                self._succeeded(call, result)

    def _check_start(self) -> None:
        """BlockError where no worker ever comes up."""
        # since the last one was begun: some may wait for ever for a GPU, beside those that come and go
        waited = time.monotonic() - max(slot.since for slot in self._slots)
        if waited > _START_SEC and not any(slot.is_ready for slot in self._slots):
            raise BlockError(
                f"no worker started within {waited:.0f} s: `ray status` shows whether other jobs hold the GPUs"
            )

    def _succeeded(self, call: _Call, result: Any) -> None:
        slot = call.slot
        if call.kind == "load":
            slot.name = result.name
            self._loaded = self._loaded or result
            if self._mark is None:
                slot.is_ready = True  # `run` opens the cache
            else:
                self._open(slot)
        elif call.kind == "open":
            self._opened(slot)
        elif call.kind == "preflight":
            self._passed(slot, result)
        elif call.kind == "pulse":
            slot.is_asked = False
            if not slot.is_dead:
                slot.show(result)
                self._shown.changed()
        elif call.task is not None:
            self._deaths_in_row = slot.errors_in_row = 0
            if isinstance(result, ComputedBlock):
                self._single_done(slot, call.task, result)
            else:
                self._block_done(slot, result)

    def _opened(self, slot: _Slot) -> None:
        """Let the first worker that opens the cache read one clip; the others wait for it."""
        slot.tally = self._shown.worker(slot.name)
        slot.is_ready = True
        self._log("worker", worker=slot.name, state="ready")
        work, self._preflight = self._preflight, None
        if work is not None:
            self._calls[slot.handle.rows.remote(work)] = _Call(slot, "preflight")

    def _passed(self, slot: _Slot, first: ComputedBlock) -> None:
        """A worker has read, decoded and encoded a clip: it can work."""
        self._is_passed = True
        record = first.records[0]
        self._log("preflight", worker=slot.name, clip_id=record.clip_id, outcome=record.outcome)

    def _raised(self, call: _Call, error: BaseException) -> None:
        """An error in a worker that lives: of the first start, it is the user's to solve; later, a worker that does not
        come up is given up, and a block is tried again."""
        if call.kind == "pulse":
            call.slot.is_asked = False
            return
        is_start = call.kind in ("load", "open")
        if is_start and not self._is_passed and isinstance(error, VivitError):
            raise error
        cause = f"{type(error).__name__}: {_first_line(error)}"
        if call.kind == "preflight":
            raise BlockError(
                f"a worker ({call.slot.name}) cannot read, decode and encode the first clip: {cause}. "
                "Nothing was begun; --workers 0 shows whether this machine can"
            ) from error
        if call.task is None:
            self._replace(call.slot, cause)
            return
        call.task.errors += 1
        if isinstance(error, StorageError) and call.task.errors >= ATTEMPTS:
            raise error  # the others would meet it too
        self._again(call.task, cause)
        if not isinstance(error, StorageError):
            call.slot.errors_in_row += 1
        if call.slot.is_spent and not call.slot.tasks:
            self._replace(call.slot, f"it failed {call.slot.errors_in_row} times in a row, {cause}")

    def _died(self, call: _Call, cause: str) -> None:
        self._replace(call.slot, cause)
        self._is_passed |= call.kind == "preflight"  # the clip's block will find it out
        if call.task is None:
            return
        task = call.task
        was_single = task.is_single
        task.deaths += 1
        if was_single:
            self._single_done(call.slot, task, self._crashed(task, cause))
        else:
            self._again(task, f"its worker died {task.deaths} times, {cause}")

    def _again(self, task: _Task, cause: str) -> None:
        """Try a block again, or put it on the list of failed ones."""
        task.cause = cause
        self._log("retry", split=task.work.split, block=task.work.block, errors=task.errors, cause=cause)
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
        for target in work.targets:
            now = FeatureCache.open(self._caches[target].path, allow_partial=True)
            if work.block in now.missing_blocks(work.split, work.views):
                return replace(work, rows=tuple(range(*now.rows(work.split, work.block))), is_retry=False)
        return work

    # --- results ---

    @property
    def _shown(self) -> Tally:
        if self._tally is None:
            raise RuntimeError("there is no run")
        return self._tally

    def _block_done(self, slot: _Slot, report: BlockReport) -> None:
        slot.show({})
        self._shown.block(self._shown.worker(slot.name), report)

    def _single_done(self, slot: _Slot, task: _Task, row: ComputedBlock) -> None:
        """Go on with the next clip of a block; after the last commit it."""
        task.singles.append(row)
        if len(task.singles) < len(task.work.rows):
            self._todo.appendleft(task)
            return
        whole = joined(task.work, task.singles)
        with whole.seconds.of("write"):
            commit(self._caches, whole)
        self._block_done(slot, whole.report)

    def _crashed(self, task: _Task, cause: str) -> ComputedBlock:
        """The row of a clip that took its worker with it when it was alone."""
        (row,) = task.single.rows
        clip = self._caches[0].manifest.of_split(task.work.split)[row]
        message = f"the process that read it died, also when it read nothing else: {cause}"
        records = [ClipRecord(clip_id=clip.clip_id, outcome=Outcome.CRASHED.value, message=message)]
        logger.warning("%s: %s", clip.clip_id, message)
        parts = [
            BlockFeatures(target, records, np.zeros(task.single.shape(self._caches[target]), np.float16), {})
            for target in task.work.targets
        ]
        return ComputedBlock(task.single, records, Seconds(), 0, parts)


def _first_line(error: BaseException) -> str:
    """What Ray says, without colours and traces."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__
