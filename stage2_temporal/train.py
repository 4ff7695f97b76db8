"""Train the temporal half on a feature cache: one plain loop, stopped and resumed at any step."""

import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.utils.tensorboard import SummaryWriter

from vivit.pipeline.device import resolve_device, resolve_precision
from vivit.pipeline.errors import InterruptedRunError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.progress import Progress
from vivit.pipeline.workspace import storage_errors
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.interruption import StopRequest, before_first_step
from vivit.stage2_temporal.learner import Learner
from vivit.stage2_temporal.run_folder import RUN_FORMAT, RunFolder, TrainingState
from vivit.stage2_temporal.running_loss import RunningLoss, check_finite
from vivit.stage2_temporal.scoring import clip_logits
from vivit.stage2_temporal.training_data import TrainingData, load_training_data
from vivit.stage2_temporal.validation import best_epoch, validation_metrics

logger = logging.getLogger(__name__)

Report = Callable[[Mapping[str, Any]], None]
"""Called with the metrics of each epoch."""

_LOSS_EVERY = 10
"""Steps between two looks at the loss: each look waits for the device."""
_LIBRARIES = ("vivit", "numpy", "safetensors", "timm", "torch")


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
            run.claim(_description(config, cache, data, precision))
            model, steps = config.model(**_model_shape(config, cache)), data.batches.steps_per_epoch
            learner = Learner(config, model, device=device, precision=precision, steps_per_epoch=steps)
            state = _resume(run, learner)
        resumed_from = state.step
        if state.step < learner.total_steps:
            _train_epochs(config, learner, data, state, run, report)
    return TrainResult(
        run=config.run,
        steps=state.step,
        resumed_from=resumed_from,
        num_clips=data.num_clips,
        num_left_out=data.num_left_out,
        history=state.history,
        best=best_epoch(state.history),
    )


def _train_epochs(
    config: TrainConfig,
    learner: Learner,
    data: TrainingData,
    state: TrainingState,
    run: RunFolder,
    report: Report | None,
) -> None:
    """All epochs that are not done yet."""
    steps_per_epoch = data.batches.steps_per_epoch
    with (
        StopRequest() as stop,
        Progress("training", learner.total_steps - state.step, "steps") as progress,
        _curves(run, state) as curves,
    ):
        for epoch in range(state.step // steps_per_epoch, config.epochs):
            started, spent_before = time.perf_counter(), state.seconds
            losses = RunningLoss(state, num_added=state.step % steps_per_epoch)
            for batch in data.batches.epoch(epoch, first=state.step % steps_per_epoch):
                if stop.requested:
                    losses.add_up()
                    state.seconds = spent_before + time.perf_counter() - started
                    _stop(learner, state, run)
                losses.append(learner.step(batch, state.step))
                state.step += 1
                if state.step % _LOSS_EVERY == 0:
                    losses.add_up()
                progress.advance(status=f"epoch {epoch + 1}{losses.in_words}")
            losses.add_up()
            check_finite(learner.model, state.step)
            metrics = _epoch_metrics(epoch, learner, data, state, config)
            metrics["seconds"] = round(spent_before + time.perf_counter() - started, 3)
            _finish_epoch(metrics, learner, state, run)
            _draw(curves, metrics, run)
            if report is not None:
                report(metrics)


def _stop(learner: Learner, state: TrainingState, run: RunFolder) -> NoReturn:
    check_finite(learner.model, state.step)
    run.save_state(learner.tensors(), state)
    raise InterruptedRunError(
        f"stopped after step {state.step} of {learner.total_steps}, saved in {run.path}: "
        "run the same command again to go on"
    )


def _epoch_metrics(
    epoch: int,
    learner: Learner,
    data: TrainingData,
    state: TrainingState,
    config: TrainConfig,
) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "epoch": epoch + 1,
        "step": state.step,
        "loss": state.loss_sum / data.batches.steps_per_epoch,
        "learning_rate": learner.learning_rate(state.step - 1),
    }
    due = (epoch + 1) % config.validate_every == 0 or epoch + 1 == config.epochs
    if data.validation is not None and due:
        logits = clip_logits(
            learner.kept, data.validation, device=learner.device, precision=learner.precision
        )
        metrics |= validation_metrics(logits, data.validation_labels)
    return metrics


def _finish_epoch(metrics: dict[str, Any], learner: Learner, state: TrainingState, run: RunFolder) -> None:
    """Keep the weights if they are the best, then save the state.

    In this order a kill in between costs nothing: the epoch is run again and keeps the same weights again.
    """
    state.history.append(metrics)
    if best_epoch(state.history) is metrics:
        about = {name: value for name, value in metrics.items() if name != "seconds"}
        run.save_model(learner.kept.state_dict(), about)
    state.loss_sum = state.seconds = 0.0
    run.save_state(learner.tensors(), state)


def _model_shape(config: TrainConfig, cache: FeatureCache) -> dict[str, Any]:
    _, _, times, dim = cache.shape(config.train_split)
    heads = {head: len(names) for head, names in cache.manifest.heads.items()}
    return {"dim": dim, "time": times, "heads": heads}


def _resume(run: RunFolder, learner: Learner) -> TrainingState:
    saved = run.load_state()
    if saved is None:
        return TrainingState()
    tensors, state = saved
    learner.load(tensors)
    run.write_metrics(state.history)
    logger.info("going on in %s from step %d of %d", run.path, state.step, learner.total_steps)
    return state


def _description(
    config: TrainConfig, cache: FeatureCache, data: TrainingData, precision: str
) -> dict[str, Any]:
    """config.json: what the run is, as JSON values."""
    model = config.model(**_model_shape(config, cache))
    return {
        "format": RUN_FORMAT,
        "training": config.identity() | {"precision": precision},
        "model": model.to_dict(),
        "heads": cache.manifest.heads,
        "dataset": cache.manifest.dataset,
        "data": data.about,
        "cache": {
            "path": str(cache.path.resolve()),
            "identity": cache.identity,
            "settings": cache.settings.to_dict(),
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
    }


@contextmanager
def _curves(run: RunFolder, state: TrainingState) -> Iterator[SummaryWriter]:
    with storage_errors(run.tensorboard):
        writer = SummaryWriter(str(run.tensorboard), purge_step=len(state.history) + 1)
    try:
        yield writer
    except BaseException:
        with suppress(OSError):  # what ended the training matters more than the end of a curve
            writer.close()
        raise
    with storage_errors(run.tensorboard):
        writer.close()


def _draw(curves: SummaryWriter, metrics: Mapping[str, Any], run: RunFolder) -> None:
    """Add an epoch that is already saved. The writer has a thread: what it failed at is raised here or at its end."""
    with storage_errors(run.tensorboard):
        for name, value in metrics.items():
            if name != "epoch":
                curves.add_scalar(name, value, metrics["epoch"])
