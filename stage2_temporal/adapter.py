"""Adapters: small modules between the frozen spatial encoder and the temporal transformer, chosen by name."""

from collections.abc import Callable

from torch import Tensor, nn

from vivit.pipeline.workspace import nearest


class BottleneckAdapter(nn.Module):
    """Residual bottleneck on the token of each time step; starts as the identity."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, width)
        self.act = nn.GELU(approximate="tanh")
        self.up = nn.Linear(width, dim)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, time, dim] in the same shape."""
        change: Tensor = self.up(self.act(self.down(tokens)))
        return tokens + change


ADAPTERS: dict[str, Callable[[int, int], nn.Module]] = {
    "bottleneck": BottleneckAdapter,
    "none": lambda dim, width: nn.Identity(),
}
"""Makers (dim, width) of adapters by name: a module from tokens [batch, time, dim] to tokens of that shape."""


def create_adapter(name: str, dim: int, width: int) -> nn.Module:
    """A fresh adapter; raises ConfigError for a name that is not registered."""
    if name not in ADAPTERS:
        raise nearest(name, list(ADAPTERS), "adapter")
    return ADAPTERS[name](dim, width)
