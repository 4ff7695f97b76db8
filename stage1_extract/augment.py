"""Augmentation of training views on the device: one draw for all frames of a view, whoever computes it and when."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vivit.pipeline.augmentation import NONE, REFERENCE_COLOUR, REFERENCE_RANDAUGMENT, Augmentation
from vivit.pipeline.views import ViewSpec, view_draws
from vivit.stage1_extract import reference_augment, torchvision_augment

_STREAM = 1
"""Keeps these draws apart from those of places and times."""


@dataclass(frozen=True)
class Augmenter:
    """Augments training views. The draw depends on (seed, clip_id, view) only."""

    augmentation: Augmentation
    seed: int
    device: torch.device

    @classmethod
    def of(cls, views: ViewSpec, *, seed: int, device: torch.device) -> Self | None:
        """The augmenter that a spec asks for; None where it asks for none."""
        augmentation = Augmentation.parse(views.augment)
        return None if augmentation.kind == NONE else cls(augmentation, seed, device)

    def clip(self, crops: npt.NDArray[np.uint8], *, clip_id: str, first_view: int = 0) -> Iterator[Tensor]:
        """Each view, uint8 [frame, height, width, channel] on the device, of crops [view, ...] numbered from `first_view`."""
        for number, view in enumerate(crops, first_view):
            pixels = torch.from_numpy(view).to(self.device, non_blocking=True)
            yield self.view(pixels, clip_id=clip_id, number=number)

    def view(self, pixels: Tensor, *, clip_id: str, number: int) -> Tensor:
        """uint8 RGB [frame, height, width, channel], augmented, of training view `number`."""
        video = pixels.permute(0, 3, 1, 2).contiguous()  # whole planes: many times faster on a CPU
        draws = view_draws(self._num_draws, seed=self.seed, clip_id=clip_id, view=number, stream=_STREAM)
        return self._augmented(video, draws).permute(0, 2, 3, 1)

    @property
    def _num_draws(self) -> int:
        kind, layers = self.augmentation.kind, self.augmentation.layers
        if kind == REFERENCE_COLOUR:
            return reference_augment.COLOUR_DRAWS
        if kind == REFERENCE_RANDAUGMENT:
            return layers * reference_augment.LAYER_DRAWS
        return layers * torchvision_augment.LAYER_DRAWS

    def _augmented(self, video: Tensor, draws: list[float]) -> Tensor:
        kind, magnitude = self.augmentation.kind, self.augmentation.magnitude
        if kind == REFERENCE_COLOUR:
            return reference_augment.reference_colour(video, draws)
        if kind == REFERENCE_RANDAUGMENT:
            return reference_augment.reference_randaugment(video, draws, magnitude=magnitude)
        return torchvision_augment.randaugment(video, draws, magnitude=magnitude)
