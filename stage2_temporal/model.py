"""The stage-2 model: adapter, temporal half, one linear head per label column."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import Tensor, nn

from vivit.pipeline.errors import ConfigError
from vivit.pipeline.workspace import nearest
from vivit.stage2_temporal.adapter import ADAPTERS, create_adapter
from vivit.stage2_temporal.temporal import TemporalMean, TemporalTransformer, default_num_heads


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the model is made of; equal after a trip through JSON."""

    dim: int
    """Channels of a token."""
    time: int
    """Time steps of a view."""
    heads: dict[str, int]
    """Number of classes per head."""
    adapter: str = "bottleneck"
    """Name of the adapter between the spatial encoder and the temporal half; `none` for no adapter."""
    adapter_width: int | None = None
    """Channels inside the adapter; None is a quarter of `dim`."""
    temporal: str = "transformer"
    """`transformer`, or `mean` for the mean over time."""
    depth: int = 4
    """Blocks of the temporal transformer."""
    num_heads: int | None = None
    """Attention heads; None is one for each 64 channels."""
    mlp_ratio: float = 4.0
    """Hidden channels of a block's MLP, in units of `dim`."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; earlier blocks have less, the first none."""

    def __post_init__(self) -> None:
        if self.adapter not in ADAPTERS:
            raise nearest(self.adapter, list(ADAPTERS), "adapter")
        if self.temporal not in TEMPORAL:
            raise nearest(self.temporal, list(TEMPORAL), "temporal model")
        for name in ("dim", "time", "depth", "num_heads", "adapter_width"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path must be in [0, 1), got {self.drop_path}")
        if self.mlp_ratio <= 0:
            raise ConfigError(f"mlp_ratio must be above 0, got {self.mlp_ratio}")
        if self.num_heads is not None and self.dim % self.num_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} does not divide the {self.dim} channels of a token"
            )
        _check_heads(self.heads)

    @property
    def resolved_num_heads(self) -> int:
        return self.num_heads or default_num_heads(self.dim)

    @property
    def resolved_adapter_width(self) -> int:
        return self.adapter_width or max(1, self.dim // 4)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values; `from_dict` gives an equal one back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**values)


class TemporalModel(nn.Module):
    """Class scores of a view from the tokens of its time steps."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter = create_adapter(config.adapter, config.dim, config.resolved_adapter_width)
        self.temporal = TEMPORAL[config.temporal](config)
        self.heads = nn.ModuleDict(
            {head: _zero_linear(config.dim, classes) for head, classes in config.heads.items()}
        )

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Logits [batch, class] per head of tokens [batch, time, dim]."""
        vector = self.temporal(self.adapter(tokens))
        return {name: head(vector) for name, head in self.heads.items()}


def _transformer(config: ModelConfig) -> nn.Module:
    return TemporalTransformer(
        config.dim,
        config.time,
        depth=config.depth,
        num_heads=config.resolved_num_heads,
        mlp_ratio=config.mlp_ratio,
        drop_path=config.drop_path,
    )


TEMPORAL: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "transformer": _transformer,
    "mean": lambda config: TemporalMean(),
}
"""Makers of the temporal half by name: a module from tokens [batch, time, dim] to vectors [batch, dim]."""


def _zero_linear(dim: int, classes: int) -> nn.Linear:
    linear = nn.Linear(dim, classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _check_heads(heads: dict[str, int]) -> None:
    if not heads:
        raise ConfigError("the model needs at least one head: the manifest has no label/<head> column")
    for head, classes in heads.items():
        if classes < 1:
            raise ConfigError(f"head {head} has no classes")
        if not head or "." in head or hasattr(nn.ModuleDict, head):
            raise ConfigError(f"a head cannot be called {head!r} (PyTorch reserves it): rename label/{head}")
