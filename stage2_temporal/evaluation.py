"""What an evaluation says: scores per head, and how much of the split they are about."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import UNKNOWN
from vivit.stage2_temporal.bootstrap import Interval, mean_class_interval, share_interval
from vivit.stage2_temporal.ek100_metrics import OfficialNumber
from vivit.stage2_temporal.joint_head import FUSION, JOINT_HEAD, Pairs
from vivit.stage2_temporal.loader import Rows
from vivit.stage2_temporal.metrics import action_in_top, correct_in_top, mean_over_classes

Logits = dict[str, npt.NDArray[np.float32]]
Labels = dict[str, npt.NDArray[np.int32]]

NOT_COMMITTED = "not extracted"
"""Reason for clips whose block is not in the cache yet."""
ACTION = "action"
FUSED = "fused"
"""Score of the joint head and the product of verb and noun together."""


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
    intervals: dict[str, Interval]
    """95 % bootstrap interval of each of these, over the evaluated clips (of top1_of_all: over the labelled ones)."""


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
    """Per head, `action` where the heads are verb and noun, `joint` and `fused` of a model with a joint head; empty for a
    split without labels."""
    coverage: Coverage
    clips_sha256: str = ""
    """Digest of the ids of the evaluated clips, in row order."""
    official: dict[str, OfficialNumber] = field(default_factory=dict)
    """EPIC-KITCHENS-100's numbers under their official names; empty for other heads."""
    notes: list[str] = field(default_factory=list)
    """Sentences: which clips are missing, and which numbers are left out, and why."""
    fusion: float | None = None
    """Share of the joint head in `fused`; None without a joint head."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def scores_of(
    logits: Logits, labels: Labels, rows: Rows, *, pairs: Pairs | None = None, fusion: float = FUSION
) -> dict[str, Score]:
    """Scores per head of logits [evaluated clip, class], for the labels [clip] of the whole split.

    `pairs` are the classes of a joint head, and `fusion` its share in the fused score.
    """
    scores: dict[str, Score | None] = {}
    for head, values in labels.items():
        top1, top5 = (correct_in_top(k, logits[head], values[rows]) for k in (1, 5))
        scores[head] = _score(top1, top5, values != UNKNOWN, rows, values)
    if {"verb", "noun"} <= labels.keys():
        verbs, nouns = labels["verb"], labels["noun"]
        labelled = (verbs != UNKNOWN) & (nouns != UNKNOWN)
        found = _of_actions(logits, verbs[rows], nouns[rows], pairs, fusion)
        for name in (name for name in found if name not in labels):
            scores[name] = _score(*found[name], labelled, rows)
    return {name: score for name, score in scores.items() if score is not None}


_InTop = tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]
"""Whether the true class is the best [clip], and whether it is among the best five."""


def _of_actions(
    logits: Mapping[str, npt.NDArray[np.float32]],
    verbs: npt.NDArray[np.int32],
    nouns: npt.NDArray[np.int32],
    pairs: Pairs | None,
    fusion: float,
) -> dict[str, _InTop]:
    """By the product of verb and noun, by the joint head, and by both; anything for clips without a verb or noun."""
    verb, noun = logits["verb"], logits["noun"]
    found = {ACTION: (action_in_top(1, verb, noun, verbs, nouns), action_in_top(5, verb, noun, verbs, nouns))}
    if pairs is not None:
        joint = logits[JOINT_HEAD]
        found[JOINT_HEAD] = (
            pairs.correct_in_top(1, joint, verbs, nouns),
            pairs.correct_in_top(5, joint, verbs, nouns),
        )
        fused = pairs.fused_ranks(logits, verbs, nouns, share=fusion)
        found[FUSED] = (fused < 1, fused < 5)
    return found


def _score(
    top1: npt.NDArray[np.bool_],
    top5: npt.NDArray[np.bool_],
    labelled: npt.NDArray[np.bool_],
    rows: Rows,
    classes: npt.NDArray[np.int32] | None = None,
) -> Score | None:
    """The score over the labelled clips; mean class accuracy where `classes` [clip] are given."""
    counted = labelled[rows]
    best, best_five = top1[counted], top5[counted]
    if not len(best):
        return None
    of_all = np.concatenate([best, np.zeros(labelled.sum() - len(best), bool)])
    intervals = {
        "top1": share_interval(best),
        "top5": share_interval(best_five),
        "top1_of_all": share_interval(of_all),
    }
    mean_class = None
    if classes is not None:
        of_counted = classes[rows][counted]
        mean_class = mean_over_classes(best, of_counted)
        intervals["mean_class"] = mean_class_interval(best, of_counted)
    return Score(
        num_clips=len(best),
        top1=float(best.mean()),
        top5=float(best_five.mean()),
        mean_class=mean_class,
        top1_of_all=float(of_all.mean()),
        intervals=intervals,
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
