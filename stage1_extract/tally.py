"""What a run of stage 1 has done so far, whichever engine does the work."""

import time

from vivit.pipeline.errors import DataError
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.outcome import Outcome
from vivit.stage1_extract.blocks import BlockReport, Seconds


class Tally:
    """Counts of one run, and the limit of clips without features."""

    def __init__(self, *, failed: int, max_failures: int | None) -> None:
        """`failed`: clips that have no features already and are not tried again."""
        self.failed, self._max_failures = failed, max_failures
        self.seconds = Seconds()
        self.blocks = self.crops = 0
        self._started = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._started

    def clip(self, record: ClipRecord, crops: int) -> None:
        """Count a clip; DataError when more have no features than there may be."""
        self.crops += crops
        if not record.usable:
            self.fail(record)

    def not_finite(self, report: BlockReport) -> None:
        """Count the clips of a block that lost their features after they were encoded."""
        for record in report.records:
            if record.outcome == Outcome.NOT_FINITE:
                self.fail(record)

    def fail(self, record: ClipRecord) -> None:
        """Count a clip without features; DataError when there are more than there may be."""
        self.failed += 1
        limit = self._max_failures
        if limit is not None and self.failed > limit:
            raise DataError(
                f"more than {limit} clips have no features (the last: {record.clip_id}, {record.outcome}: "
                f"{record.message}). Committed blocks stay; raise --max-failures to go on"
            )

    def __str__(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.crops / self.elapsed:.1f} crops/s, {self.seconds}{failed}"
