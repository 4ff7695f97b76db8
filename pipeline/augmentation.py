"""Augmentation of training views by name: `none`, `reference-colour`, `reference-randaugment-n2-m15`, ..."""

import re
from dataclasses import dataclass
from typing import Self

from vivit.pipeline.errors import ConfigError
from vivit.pipeline.workspace import nearest

NONE = "none"
REFERENCE_COLOUR = "reference-colour"
REFERENCE_RANDAUGMENT = "reference-randaugment"
RANDAUGMENT = "randaugment"
KINDS = (NONE, REFERENCE_COLOUR, REFERENCE_RANDAUGMENT, RANDAUGMENT)
"""Nothing, the reference's colour jitter, its RandAugment for videos, and torchvision's RandAugment."""
_DEFAULTS = {REFERENCE_RANDAUGMENT: (2, 15), RANDAUGMENT: (2, 9)}
"""Layers and magnitude: the reference's for EPIC-KITCHENS-100, and torchvision's."""
_MOST_LAYERS = 16
_MOST = {REFERENCE_RANDAUGMENT: 20, RANDAUGMENT: 30}
"""Largest magnitude: where all bits are kept, and torchvision's number of bins."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to the pixels of a training view, with one draw for all of its frames."""

    kind: str = NONE
    layers: int = 0
    """Operations one after the other; 0 where the kind has no layers."""
    magnitude: int = 0
    """Strength of each; 0 where the kind has no magnitude."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """The augmentation of a name: a kind, for a RandAugment with `-n<layers>` and `-m<magnitude>` where wanted."""
        found = re.fullmatch(r"(.+?)(?:-n(\d+))?(?:-m(\d+))?", text)
        kind, layers, magnitude = found.groups() if found else (text, None, None)
        if kind not in KINDS:
            raise nearest(kind, list(KINDS), "augmentation")
        if kind not in _DEFAULTS:
            if kind != text:
                raise ConfigError(f"augment {text!r}: {kind} has neither layers nor a magnitude")
            return cls(kind=kind)
        usual_layers, usual_magnitude = _DEFAULTS[kind]
        made = cls(
            kind=kind,
            layers=usual_layers if layers is None else int(layers),
            magnitude=usual_magnitude if magnitude is None else int(magnitude),
        )
        if not 1 <= made.layers <= _MOST_LAYERS:
            raise ConfigError(f"augment {text!r}: layers must be 1 to {_MOST_LAYERS}, got {made.layers}")
        if made.magnitude > _MOST[kind]:
            raise ConfigError(
                f"augment {text!r}: the magnitude must be 0 to {_MOST[kind]}, got {made.magnitude}"
            )
        return made

    def __str__(self) -> str:
        """The name in full; `parse` gives an equal augmentation back."""
        return f"{self.kind}-n{self.layers}-m{self.magnitude}" if self.kind in _DEFAULTS else self.kind
