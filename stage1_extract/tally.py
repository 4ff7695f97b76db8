"""What a run of stage 1 has done so far, whichever engine does the work: counted, shown and logged."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table

from vivit.pipeline.errors import DataError
from vivit.pipeline.progress import PLAIN_INTERVAL_SEC, Progress
from vivit.stage1_extract.blocks import BlockReport, Seconds
from vivit.stage1_extract.event_log import EventLog

HINTS = {
    "decode": "more --decode-threads or --decode-workers, or smaller files (vivit pack --resize)",
    "encode": "more or faster GPUs (--workers), --precision bfloat16, or a smaller --backbone",
    "write": "faster storage for the cache, or --codec zstd",
}
"""What to turn where a run waits for this."""


@dataclass
class InWork:
    """What a worker has done of blocks that are not committed."""

    clips: int = 0
    crops: int = 0
    seconds: Seconds = field(default_factory=Seconds)

    @classmethod
    def sum(cls, parts: Iterable["InWork"]) -> "InWork":
        """All of them together."""
        total = cls()
        for part in parts:
            total.clips += part.clips
            total.crops += part.crops
            total.seconds.add(part.seconds)
        return total


@dataclass
class WorkerTally:
    """What one worker has committed."""

    name: str
    state: str = "starts"
    """`starts`, `works`, `ready` or `lost`."""
    blocks: int = 0
    clips: int = 0
    crops: int = 0
    seconds: Seconds = field(default_factory=Seconds)
    in_work: InWork = field(default_factory=InWork)
    since: float = field(default_factory=time.perf_counter)

    @property
    def live_seconds(self) -> Seconds:
        """Where its time went, blocks in work included."""
        total = Seconds()
        total.add(self.seconds)
        total.add(self.in_work.seconds)
        return total

    def summary(self) -> dict[str, Any]:
        """Its counts, its rates and the shares of its time."""
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        crops, clips = self.crops + self.in_work.crops, self.clips + self.in_work.clips
        return {
            "worker": self.name,
            "state": self.state,
            "blocks": self.blocks,
            "clips": clips,
            "clips_per_sec": round(clips / elapsed, 3),
            "crops_per_sec": round(crops / elapsed, 2),
            "shares": {name: round(share, 4) for name, share in self.live_seconds.shares.items()},
        }


class Tally:
    """Counts of one run, and the limit of clips without features. Use `shown` around the work."""

    def __init__(
        self, *, failed: Iterable[tuple[str, int]], max_failures: int | None, log: EventLog | None = None
    ) -> None:
        """`failed`: (split, row) of the clips that have no features already and are not tried again."""
        self._failed, self._max_failures = set(failed), max_failures
        self.failures: Counter[str] = Counter()
        """Clips of this run that are not complete, by outcome."""
        self.workers: dict[str, WorkerTally] = {}
        self.log = log or EventLog(None)
        self._progress: Progress | None = None
        self._total = 0
        self._started = self._logged = time.perf_counter()

    # --- counting ---

    def worker(self, name: str) -> WorkerTally:
        """The tally of a worker, which is new at the first time."""
        return self.workers.setdefault(name, WorkerTally(name))

    def block(self, worker: WorkerTally, report: BlockReport) -> None:
        """Count a committed block; DataError when more clips have no features than there may be."""
        worker.blocks += 1
        worker.clips += len(report.records)
        worker.crops += report.crops
        worker.seconds.add(report.seconds)
        work = report.work
        self.log.write(
            "block", split=work.split, block=work.block, clips=len(report.records), crops=report.crops,
            worker=worker.name, seconds={name: round(value, 3) for name, value in vars(report.seconds).items()},
        )  # fmt: skip
        for record in report.records:
            if not record.complete:
                self.failures[record.outcome] += 1
                self.log.write("clip", split=work.split, **vars(record))
        # each once, however many views and caches it is read for
        self._failed |= {
            (work.split, row)
            for row, record in zip(work.rows, report.records, strict=True)
            if not record.usable
        }
        self.changed()
        limit = self._max_failures
        if limit is not None and self.failed > limit:
            last = next((r for r in reversed(report.records) if not r.usable), None)
            named = "" if last is None else f" (the last: {last.clip_id}, {last.outcome}: {last.message})"
            raise DataError(
                f"more than {limit} clips have no features{named}. "
                "Committed blocks stay; raise --max-failures to go on"
            )

    @property
    def failed(self) -> int:
        """Clips without features, those of earlier runs included."""
        return len(self._failed)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._started

    @property
    def seconds(self) -> Seconds:
        """Where the time of all workers went."""
        total = Seconds()
        for worker in self.workers.values():
            total.add(worker.live_seconds)
        return total

    @property
    def blocks(self) -> int:
        return sum(worker.blocks for worker in self.workers.values())

    @property
    def crops(self) -> int:
        """Frame crops that were encoded, those of blocks in work included."""
        return sum(worker.crops + worker.in_work.crops for worker in self.workers.values())

    @property
    def clips(self) -> int:
        """Clips that are done, those of blocks in work included."""
        return sum(worker.clips + worker.in_work.clips for worker in self.workers.values())

    @property
    def advice(self) -> str:
        """What limits the run, and what to turn to go faster; empty at the beginning."""
        limit, share = self.seconds.limit
        return f"limited by {limit} ({share:.0%} of the time): {HINTS[limit]}" if share else ""

    # --- showing ---

    @contextmanager
    def shown(self, total: int) -> Iterator[None]:
        """Show what happens to `total` clips, as long as the `with` block lasts."""
        self._total = total
        is_shown = not self.log.takes_stderr
        with Progress("extract", total, "clips", details=self.board, is_shown=is_shown) as self._progress:
            try:
                yield
            finally:
                self._log_progress()
                self._progress = None

    def changed(self) -> None:
        """Something was counted: show it."""
        if self._progress is not None:
            self._progress.set(self.clips, str(self))
        if time.perf_counter() - self._logged >= PLAIN_INTERVAL_SEC:
            self._log_progress()

    def _log_progress(self) -> None:
        self._logged = time.perf_counter()
        rate = self.clips / self.elapsed
        self.log.write(
            "progress", clips=self.clips, of=self._total, blocks=self.blocks, clips_per_sec=round(rate, 3),
            crops_per_sec=round(self.crops / self.elapsed, 2), failures=dict(self.failures), advice=self.advice,
            left_sec=round((self._total - self.clips) / rate, 1) if rate else None,
            workers=[worker.summary() for worker in self.workers.values()],
        )  # fmt: skip

    def board(self) -> Group:
        """One row per worker: what it did, how fast, and where its time goes; below, all of them together."""
        columns = ("worker", "state", "blocks", "clips", "clips/s", "crops/s", "decode", "encode", "write")
        table = Table(*columns, box=None)
        for column in table.columns[2:]:
            column.justify = "right"
        for worker in self.workers.values():
            row = worker.summary()
            shares = (f"{share:.0%}" for share in row["shares"].values())
            table.add_row(
                row["worker"], row["state"], str(row["blocks"]), str(row["clips"]),
                f"{row['clips_per_sec']:.2f}", f"{row['crops_per_sec']:.1f}", *shares,
            )  # fmt: skip
        return Group(table, self._caption())

    def _caption(self) -> str:
        failures = ", ".join(f"{count} {outcome}" for outcome, count in self.failures.most_common())
        rates = f"{self.crops / self.elapsed:.1f} crops/s" + (f", {self.advice}" if self.advice else "")
        return rates + (f"\nclips not complete: {failures}" if failures else "")

    def __str__(self) -> str:
        limit, share = self.seconds.limit
        parts = [f"{self.crops / self.elapsed:.1f} crops/s"]
        if share:
            parts.append(f"limited by {limit} ({share:.0%} of the time)")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return ", ".join(parts)
