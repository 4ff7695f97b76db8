"""The mean of several evaluations: the three splits of UCF101 or HMDB51, or several seeds."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vivit.pipeline.errors import ConfigError
from vivit.pipeline.workspace import storage_errors, write_atomically
from vivit.stage2_temporal.evaluation import Evaluation

_MEASURES = ("top1", "top5", "mean_class", "top1_of_all")


@dataclass(frozen=True, kw_only=True)
class MeanEvaluation:
    """Plain means over runs, each evaluated on its own clips; every run has the same weight."""

    runs: list[str]
    split: str
    num_clip_sets: int
    """Different sets of clips: as many as runs for splits of a benchmark, 1 for seeds."""
    num_clips: list[int]
    """Evaluated clips of each run."""
    scores: dict[str, dict[str, float]]
    """Per head the mean of top1, top5, mean_class and top1_of_all; mean_class where all runs have it."""
    top1_of_runs: dict[str, list[float]]
    """Per head the top-1 of each run."""
    official_percent: dict[str, float]
    """Means of EPIC-KITCHENS-100's numbers; empty for other heads."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, folder: Path) -> Path:
        """Write <split>-mean.json into `folder`; its path."""
        path = folder / f"{self.split}-mean.json"
        with storage_errors(folder):
            write_atomically(path, json.dumps(self.to_dict(), indent=1, allow_nan=False).encode())
        return path


def mean_evaluation(evaluations: Sequence[Evaluation]) -> MeanEvaluation:
    """The means; ConfigError where the runs have different heads, or there is nothing to take the mean of."""
    first = evaluations[0]
    for other in evaluations[1:]:
        if other.scores.keys() != first.scores.keys():
            raise ConfigError(
                f"{other.run} has scores of {_listed(other)}, and {first.run} of {_listed(first)}: "
                "a mean needs the same in every run"
            )
    scores = {head: _means([vars(e.scores[head]) for e in evaluations]) for head in first.scores}
    numbers = [name for name in first.official if all(name in e.official for e in evaluations)]
    return MeanEvaluation(
        runs=[e.run for e in evaluations],
        split=first.split,
        num_clip_sets=len({e.clips_sha256 for e in evaluations}),
        num_clips=[e.coverage.num_evaluated for e in evaluations],
        scores=scores,
        top1_of_runs={head: [e.scores[head].top1 for e in evaluations] for head in first.scores},
        official_percent={
            name: float(np.mean([e.official[name].percent for e in evaluations])) for name in numbers
        },
    )


def _means(scores: Sequence[dict[str, Any]]) -> dict[str, float]:
    found = {name: [score[name] for score in scores] for name in _MEASURES}
    return {name: float(np.mean(values)) for name, values in found.items() if None not in values}


def _listed(evaluation: Evaluation) -> str:
    return ", ".join(evaluation.scores) or "nothing (no labels)"
