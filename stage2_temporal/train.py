"""Train the temporal half on a feature cache: one plain loop, stopped and resumed at any step."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vivit.pipeline.device import resolve_device, resolve_precision
from vivit.pipeline.feature_cache import WEIGHTS_FILE, FeatureCache
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.fit import Report, fit, resume
from vivit.stage2_temporal.initialisation import start, write_origins
from vivit.stage2_temporal.interruption import before_first_step
from vivit.stage2_temporal.joint_head import with_joint_head
from vivit.stage2_temporal.learner import Learner, fresh_model
from vivit.stage2_temporal.model import ModelConfig, TemporalModel
from vivit.stage2_temporal.run_folder import RUN_FORMAT, TEMPORAL, RunFolder
from vivit.stage2_temporal.scoring import clip_logits
from vivit.stage2_temporal.time_sampling import time_sampling
from vivit.stage2_temporal.training_data import TrainingData, load_training_data
from vivit.stage2_temporal.validation import best_epoch, validation_metrics

LIBRARIES = ("vivit", "numpy", "safetensors", "timm", "torch")
"""Libraries whose versions a run records."""


@dataclass(frozen=True)
class TrainResult:
    """What a training came to."""

    run: Path
    steps: int
    """Steps from the first epoch to the last."""
    resumed_from: int
    """Step that this call went on from; 0 for a fresh run."""
    num_clips: int
    """Clips learnt from."""
    num_left_out: int
    """Clips of the training split without features or labels."""
    history: list[dict[str, Any]]
    """Metrics of each epoch, as in metrics.jsonl."""
    best: dict[str, Any]
    """Metrics of the epoch whose weights are in model.safetensors."""


def train(config: TrainConfig, report: Report | None = None) -> TrainResult:
    """Train until the last epoch; the same call goes on where an interrupted one stopped.

    Raises InterruptedRunError, with the state saved, after SIGINT or SIGTERM, and CheckpointError where another
    process trains in the same folder.
    """
    with before_first_step():
        device = resolve_device(config.device)
        precision = resolve_precision(config.precision, device)
        cache = FeatureCache.open(config.cache, allow_partial=config.allow_partial)
    run = RunFolder(config.run)
    with run.lock(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        with before_first_step():
            data = load_training_data(cache, config, device)
            model, steps = _model(config, cache, data), data.batches.steps_per_epoch
            fresh = fresh_model(lambda: TemporalModel(model), config.seed)
            origins = start(fresh, config, cache, run)
            run.claim(_description(config, cache, data, precision))
            write_origins(origins, run.path)
            learner = Learner(config, fresh, device=device, precision=precision, steps_per_epoch=steps)
            state = resume(run, learner)
        resumed_from = state.step
        if state.step < learner.total_steps:
            validate = partial(_validate, data, learner) if data.validation is not None else None
            keep = partial(_keep, run)
            fit(learner, data.batches, state, run, config=config, validate=validate, keep=keep, report=report)
    return TrainResult(
        run=config.run,
        steps=state.step,
        resumed_from=resumed_from,
        num_clips=data.num_clips,
        num_left_out=data.num_left_out,
        history=state.history,
        best=best_epoch(state.history),
    )


def _validate(data: TrainingData, learner: Learner, model: nn.Module) -> dict[str, float]:
    assert data.validation is not None
    assert isinstance(model, TemporalModel)
    logits = clip_logits(model, data.validation, device=learner.device, precision=learner.precision)
    return validation_metrics(logits, data.validation_labels, data.pairs)


def _keep(run: RunFolder, model: nn.Module, metrics: Mapping[str, Any]) -> None:
    run.save_model(model.state_dict(), metrics)


def _model(config: TrainConfig, cache: FeatureCache, data: TrainingData) -> ModelConfig:
    dim = cache.settings.backbone.embed_dim
    times = time_sampling(cache, config.num_frames, config.frame_sampling).num_times
    heads = {head: len(names) for head, names in cache.manifest.heads.items()}
    return config.temporal_model(dim=dim, time=times, **with_joint_head(heads, data.pairs))


def _description(
    config: TrainConfig, cache: FeatureCache, data: TrainingData, precision: str
) -> dict[str, Any]:
    """config.json: what the run is, as JSON values."""
    model = _model(config, cache, data)
    return {
        "format": RUN_FORMAT,
        "kind": TEMPORAL,
        "training": config.identity() | {"precision": precision},
        "model": model.to_dict(),
        "heads": cache.manifest.heads,
        "dataset": cache.manifest.dataset,
        "data": data.about,
        "cache": {
            "path": str(cache.path.resolve()),
            "identity": cache.identity,
            "settings": cache.settings.to_dict(),
            WEIGHTS_FILE: cache.made_with.get(WEIGHTS_FILE),
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }
