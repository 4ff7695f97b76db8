"""The training loop of both trainings, end to end and temporal: stopped and resumed at any step."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, Protocol

from torch import nn
from torch.utils.tensorboard import SummaryWriter

from vivit.pipeline.errors import InterruptedRunError
from vivit.pipeline.progress import Progress
from vivit.pipeline.workspace import storage_errors
from vivit.stage2_temporal.interruption import StopRequest
from vivit.stage2_temporal.learner import Batch, Learner
from vivit.stage2_temporal.optimisation import Optimisation
from vivit.stage2_temporal.parallel import any_of, rank, wait_for_all, world_size
from vivit.stage2_temporal.run_folder import RunFolder, TrainingState
from vivit.stage2_temporal.running_loss import RunningLoss, check_finite
from vivit.stage2_temporal.validation import best_epoch

logger = logging.getLogger(__name__)

Report = Callable[[Mapping[str, Any]], None]
"""Called with the metrics of each epoch."""
Validate = Callable[[nn.Module], Mapping[str, float]]
"""Metrics of a model on the validation split."""
Keep = Callable[[nn.Module, Mapping[str, Any]], None]
"""Writes the weights that evaluation uses, with the metrics of their epoch."""

_LOSS_EVERY = 10
"""Steps between two looks at the loss: each look waits for the device."""


class Batches(Protocol):
    """The batches of each epoch, a function of (seed, epoch) only."""

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from number `first` on."""
        ...


def resume(run: RunFolder, learner: Learner) -> TrainingState:
    """Where the run stands, with the learner set to it; a fresh state for a run that has saved nothing."""
    saved = run.load_state()
    if saved is None:
        return TrainingState()
    tensors, state = saved
    learner.load(tensors)
    if rank() == 0:
        run.write_metrics(state.history)
    logger.info("going on in %s from step %d of %d", run.path, state.step, learner.total_steps)
    return state


def fit(
    learner: Learner,
    batches: Batches,
    state: TrainingState,
    run: RunFolder,
    *,
    config: Optimisation,
    validate: Validate | None,
    keep: Keep,
    report: Report | None = None,
) -> None:
    """Run all epochs that are not done yet; `state` is brought along.

    Raises InterruptedRunError, with the state saved, after SIGINT or SIGTERM. Of several processes, the first writes.
    """
    steps_per_epoch = batches.steps_per_epoch
    with (
        StopRequest() as stop,
        Progress("training", learner.total_steps - state.step, "steps", is_shown=rank() == 0) as progress,
        _curves(run, state) as curves,
    ):
        for epoch in range(state.step // steps_per_epoch, config.epochs):
            started, spent_before = time.perf_counter(), state.seconds
            losses = RunningLoss(state, num_added=state.step % steps_per_epoch)
            for batch in batches.epoch(epoch, first=state.step % steps_per_epoch):
                # several processes have to agree, which waits for the device
                is_asked = world_size() == 1 or state.step % _LOSS_EVERY == 0
                if is_asked and any_of(stop.requested, learner.device):
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
            metrics: dict[str, Any] = {
                "epoch": epoch + 1,
                "step": state.step,
                "loss": state.loss_sum / steps_per_epoch,
                "learning_rate": learner.learning_rate(state.step - 1),
            }
            is_due = (epoch + 1) % config.validate_every == 0 or epoch + 1 == config.epochs
            if validate is not None and is_due:
                metrics |= validate(learner.kept)
            metrics["seconds"] = round(spent_before + time.perf_counter() - started, 3)
            _finish_epoch(metrics, learner, state, run, keep)
            _draw(curves, metrics, run)
            if report is not None and rank() == 0:
                report(metrics)


def _stop(learner: Learner, state: TrainingState, run: RunFolder) -> NoReturn:
    check_finite(learner.model, state.step)
    _save(learner, state, run)
    raise InterruptedRunError(
        f"stopped after step {state.step} of {learner.total_steps}, saved in {run.path}: "
        "run the same command again to go on"
    )


def _finish_epoch(
    metrics: dict[str, Any], learner: Learner, state: TrainingState, run: RunFolder, keep: Keep
) -> None:
    """Keep the weights if they are the best, then save the state.

    In this order a kill in between costs nothing: the epoch is run again and keeps the same weights again.
    """
    state.history.append(metrics)
    if best_epoch(state.history) is metrics and rank() == 0:
        keep(learner.kept, {name: value for name, value in metrics.items() if name != "seconds"})
    state.loss_sum = state.seconds = 0.0
    _save(learner, state, run)


def _save(learner: Learner, state: TrainingState, run: RunFolder) -> None:
    if rank() == 0:
        run.save_state(learner.tensors(), state)
    wait_for_all()


@contextmanager
def _curves(run: RunFolder, state: TrainingState) -> Iterator[SummaryWriter | None]:
    if rank() > 0:
        yield None
        return
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


def _draw(curves: SummaryWriter | None, metrics: Mapping[str, Any], run: RunFolder) -> None:
    """Add an epoch that is already saved. The writer has a thread: what it failed at is raised here or at its end."""
    if curves is None:
        return
    with storage_errors(run.tensorboard):
        for name, value in metrics.items():
            if name != "epoch":
                curves.add_scalar(name, value, metrics["epoch"])
