"""What an evaluation writes and how it is checked, whether it reads a cache or videos. Free of torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vivit.pipeline.datasets.ek100_official import EK100_HEADS, is_ek100
from vivit.pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Files for EPIC-KITCHENS-100's challenge and official script, its lists, and the fusion of a joint head."""

    annotations: Path | None = None
    """Folder of EPIC-KITCHENS-100's annotation files, for the ids and subsets that a manifest does not know."""
    submission: Path | None = None
    """Challenge file to write (.zip)."""
    supervision: str = "2,3,4"
    """Supervision levels that a submission declares, 0 to 5 each: pre-training, labels, training data."""
    results: Path | None = None
    """File for the official evaluation script to write (.pkl)."""
    fusion: float | None = None
    """Share of the joint head in the fused score; None is one half."""
    allow_partial: bool = False
    """Evaluate what is there of an incomplete cache, and write files for it."""

    def __post_init__(self) -> None:
        if self.fusion is not None and not 0 <= self.fusion <= 1:
            raise ConfigError(f"fusion must be in [0, 1], got {self.fusion}")
        if not re.fullmatch("[0-5],[0-5],[0-5]", self.supervision):
            raise ConfigError(
                f"supervision must be three levels from 0 to 5, such as 2,3,4, got {self.supervision!r}"
            )
        for name, suffix in (("submission", ".zip"), ("results", ".pkl")):
            path: Path | None = getattr(self, name)
            if path is not None and path.suffix != suffix:
                raise ConfigError(f"--{name} {path} must end in {suffix}")

    @property
    def supervision_levels(self) -> dict[str, int]:
        """The levels by the names that they have in a submission."""
        levels = [int(level) for level in self.supervision.split(",")]
        return dict(zip(("sls_pt", "sls_tl", "sls_td"), levels, strict=True))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that say something about this evaluation."""
        return {
            name: value
            for name, value in vars(self).items()
            if name != "supervision" or self.submission is not None
        }

    @property
    def writes_files(self) -> bool:
        return self.submission is not None or self.results is not None

    def check_heads(self, heads: Mapping[str, Sequence[str]]) -> None:
        """ConfigError where an option is for EPIC-KITCHENS-100 and the heads are not."""
        if is_ek100(heads):
            return
        for name in ("submission", "results", "annotations"):
            if getattr(self, name) is not None:
                wanted = ", ".join(f"{head} {count}" for head, count in EK100_HEADS.items())
                found = ", ".join(f"{head} {len(names)}" for head, names in heads.items()) or "none"
                raise ConfigError(
                    f"--{name} is for EPIC-KITCHENS-100 (classes: {wanted}), and here the heads are {found}: leave it out"
                )
