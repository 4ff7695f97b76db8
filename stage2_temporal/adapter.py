"""Adapters: small modules between the frozen spatial encoder and the temporal transformer, chosen by name.

Each adds to its input a change that starts at zero, so that a model with a fresh adapter is the model without it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vivit.pipeline.workspace import nearest

_KERNEL_SIZE = 3
"""Time steps that the convolution of an adapter looks at."""


class BottleneckAdapter(nn.Module):
    """Residual bottleneck on the token of each time step; starts as the identity."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, width)
        self.act = nn.GELU(approximate="tanh")
        self.up = _zero(nn.Linear(width, dim))
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, time, dim] in the same shape."""
        change: Tensor = self.up(self.act(self.down(tokens)))
        return tokens + change


class LinearAdapter(nn.Module):
    """Residual linear map of the token of each time step; starts as the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.change = _zero(nn.Linear(dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, time, dim] in the same shape."""
        change: Tensor = self.change(tokens)
        return tokens + change


class TemporalConvAdapter(nn.Module):
    """Residual bottleneck with a depth-wise convolution over time inside; starts as the identity.

    It lets neighbouring time steps see each other before the transformer does, as ST-Adapter (arXiv 2206.13559) does
    over time and space, with the activation behind the convolution. Beyond both ends of a view there are zeros, so that
    any number of time steps works.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, width)
        self.conv = nn.Conv1d(width, width, _KERNEL_SIZE, padding=_KERNEL_SIZE // 2, groups=width)
        self.act = nn.GELU(approximate="tanh")
        self.up = _zero(nn.Linear(width, dim))
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        _one_time_step(self.conv)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, time, dim] in the same shape."""
        mixed = self.conv(self.down(tokens).transpose(1, 2)).transpose(1, 2)
        change: Tensor = self.up(self.act(mixed))
        return tokens + change


ADAPTERS: dict[str, Callable[[int, int], nn.Module]] = {
    "bottleneck": BottleneckAdapter,
    "linear": lambda dim, width: LinearAdapter(dim),
    "temporal-conv": TemporalConvAdapter,
    "none": lambda dim, width: nn.Identity(),
}
"""Makers (dim, width) of adapters by name: a module from tokens [batch, time, dim] to tokens of that shape."""


def create_adapter(name: str, dim: int, width: int) -> nn.Module:
    """A fresh adapter; raises ConfigError for a name that is not registered."""
    if name not in ADAPTERS:
        raise nearest(name, list(ADAPTERS), "adapter")
    return ADAPTERS[name](dim, width)


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _one_time_step(conv: nn.Conv1d) -> None:
    """Start a depth-wise convolution as the identity: what it adds from other time steps is learnt."""
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    nn.init.zeros_(conv.weight)
    with torch.no_grad():
        conv.weight[:, :, conv.kernel_size[0] // 2] = 1
