"""The ledger of a feature cache: one JSON file for each committed block, and what became of its clips."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from vivit.pipeline.outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class ClipRecord:
    """What became of one clip."""

    clip_id: str
    outcome: str
    """A value of `vivit.pipeline.outcome.Outcome`."""
    message: str = ""
    num_frames: int = 0
    """Frames of the clip that could be decoded."""

    @property
    def usable(self) -> bool:
        """Whether features were made."""
        return Outcome(self.outcome).usable

    @property
    def complete(self) -> bool:
        """Whether nothing of the clip was lost."""
        return Outcome(self.outcome).complete


@dataclass(frozen=True)
class LedgerEntry:
    """One file of the ledger: a committed block."""

    rows: tuple[int, int]
    shards: dict[str, dict[str, Any]]
    records: list[ClipRecord]
    about: dict[str, Any] = field(default_factory=dict)

    def to_json(self, split: str, block: int, views: range) -> bytes:
        """The content of the file; `from_json` gives an equal entry back."""
        values = {
            "split": split,
            "block": block,
            "views": [views.start, views.stop],
            "rows": list(self.rows),
            "shards": self.shards,
            "clips": [asdict(record) for record in self.records],
            "about": self.about,
        }
        return json.dumps(values, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """ValueError, KeyError or TypeError where the file is damaged or has an outcome that is not known."""
        values = json.loads(data)
        records = [ClipRecord(**clip) for clip in values["clips"]]
        for record in records:
            Outcome(record.outcome)
        for shard in values["shards"].values():
            int(shard["bytes"]), str(shard["sha256"])
        start, stop = values["rows"]
        return cls((start, stop), values["shards"], records, values["about"])
