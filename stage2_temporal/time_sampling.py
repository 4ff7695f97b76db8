"""Which time steps of a stored view a model looks at, where it looks at fewer than were extracted.

Free of numpy, so that the command line can read the names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from vivit.pipeline.errors import ConfigError
from vivit.pipeline.workspace import nearest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from vivit.pipeline.feature_cache import FeatureCache

FRAME_SAMPLINGS: dict[str, Callable[[int, int], int]] = {
    "stride": lambda stored, used: stored // used,
    "window": lambda stored, used: 1,
}
"""Ways to choose time steps by name: a function (stored, used) that gives the step from one to the next."""


@dataclass(frozen=True, kw_only=True)
class TimeSampling:
    """Time steps `start`, `start + step`, ..., of which `num_times` are used; training draws the start."""

    num_times: int
    """Time steps used."""
    step: int = 1
    """Stored time steps from one that is used to the next."""
    num_starts: int = 1
    """Starts that keep all time steps inside the view: 0 .. num_starts - 1."""

    @classmethod
    def of(cls, stored: int, used: int, kind: str) -> Self:
        """`used` of `stored` time steps; ConfigError for an unknown kind."""
        if kind not in FRAME_SAMPLINGS:
            raise nearest(kind, list(FRAME_SAMPLINGS), "frame sampling")
        assert 1 <= used <= stored
        step = FRAME_SAMPLINGS[kind](stored, used)
        return cls(num_times=used, step=step, num_starts=stored - (used - 1) * step)

    @property
    def middle(self) -> int:
        """The start of evaluation: the middle one, the earlier of two."""
        return (self.num_starts - 1) // 2

    @property
    def of_middle(self) -> slice:
        """The time steps of evaluation."""
        return slice(self.middle, self.middle + (self.num_times - 1) * self.step + 1, self.step)

    @property
    def is_whole(self) -> bool:
        """Whether all stored time steps are used."""
        return self.step == self.num_starts == 1

    def indices(self, starts: "npt.NDArray[np.int64]") -> "npt.NDArray[np.int64]":
        """Time steps [clip, time] from the starts [clip], ascending."""
        import numpy as np

        return starts[:, None] + self.step * np.arange(self.num_times)


def time_sampling(cache: "FeatureCache", num_frames: int | None, kind: str) -> TimeSampling:
    """The time steps of `num_frames` frames (None: all) of the views in `cache`.

    ConfigError where the views have fewer frames, or where frames do not make whole time steps.
    """
    stored, tubelet = cache.settings.num_times, cache.settings.backbone.tubelet
    if num_frames is None:
        return TimeSampling.of(stored, stored, kind)
    if num_frames % tubelet:
        lower = num_frames - num_frames % tubelet
        nearby = f"{lower} or {lower + tubelet}" if lower else f"{tubelet}"
        raise ConfigError(
            f"num_frames {num_frames} is not a multiple of {tubelet}, the frames of one token (tubelet) in {cache.path}: "
            f"pass --num-frames {nearby}"
        )
    if num_frames > stored * tubelet:
        raise ConfigError(
            f"num_frames {num_frames} is more than the {stored * tubelet} of a view in {cache.path}: "
            f"pass --num-frames {stored * tubelet} or less, or extract views with more frames"
        )
    return TimeSampling.of(stored, num_frames // tubelet, kind)
