"""Scores of a whole model on a split, straight from the videos: for models that no cache serves, and to check one."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vivit.end_to_end.predictor import load_predictor
from vivit.end_to_end.video_logits import video_logits
from vivit.pipeline.errors import ConfigError, DataError
from vivit.pipeline.manifest import Manifest
from vivit.pipeline.progress import Progress
from vivit.pipeline.storage import Location
from vivit.pipeline.views import ViewSpec
from vivit.pipeline.workspace import nearest
from vivit.stage1_extract.extract import check_videos
from vivit.stage2_temporal.evaluate import check_classes, output_folder
from vivit.stage2_temporal.evaluation import Evaluation
from vivit.stage2_temporal.report_options import ReportOptions
from vivit.stage2_temporal.reporting import ScoredSplit, check_clips, check_options, report
from vivit.stage2_temporal.scoring import AVERAGES, Average

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VideoEvaluateConfig(ReportOptions):
    """What is evaluated on videos, and how."""

    run: Path
    """Run folder, or a model file."""
    data_root: Location
    """Folder that the manifest's video paths start from."""
    split: str = "validation"
    """Split to evaluate."""
    average: Average = "logits"
    """What is averaged over views: `logits`, as the reference does, or `softmax` (probabilities)."""
    views: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ViewSpec in place of those that the model was trained on: stride, test_clips, ..."""
    default_views: ViewSpec = field(default_factory=ViewSpec)
    """Views for a model that does not know those of its training (imported weights)."""
    backbone: str | None = None
    """Frozen encoder of a stage-2 run, where its file moved."""
    batch_size: int = 16
    """Views per forward pass."""
    device: str = "auto"
    """`auto` (a GPU if there is one), or a device as PyTorch names it."""
    precision: str = "auto"
    """`float32`, `bfloat16` (autocast), or `auto`: bfloat16 on a GPU, else float32."""
    decode_threads: int = 0
    """Threads that decode ahead; 0 chooses for this machine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average not in AVERAGES:
            raise nearest(self.average, list(AVERAGES), "average")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")


def evaluate_videos(config: VideoEvaluateConfig, manifest: Manifest) -> Evaluation:
    """Evaluate on the videos of a split, and write the scores and the logits of each clip as `evaluate` does."""
    check_videos(manifest, config.data_root)
    if config.split not in manifest.splits:
        raise DataError(
            f"the manifest has no split {config.split!r}: it has {', '.join(manifest.splits)}: pass --split"
        )
    if config.split == "train":
        raise DataError("the training split has random views, not test views: evaluate validation or test")
    predictor = load_predictor(
        config.run, backbone=config.backbone, default=config.default_views, **config.views
    )
    logger.info("views: %s", predictor.views)
    check_classes(predictor.classes, manifest.heads, run=config.run, other=Path(manifest.dataset))
    check_options(config, manifest, predictor.pairs)
    clips = manifest.of_split(config.split)
    check_clips(config, manifest, config.split, np.arange(len(clips)))
    reading = predictor.reading(
        config.data_root, device=config.device, precision=config.precision, threads=config.decode_threads
    )
    with Progress("evaluate", len(clips), "clips") as progress:
        logits, records = video_logits(
            predictor.model, clips, reading,
            average=config.average, batch_size=config.batch_size, progress=progress,
        )  # fmt: skip
    rows = np.flatnonzero([record.usable for record in records])
    if not len(rows):
        raise DataError(
            f"no clip of split {config.split!r} could be read: {records[0].outcome}, {records[0].message}"
        )
    scored = ScoredSplit(
        manifest=manifest,
        split=config.split,
        rows=rows,
        logits=logits,
        records=records,
        num_views=predictor.views.num_views(config.split),
        pairs=predictor.pairs,
    )
    return report(
        scored,
        config,
        output_folder(config.run),
        run=str(config.run),
        cache="",
        cache_identity="",
        average=config.average,
        epoch=predictor.epoch,
    )
