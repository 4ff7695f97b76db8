"""Model, optimizer and average of the weights: what one training step changes."""

from collections.abc import Mapping

import numpy as np
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

from vivit.pipeline.device import autocast
from vivit.pipeline.errors import CheckpointError
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.loader import Batch
from vivit.stage2_temporal.model import ModelConfig, TemporalModel
from vivit.stage2_temporal.objective import mean_head_loss, mix, mixup_share
from vivit.stage2_temporal.optimizer import (
    create_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)

_INIT_STREAM, _STEP_STREAM = 0, 1


class Learner:
    """A model in training. Each step is a function of the state before it, the batch and (seed, step)."""

    def __init__(
        self,
        config: TrainConfig,
        model: ModelConfig,
        *,
        device: torch.device,
        precision: str,
        steps_per_epoch: int,
    ) -> None:
        self._config, self.device, self.precision = config, device, precision
        self.total_steps = config.epochs * steps_per_epoch
        self._warmup_steps = config.resolved_warmup_epochs * steps_per_epoch
        torch.manual_seed(_seed(config.seed, 0, _INIT_STREAM))
        self.model = TemporalModel(model).to(device)
        self._optimizer = create_optimizer(self.model, config)
        self._ema = None if config.ema is None else ModelEmaV3(self.model, decay=config.ema, use_warmup=True)

    @property
    def kept(self) -> TemporalModel:
        """The model to validate and keep: the average where there is one."""
        model = self.model if self._ema is None else self._ema.module
        assert isinstance(model, TemporalModel)
        return model

    def learning_rate(self, step: int) -> float:
        base = self._config.learning_rate
        return learning_rate(step, base=base, warmup_steps=self._warmup_steps, total_steps=self.total_steps)

    def step(self, batch: Batch, step: int) -> Tensor:
        """Learn from one batch; the loss, still on the device."""
        torch.manual_seed(_seed(self._config.seed, step, _STEP_STREAM))  # stochastic depth draws from it
        set_learning_rate(self._optimizer, self.learning_rate(step))
        share = mixup_share(self._config.mixup, self._config.seed, step)
        with autocast(self.device, self.precision):
            logits = self.model(mix(batch.tokens.float(), share))
        loss = mean_head_loss(logits, batch.labels, share=share, smoothing=self._config.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._config.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._config.clip_grad)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._ema is not None:
            self._ema.update(self.model, step + 1)
        return loss.detach()

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


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}/"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _seed(seed: int, step: int, stream: int) -> int:
    """A seed for torch that no other (seed, step, stream) shares."""
    return int(np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)[0] >> np.uint64(1))
