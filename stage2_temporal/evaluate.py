"""Scores of a run on a split of a cache: all views averaged, and what was left out said beside them."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet

from vivit.pipeline.cache_settings import flattened
from vivit.pipeline.device import resolve_device, resolve_precision
from vivit.pipeline.errors import CheckpointError, ConfigError, DataError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.workspace import nearest, storage_errors, write_atomically
from vivit.stage2_temporal.evaluation import Evaluation, Labels, Logits, coverage_of, scores_of
from vivit.stage2_temporal.loader import Features, Rows
from vivit.stage2_temporal.model import ModelConfig, TemporalModel
from vivit.stage2_temporal.run_folder import RunFolder, config_differences
from vivit.stage2_temporal.scoring import AVERAGES, Average, clip_logits

_MATCHED = (
    "backbone.weights_sha256",
    "backbone.embed_dim",
    "backbone.tubelet",
    "backbone.pooling",
    "backbone.mean",
    "backbone.std",
    "backbone.interpolation",
    "views.num_frames",
    "views.stride",
    "views.fps",
    "views.resize",
    "views.crop_size",
)
"""Settings of a cache that decide what a feature means; the number of test views is free."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is evaluated, and how."""

    run: Path
    """Run folder whose weights are used."""
    cache: Path
    """Feature cache with the split."""
    split: str = "validation"
    """Split to evaluate."""
    average: Average = "logits"
    """What is averaged over views: `logits`, as the reference does, or `softmax` (probabilities)."""
    max_views: int | None = None
    """Use the first views only; None uses all that are stored."""
    batch_size: int = 256
    """Views per forward pass."""
    allow_partial: bool = False
    """Evaluate what is there when the cache is not complete."""
    device: str = "auto"
    """`auto` (a GPU if there is one), or a device as PyTorch names it."""
    precision: str = "auto"
    """`float32`, `bfloat16` (autocast), or `auto`: bfloat16 on a GPU, else float32."""
    memory_budget_bytes: int | None = 0
    """Bytes of features that may stay in memory; each is used once, so they are read as they are needed."""

    def __post_init__(self) -> None:
        if self.average not in AVERAGES:
            raise nearest(self.average, list(AVERAGES), "average")
        for name in ("max_views", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluate the weights of a run, and write the scores and the logits of each clip into its folder."""
    run = RunFolder(config.run)
    about = run.read_config()
    cache = FeatureCache.open(config.cache, allow_partial=config.allow_partial)
    check_fit(about, cache, run=config.run)
    if config.split not in cache.splits:
        raise DataError(f"{cache.path} has no split {config.split!r}: it has {', '.join(cache.splits)}")
    model, epoch = load_model(run)
    rows = cache.usable_rows(config.split)
    if not len(rows):
        raise DataError(
            f"split {config.split!r} of {cache.path} has no usable clip; the outcomes stand in its ledger"
        )
    logits, num_views = _logits(config, cache, rows, model)
    labels = cache.manifest.labels(config.split)
    evaluation = Evaluation(
        run=str(config.run),
        cache=str(config.cache),
        cache_identity=cache.identity,
        split=config.split,
        average=config.average,
        num_views=num_views,
        epoch=epoch,
        scores=scores_of(logits, labels, rows),
        coverage=coverage_of(cache.records(config.split)),
    )
    ids = [clip.clip_id for clip in cache.manifest.of_split(config.split)]
    table = _table([ids[row] for row in rows], {h: v[rows] for h, v in labels.items()}, logits, num_views)
    _write(run, evaluation, table)
    return evaluation


def load_model(run: RunFolder) -> tuple[TemporalModel, int]:
    """The model that a run keeps, and the epoch that its weights are of."""
    tensors, metrics = run.load_model()
    try:
        model = TemporalModel(ModelConfig.from_dict(run.read_config()["model"]))
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{run.config_path} does not describe a model ({error}): restore it, or train again with another --run"
        ) from error
    try:
        model.load_state_dict(tensors)
        return model, int(metrics["epoch"])
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{run.model_path} does not fit {run.config_path} ({error}): restore both, or train again with another --run"
        ) from error


def check_fit(run_config: Mapping[str, Any], cache: FeatureCache, *, run: Path) -> None:
    """CheckpointError where the cache's features or classes are not those that the run was trained on."""
    trained = run_config["cache"]
    if trained["identity"] != cache.identity:
        there, here = flattened(trained["settings"]), flattened(cache.settings.to_dict())
        differences = [
            f"{key}: {there.get(key)} in the run, {here.get(key)} in the cache"
            for key in _MATCHED
            if there.get(key) != here.get(key)
        ]
        if differences:
            raise CheckpointError(
                f"{cache.path} does not hold the features that {run} was trained on:\n  "
                + "\n  ".join(differences)
                + "\nextract with the run's settings, or pass another --cache"
            )
    classes = config_differences({"heads": run_config["heads"]}, {"heads": cache.manifest.heads})
    if classes:
        listed = "\n  ".join(classes).replace(" asked for", " in the cache")
        raise CheckpointError(
            f"{cache.path} has other classes than {run} was trained on:\n  {listed}\n"
            "make its manifest with the run's class lists, or pass another --cache"
        )


def _logits(
    config: EvaluateConfig, cache: FeatureCache, rows: Rows, model: TemporalModel
) -> tuple[Logits, int]:
    device = resolve_device(config.device)
    features = Features(cache, config.split, rows, device=device, budget_bytes=config.memory_budget_bytes)
    num_views = min(config.max_views or features.num_views, features.num_views)
    logits = clip_logits(
        model.to(device),
        features,
        device=device,
        precision=resolve_precision(config.precision, device),
        average=config.average,
        num_views=num_views,
        batch_size=config.batch_size,
    )
    return logits, num_views


def _table(clip_ids: list[str], labels: Labels, logits: Logits, num_views: int) -> pa.Table:
    columns = {"clip_id": pa.array(clip_ids, pa.string())}
    columns |= {f"label/{head}": pa.array(values, pa.int32()) for head, values in labels.items()}
    for head, values in logits.items():
        flat = pa.array(values.reshape(-1), pa.float32())
        columns[f"logits/{head}"] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    columns["num_views"] = pa.array(np.full(len(clip_ids), num_views), pa.int32())
    return pa.table(columns)


def _write(run: RunFolder, evaluation: Evaluation, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pa_parquet.write_table(table, buffer)
    text = json.dumps(evaluation.to_dict(), indent=1, allow_nan=False)
    with storage_errors(run.evaluation):
        write_atomically(run.evaluation / f"{evaluation.split}.parquet", buffer.getvalue())
        write_atomically(run.evaluation / f"{evaluation.split}.json", text.encode())
