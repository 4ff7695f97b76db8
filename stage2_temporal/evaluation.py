"""What an evaluation says: scores per head, and how much of the split they are about."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import UNKNOWN
from vivit.stage2_temporal.loader import Rows
from vivit.stage2_temporal.metrics import action_in_top, correct_in_top, mean_class_accuracy, share_of

Logits = dict[str, npt.NDArray[np.float32]]
Labels = dict[str, npt.NDArray[np.int32]]

NOT_COMMITTED = "not extracted"
"""Reason for clips whose block is not in the cache yet."""
ACTION = "action"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracies of one head, or of the action; each a share from 0 to 1."""

    num_clips: int
    """Evaluated clips with a label."""
    top1: float
    top5: float
    mean_class: float | None
    """Top-1 per class, averaged over the classes that occur; None for actions."""
    top1_of_all: float
    """Top-1 with every labelled clip that was left out counted as wrong."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How much of the split the scores are about."""

    num_clips: int
    """Clips in the split."""
    num_evaluated: int
    """Clips with features."""
    outcomes: dict[str, int]
    """Clips by what became of them in the extraction."""
    left_out: dict[str, int]
    """Those outcomes that leave a clip without features."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found; the same stands in evaluation/<split>.json."""

    run: str
    cache: str
    cache_identity: str
    split: str
    average: str
    num_views: int
    """Views averaged per clip."""
    epoch: int
    """Epoch of the weights."""
    scores: dict[str, Score]
    """Per head, and `action` where the heads are verb and noun; empty for a split without labels."""
    coverage: Coverage

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def scores_of(logits: Logits, labels: Labels, rows: Rows) -> dict[str, Score]:
    """Scores per head of logits [evaluated clip, class], for the labels [clip] of the whole split."""
    scores: dict[str, Score] = {}
    for head, values in labels.items():
        top1, top5 = (correct_in_top(k, logits[head], values[rows]) for k in (1, 5))
        mean_class = mean_class_accuracy(logits[head], values[rows])
        score = _score(top1, top5, values != UNKNOWN, rows, mean_class)
        scores |= {head: score} if score else {}
    if {"verb", "noun"} <= scores.keys() and ACTION not in labels:
        verbs, nouns = labels["verb"], labels["noun"]
        top1, top5 = (
            action_in_top(k, logits["verb"], logits["noun"], verbs[rows], nouns[rows]) for k in (1, 5)
        )
        score = _score(top1, top5, (verbs != UNKNOWN) & (nouns != UNKNOWN), rows, None)
        scores |= {ACTION: score} if score else {}
    return scores


def _score(
    top1: npt.NDArray[np.bool_],
    top5: npt.NDArray[np.bool_],
    labelled: npt.NDArray[np.bool_],
    rows: Rows,
    mean_class: float | None,
) -> Score | None:
    counted = labelled[rows]
    best, best_five = share_of(top1, counted), share_of(top5, counted)
    if best is None or best_five is None:
        return None
    return Score(
        num_clips=int(counted.sum()),
        top1=best,
        top5=best_five,
        mean_class=mean_class,
        top1_of_all=float(top1.sum() / labelled.sum()),
    )


def coverage_of(records: list[ClipRecord | None]) -> Coverage:
    """Counts of what became of the clips of a split."""
    outcomes = Counter(NOT_COMMITTED if record is None else str(record.outcome) for record in records)
    usable = Counter(str(record.outcome) for record in records if record is not None and record.usable)
    return Coverage(
        num_clips=len(records),
        num_evaluated=usable.total(),
        outcomes=dict(outcomes.most_common()),
        left_out={name: count for name, count in outcomes.most_common() if name not in usable},
    )
