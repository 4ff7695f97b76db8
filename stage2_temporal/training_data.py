"""What a training learns from and is validated on: rows of a cache with their features and labels."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vivit.pipeline.errors import DataError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.manifest import UNKNOWN
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.joint_head import JOINT_HEAD, Pairs
from vivit.stage2_temporal.loader import Features, Rows, TrainingBatches
from vivit.stage2_temporal.time_sampling import TimeSampling, time_sampling

logger = logging.getLogger(__name__)

Labels = dict[str, npt.NDArray[np.int32]]


@dataclass(frozen=True)
class TrainingData:
    """Batches to learn from, and features with labels to validate on."""

    batches: TrainingBatches
    num_clips: int
    """Clips that are learnt from."""
    num_left_out: int
    """Clips of the split without features or labels."""
    validation: Features | None
    """None where there is nothing to validate on."""
    validation_labels: Labels
    """Class ids [clip] per head of `validation`, without the joint head."""
    pairs: Pairs | None
    """Classes of the joint head, where there is one."""
    digest: str
    """Digest of the rows and labels of both splits."""

    @property
    def about(self) -> dict[str, Any]:
        """What must be equal for a run to go on."""
        return {"train_clips": self.num_clips, "sha256": self.digest}


def load_training_data(cache: FeatureCache, config: TrainConfig, device: torch.device) -> TrainingData:
    """Bring the features of both splits where they are needed; DataError where nothing can be learnt."""
    split = config.train_split
    if split not in cache.splits:
        raise DataError(f"{cache.path} has no split {split!r} to train on: it has {', '.join(cache.splits)}")
    if not cache.manifest.heads:
        raise DataError(f"{cache.path} has no labels: its manifest needs a column label/<head>")
    labels = cache.manifest.labels(split)
    rows = labelled_rows(cache.usable_rows(split), labels)
    if not len(rows):
        raise DataError(_nothing_to_learn(cache, split, labels))
    for head, values in labels.items():
        if not (values[rows] != UNKNOWN).any():
            logger.warning("head %s has no label in split %s: it learns nothing", head, split)
    sampling = time_sampling(cache, config.num_frames, config.frame_sampling)
    pairs = None
    if config.joint_head:
        pairs = Pairs.seen({head: values[rows] for head, values in labels.items()}, cache.manifest.heads)
    budget = config.memory_budget_bytes
    features = Features(cache, split, rows, device=device, budget_bytes=budget, sampling=sampling)
    taught = labels if pairs is None else labels | {JOINT_HEAD: pairs.labels(labels["verb"], labels["noun"])}
    batches = TrainingBatches(
        features, rows, taught, batch_size=config.batch_size, seed=config.seed, device=device
    )
    if budget is not None and features.residency != "disk":
        budget -= features.size_bytes
    validation, validation_rows, validation_labels = _validation(cache, config, device, budget, sampling)
    logger.info("%d clips to learn from, features in %s", len(rows), features.residency)
    return TrainingData(
        batches=batches,
        num_clips=len(rows),
        num_left_out=cache.shape(split)[0] - len(rows),
        validation=validation,
        validation_labels=validation_labels,
        pairs=pairs,
        digest=_digest((rows, labels), (validation_rows, validation_labels), uneven=_uneven(features)),
    )


def labelled_rows(rows: Rows, labels: Mapping[str, npt.NDArray[np.int32]]) -> Rows:
    """Those of `rows` that have a label in at least one head."""
    known = np.any([values[rows] != UNKNOWN for values in labels.values()], axis=0)
    return rows[known]


def _validation(
    cache: FeatureCache,
    config: TrainConfig,
    device: torch.device,
    budget_bytes: int | None,
    sampling: TimeSampling,
) -> tuple[Features | None, Rows, Labels]:
    split = config.validation_split
    nothing = np.zeros(0, np.int64)
    if split is None or split not in cache.splits:
        return None, nothing, {}
    labels = cache.manifest.labels(split)
    rows = labelled_rows(cache.usable_rows(split), labels)
    if not len(rows):
        logger.warning("split %s has no usable labelled clips: the last epoch is kept, not the best", split)
        return None, nothing, {}
    features = Features(cache, split, rows, device=device, budget_bytes=budget_bytes, sampling=sampling)
    return features, rows, {head: values[rows] for head, values in labels.items()}


def _nothing_to_learn(cache: FeatureCache, split: str, labels: Labels) -> str:
    clips, usable = cache.shape(split)[0], cache.usable_rows(split)
    if not len(usable):
        return f"split {split!r} of {cache.path} has no usable clip: all {clips} failed; the outcomes stand in its ledger"
    return (
        f"split {split!r} of {cache.path} has no labels: {len(usable)} of {clips} clips have features, "
        f"and none has a label of {', '.join(labels)}"
    )


def _uneven(features: Features) -> Rows | None:
    """Views of each clip; None where all have the same number."""
    counts = features.view_counts
    return None if features.num_common_views == features.num_views else counts


def _digest(*parts: tuple[Rows, Labels], uneven: Rows | None = None) -> str:
    digest = hashlib.sha256(b"" if uneven is None else uneven.astype("<i8").tobytes())
    for rows, labels in parts:
        digest.update(rows.astype("<i8").tobytes())
        for head in sorted(labels):
            digest.update(head.encode() + labels[head].astype("<i4").tobytes())
    return digest.hexdigest()
