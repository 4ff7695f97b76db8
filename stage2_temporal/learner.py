"""Model, optimizer and average of the weights: what one training step changes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vivit.pipeline.device import autocast
from vivit.pipeline.errors import CheckpointError
from vivit.stage2_temporal.objective import known_clips, mean_head_loss, mixup_share
from vivit.stage2_temporal.optimisation import Optimisation
from vivit.stage2_temporal.optimizer import (
    create_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from vivit.stage2_temporal.parallel import rank, summed, world_size

_INIT_STREAM, _STEP_STREAM = 0, 1
Model = TypeVar("Model", bound=nn.Module)


class Batch(Protocol):
    """Clips of one training step, on the device."""

    @property
    def labels(self) -> Mapping[str, Tensor]:
        """Class ids [batch] per head, -1 where unknown."""
        ...

    def inputs(self, part: slice, share: float) -> Tensor:
        """What the model is given [part, ...] of some clips, each mixed with its partner in the reversed batch."""
        ...


def fresh_model(make: Callable[[], Model], seed: int) -> Model:
    """A model whose random weights depend on `seed` only."""
    torch.manual_seed(_seed(seed, 0, _INIT_STREAM))
    return make()


class Learner:
    """A model in training. Each step is a function of the state before it, the batch and (seed, step).

    In a data-parallel training every process has its own part of the batch, and all make the same step.
    """

    def __init__(
        self,
        config: Optimisation,
        model: nn.Module,
        *,
        device: torch.device,
        precision: str,
        steps_per_epoch: int,
    ) -> None:
        self._config, self.device, self.precision = config, device, precision
        self.total_steps = config.epochs * steps_per_epoch
        self._warmup_steps = config.resolved_warmup_epochs * steps_per_epoch
        self.model = model.to(device)
        self._forward: nn.Module = self.model
        if world_size() > 1:
            self._forward = DistributedDataParallel(
                self.model, device_ids=[device] if device.type == "cuda" else None
            )
        self._optimizer = create_optimizer(self.model, config)
        self._ema = None if config.ema is None else ModelEmaV3(self.model, decay=config.ema, use_warmup=True)

    @property
    def kept(self) -> nn.Module:
        """The model to validate and keep: the average where there is one."""
        return self.model if self._ema is None else self._ema.module

    def learning_rate(self, step: int) -> float:
        base = self._config.learning_rate
        return learning_rate(step, base=base, warmup_steps=self._warmup_steps, total_steps=self.total_steps)

    def step(self, batch: Batch, step: int) -> Tensor:
        """Learn from one batch; the loss, still on the device."""
        # stochastic depth draws from it
        torch.manual_seed(_seed(self._config.seed, step, _STEP_STREAM, *([rank()] if rank() else [])))
        set_learning_rate(self._optimizer, self.learning_rate(step))
        share = mixup_share(self._config.mixup, self._config.seed, step)
        loss = self._backward(batch, share)
        if self._config.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._config.clip_grad)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._ema is not None:
            self._ema.update(self.model, step + 1)
        return loss

    def _backward(self, batch: Batch, share: float) -> Tensor:
        """Gradients of the whole batch, of all processes; its loss."""
        labels = batch.labels
        counts = {head: summed(known_clips(values, share).sum()) for head, values in labels.items()}
        size = len(next(iter(labels.values())))
        total = torch.zeros((), device=self.device)
        for part, is_last in _parts(size, self._config.accumulate):
            with self._unsynchronised(is_last):
                with autocast(self.device, self.precision):
                    logits = self._forward(batch.inputs(part, share))
                loss = mean_head_loss(
                    logits,
                    labels,
                    share=share,
                    smoothing=self._config.label_smoothing,
                    part=part,
                    counts=counts,
                )
                # DistributedDataParallel takes the mean over processes, and the counts are of all of them.
                (loss * world_size()).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return summed(total)

    def _unsynchronised(self, is_last: bool) -> AbstractContextManager[Any]:
        """Leave the exchange of gradients to the last part."""
        if isinstance(self._forward, DistributedDataParallel) and not is_last:
            return self._forward.no_sync()
        return nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        """All that `load` needs, by name."""
        parts = {"model": self.model.state_dict(), "optimizer": optimizer_tensors(self._optimizer)}
        if self._ema is not None:
            parts["average"] = self._ema.module.state_dict()
        return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to where `tensors` were taken."""
        try:
            self.model.load_state_dict(_part(tensors, "model"))
            load_optimizer_tensors(self._optimizer, _part(tensors, "optimizer"))
            if self._ema is not None:
                self._ema.module.load_state_dict(_part(tensors, "average"))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"the saved state does not fit the model: {error}") from error


def _parts(size: int, count: int) -> Iterator[tuple[slice, bool]]:
    """At most `count` slices of a batch of `size` clips, each with whether it is the last."""
    length = -(-size // count)
    for start in range(0, size, length):
        yield slice(start, start + length), start + length >= size


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{part}/"): value for key, value in tensors.items() if key.startswith(f"{part}/")
    }


def _seed(seed: int, step: int, stream: int, *more: int) -> int:
    """A seed for torch's global generator, from (seed, step) and what it is for."""
    return int(np.random.SeedSequence([seed, step, stream, *more]).generate_state(1, np.uint64)[0] >> 1)
