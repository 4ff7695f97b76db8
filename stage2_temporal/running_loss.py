"""The mean loss of an epoch, without waiting for the device at each step."""

import math

import torch
from torch import Tensor, nn

from vivit.pipeline.errors import VivitError
from vivit.stage2_temporal.run_folder import TrainingState

_REMEDY = "use a lower learning rate, more warm-up or float32, and another --run (this one keeps its last good state)"


class DivergedError(VivitError):
    """The loss is no longer a number."""


def check_finite(model: nn.Module, step: int) -> None:
    """DivergedError where a weight is not finite: the loss shows that one step later, when it may be saved."""
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise DivergedError(f"weights are no longer finite after step {step}: {_REMEDY}")


class RunningLoss:
    """Losses of an epoch, left on the device until they are added up."""

    def __init__(self, state: TrainingState, *, num_added: int) -> None:
        self._state = state
        self._pending: list[Tensor] = []
        self.num_added = num_added
        """Steps of the epoch whose loss is in the state."""

    @property
    def in_words(self) -> str:
        """The mean so far, for a status line; empty before the first look."""
        return f", loss {self._state.loss_sum / self.num_added:.3f}" if self.num_added else ""

    def append(self, loss: Tensor) -> None:
        self._pending.append(loss)

    def add_up(self) -> None:
        """Add to the state; DivergedError where one is not finite, before anything of it is saved."""
        first = self._state.step - len(self._pending)
        values = torch.stack(self._pending).tolist() if self._pending else []
        for index, value in enumerate(values):
            if not math.isfinite(value):
                raise DivergedError(f"the loss became {value} at step {first + index + 1}: {_REMEDY}")
            self._state.loss_sum += value
        self.num_added += len(values)
        self._pending = []
