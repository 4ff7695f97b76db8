"""The stage-2 model: adapter, temporal half, one linear head per label column."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import Tensor, nn

from vivit.pipeline.errors import ConfigError
from vivit.pipeline.workspace import nearest
from vivit.stage2_temporal.adapter import ADAPTERS, create_adapter
from vivit.stage2_temporal.joint_head import JOINT_HEAD
from vivit.stage2_temporal.temporal import TemporalMean, TemporalTransformer, default_num_heads


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the model is made of; equal after a trip through JSON."""

    dim: int
    """Channels of a token."""
    time: int
    """Time steps that are looked at."""
    heads: dict[str, int]
    """Number of classes per head."""
    pairs: list[int] | None = None
    """Of a model with a joint head, the (verb, noun) pair of each of its classes, as verb * nouns + noun."""
    adapter: str = "bottleneck"
    """Adapter between the spatial encoder and the temporal half: `bottleneck`, `linear`, `temporal-conv` or `none`."""
    adapter_width: int | None = None
    """Channels inside a bottleneck or temporal-conv adapter; None is a quarter of `dim`."""
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
        if self.pairs is not None and self.heads.get(JOINT_HEAD) != len(self.pairs):
            raise ConfigError(
                f"head {JOINT_HEAD} has {self.heads.get(JOINT_HEAD)} classes for {len(self.pairs)} pairs"
            )

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
        self.heads = class_heads(config.dim, config.heads)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Logits [batch, class] per head of tokens [batch, time, dim]."""
        vector = self.temporal(self.adapter(tokens))
        return {name: head(vector) for name, head in self.heads.items()}


def parameter_counts(model: TemporalModel) -> dict[str, int]:
    """Trainable parameters of `adapter`, `temporal` and `heads`, and of all together as `total`."""
    counts = {
        name: sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad)
        for name, part in model.named_children()
    }
    return counts | {"total": sum(counts.values())}


def parameters_in_words(model: TemporalModel) -> str:
    """`parameters: adapter 18,624, temporal 1,779,264, heads 9,650, in all 1,807,538`."""
    counts = parameter_counts(model)
    total = counts.pop("total")
    parts = [f"{name} {count:,}" for name, count in counts.items()]
    return ", ".join([f"parameters: {parts[0]}", *parts[1:], f"in all {total:,}"])


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


def class_heads(dim: int, heads: Mapping[str, int]) -> nn.ModuleDict:
    """One linear map per head, from `dim` channels to its classes; all zeros, as in the reference."""
    linears = nn.ModuleDict({head: nn.Linear(dim, classes) for head, classes in heads.items()})
    for parameter in linears.parameters():
        nn.init.zeros_(parameter)
    return linears


def _check_heads(heads: dict[str, int]) -> None:
    if not heads:
        raise ConfigError("the model needs at least one head: the manifest has no label/<head> column")
    for head, classes in heads.items():
        if classes < 1:
            raise ConfigError(f"head {head} has no classes")
        if not head or "." in head or hasattr(nn.ModuleDict, head):
            raise ConfigError(f"a head cannot be called {head!r} (PyTorch reserves it): rename label/{head}")
