"""Stochastic depth as the reference has it: whole clips lose a branch, and nothing is rescaled.

timm's own DropPath divides what stays by its probability, and in a spatial encoder would drop each time step by itself.
"""

import torch
from torch import Tensor, nn

from vivit.stage2_temporal.temporal import drop_path_rates


class ClipDropPath(nn.Module):
    """Drops a residual branch for all rows of a clip at once, in training only."""

    def __init__(self, rate: float, *, rows_per_clip: int = 1) -> None:
        super().__init__()
        self.rate, self.rows_per_clip = rate, rows_per_clip

    def forward(self, branch: Tensor) -> Tensor:
        """The branch [clip * row, token, dim] with some clips set to zero."""
        if not self.training:
            return branch
        kept = torch.rand(len(branch) // self.rows_per_clip, device=branch.device) >= self.rate
        return branch * kept.repeat_interleave(self.rows_per_clip).view(-1, 1, 1)

    def extra_repr(self) -> str:
        return f"rate={self.rate}, rows_per_clip={self.rows_per_clip}"


def set_drop_path(blocks: nn.Module, rate: float, *, rows_per_clip: int = 1) -> None:
    """Give timm `blocks` rates that rise linearly from 0 to `rate`; 0 is no stochastic depth."""
    modules = list(blocks.children())
    for block, value in zip(modules, drop_path_rates(rate, len(modules)), strict=True):
        for name in ("drop_path1", "drop_path2"):
            module = ClipDropPath(value, rows_per_clip=rows_per_clip) if value else nn.Identity()
            setattr(block, name, module)
