"""What EPIC-KITCHENS-100's official files say beside the rows: unseen participants, tail classes, the ids of a split.

The reader puts the first two into columns of the manifest, so that a cache can be scored without the files.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import UNKNOWN

EK100_HEADS = {"verb": 97, "noun": 300}
"""Number of classes of the two heads."""
NUM_CLIPS = {"train": 67217, "validation": 9668, "test": 13092}
"""Rows of each official split."""
UNSEEN, TAIL_VERB, TAIL_NOUN = "unseen_participant", "tail_verb", "tail_noun"
"""Columns of the manifest: true, false, or null where it is not known."""

SPLIT_FILES = {
    "train": "EPIC_100_train.csv",
    "validation": "EPIC_100_validation.csv",
    "test": "EPIC_100_test_timestamps.csv",
}
_UNSEEN_FILES = {
    "validation": "EPIC_100_unseen_participant_ids_validation.csv",
    "test": "EPIC_100_unseen_participant_ids_test.csv",
}
_TAIL_FILES = {"verb": "EPIC_100_tail_verbs.csv", "noun": "EPIC_100_tail_nouns.csv"}


@dataclass(frozen=True)
class Subsets:
    """The clips that the official numbers single out; only what has a file in the annotation folder."""

    unseen: Mapping[str, frozenset[str]]
    """Participants of each split who are not in training."""
    tail: Mapping[str, frozenset[int]]
    """Rare classes of each head."""
    files: Sequence[Path]
    """The files that were read."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The lists in an annotation folder; DataError where one cannot be read."""
        unseen = {split: folder / name for split, name in _UNSEEN_FILES.items() if (folder / name).is_file()}
        tail = {head: folder / name for head, name in _TAIL_FILES.items() if (folder / name).is_file()}
        return cls(
            unseen={split: frozenset(_column(path, "participant_id")) for split, path in unseen.items()},
            tail={head: frozenset(_class_ids(path, head)) for head, path in tail.items()},
            files=[*unseen.values(), *tail.values()],
        )

    def columns(
        self, split: str, participant: str | None, labels: Mapping[str, int]
    ) -> dict[str, bool | None]:
        """The columns of one clip."""
        known = participant is not None and split in self.unseen
        tail = {f"tail_{head}": self._is_tail(head, labels.get(head, UNKNOWN)) for head in EK100_HEADS}
        return {UNSEEN: participant in self.unseen[split] if known else None} | tail

    def _is_tail(self, head: str, label: int) -> bool | None:
        return None if label == UNKNOWN or head not in self.tail else label in self.tail[head]


def is_ek100(heads: Mapping[str, Sequence[str] | int]) -> bool:
    """Whether there are EPIC-KITCHENS-100's two heads; `heads` maps each to its class names or their number."""
    counts = {head: names if isinstance(names, int) else len(names) for head, names in heads.items()}
    return all(counts.get(head) == count for head, count in EK100_HEADS.items())


def official_ids(folder: Path, split: str) -> list[str] | None:
    """The narration_ids of a split in file order; None where the folder lacks its file."""
    path = folder / SPLIT_FILES[split]
    return _column(path, "narration_id") if path.is_file() else None


def _class_ids(path: Path, head: str) -> list[int]:
    try:
        ids = [int(text) for text in _column(path, head)]
    except ValueError as error:
        raise DataError(f"{path}: a class id is not a whole number ({error})") from error
    if outside := [index for index in ids if not 0 <= index < EK100_HEADS[head]]:
        raise DataError(f"{path}: {outside[0]} is not a {head} class: ids are 0 to {EK100_HEADS[head] - 1}")
    return ids


def _column(path: Path, column: str) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            found, rows = list(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(f"{path} cannot be read as CSV in UTF-8: {error}") from error
    if column not in found:
        raise DataError(f"{path} lacks the column {column}: it has {', '.join(found) or 'none'}")
    return [row[column] for row in rows]
