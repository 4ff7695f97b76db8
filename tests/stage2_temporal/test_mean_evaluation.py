import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vivit.pipeline.errors import ConfigError
from vivit.stage2_temporal.evaluation import Evaluation, coverage_of, scores_of
from vivit.stage2_temporal.mean_evaluation import mean_evaluation


def evaluation(run: str, right: int, *, clips: str = "", heads: tuple[str, ...] = ("label",)) -> Evaluation:
    """Of 10 clips of 2 classes, the first `right` are right."""
    labels = np.arange(10, dtype=np.int32) % 2
    logits = np.eye(2, dtype=np.float32)[np.where(np.arange(10) < right, labels, 1 - labels)]
    scores = scores_of(dict.fromkeys(heads, logits), dict.fromkeys(heads, labels), np.arange(10))
    about: dict[str, Any] = {"cache": "", "cache_identity": "", "average": "logits", "epoch": 1}
    return Evaluation(
        run=run, split="validation", num_views=1, scores=scores, coverage=coverage_of([]), clips_sha256=clips, **about
    )  # fmt: skip


def test_the_mean_of_three_splits_weighs_each_the_same(tmp_path: Path) -> None:
    parts = [evaluation(name, right, clips=name) for name, right in (("a", 10), ("b", 8), ("c", 3))]
    mean = mean_evaluation(parts)
    assert mean.scores["label"]["top1"] == pytest.approx(0.7)
    assert mean.scores["label"]["mean_class"] == pytest.approx((1 + 0.8 + 0.3) / 3)
    assert mean.top1_of_runs == {"label": [1.0, 0.8, 0.3]}
    assert (mean.runs, mean.num_clip_sets) == (["a", "b", "c"], 3)
    assert json.loads(mean.write(tmp_path).read_text()) == mean.to_dict()


def test_the_same_clips_are_said_to_be_the_same() -> None:
    assert mean_evaluation([evaluation("a", 5), evaluation("b", 6)]).num_clip_sets == 1


def test_other_heads_have_no_mean() -> None:
    with pytest.raises(ConfigError, match="b has scores of other, and a of label"):
        mean_evaluation([evaluation("a", 5), evaluation("b", 5, heads=("other",))])
