"""Which epoch is the best."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vivit.pipeline.manifest import UNKNOWN
from vivit.stage2_temporal.evaluation import ACTION
from vivit.stage2_temporal.joint_head import JOINT_HEAD, Pairs
from vivit.stage2_temporal.metrics import action_in_top, share_of, top_k


def validation_metrics(
    logits: Mapping[str, npt.NDArray[np.float32]],
    labels: Mapping[str, npt.NDArray[np.int32]],
    pairs: Pairs | None = None,
) -> dict[str, float]:
    """`top1/<head>`, `top1/action` where heads are verb and noun, and `score`, which chooses the best epoch.

    With `pairs`, also the actions that the joint head alone finds, as `top1/joint`; the score stays that of the product.
    A head that is itself called `action` is a head like others: nothing is put in its place.
    """
    top1 = {head: top_k(1, logits[head], labels[head]) for head in labels}
    found = {f"top1/{head}": value for head, value in top1.items() if value is not None}
    score = float(np.mean(list(found.values())))
    if {"verb", "noun"} <= labels.keys() and ACTION not in labels:
        verbs, nouns = labels["verb"], labels["noun"]
        known = (verbs != UNKNOWN) & (nouns != UNKNOWN)
        action = share_of(action_in_top(1, logits["verb"], logits["noun"], verbs, nouns), known)
        if action is not None:
            found[f"top1/{ACTION}"] = score = action
        if pairs is not None and known.any():
            found[f"top1/{JOINT_HEAD}"] = float(
                pairs.correct_in_top(1, logits[JOINT_HEAD], verbs, nouns)[known].mean()
            )
    return found | {"score": score}


def best_epoch(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of the epochs with the best score; the last epoch where none has a score."""
    scored = [epoch for epoch in history if "score" in epoch]
    return max(scored, key=lambda epoch: epoch["score"]) if scored else history[-1]
