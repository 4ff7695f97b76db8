"""What a stage-2 training is told. Free of torch, so that the command line can read the defaults."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivit.pipeline.errors import ConfigError
from vivit.pipeline.workspace import nearest

if TYPE_CHECKING:
    from vivit.stage2_temporal.model import ModelConfig

OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("auto", "float32", "bfloat16")
_WARMUP_EPOCHS = 2.5
_NOT_IN_IDENTITY = ("cache", "run", "allow_partial", "device", "precision", "memory_budget_bytes")
"""Where things lie and run; the cache is known by its identity, and the precision once it is resolved."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the temporal half is trained on a feature cache."""

    cache: Path
    """Feature cache to train on."""
    run: Path
    """Run folder to write, or to go on with."""
    train_split: str = "train"
    """Split to learn from."""
    validation_split: str | None = "validation"
    """Split that chooses the best epoch, where the cache has it; None keeps the last epoch."""
    allow_partial: bool = False
    """Train on what is there when the cache is not complete."""

    adapter: str = "bottleneck"
    """Adapter between the spatial encoder and the temporal half; `none` for no adapter."""
    adapter_width: int | None = None
    """Channels inside the adapter; None is a quarter of the token's."""
    temporal: str = "transformer"
    """`transformer`, or `mean` for the mean over time."""
    depth: int = 4
    """Blocks of the temporal transformer."""
    num_heads: int | None = None
    """Attention heads; None is one for each 64 channels."""
    mlp_ratio: float = 4.0
    """Hidden channels of a block's MLP, in units of the token's."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; earlier blocks have less, the first none."""

    epochs: int = 30
    """Times that each clip is used."""
    batch_size: int = 64
    """Clips per step."""
    optimizer: str = "adamw"
    """`adamw`, or `sgd` with momentum 0.9."""
    learning_rate: float = 5e-4
    """Highest learning rate, after the warm-up."""
    weight_decay: float = 0.05
    """Weight decay of all matrices (not of biases, norms, positions and class token)."""
    warmup_epochs: float | None = None
    """Epochs in which the learning rate rises from 0; then it falls to 0 along a cosine.

    None is 2.5, or a tenth of the epochs where they are fewer than 25.
    """
    label_smoothing: float = 0.1
    """Part of each target that is spread over all classes."""
    mixup: float = 0.0
    """Alpha of Beta(alpha, alpha), from which the share of mixed features is drawn; 0 mixes nothing."""
    clip_grad: float | None = 1.0
    """Largest norm of the gradient; None leaves it as it is."""
    ema: float | None = None
    """Decay of an average of the weights that is then validated and kept; None keeps the weights themselves."""
    validate_every: int = 1
    """Epochs from one validation to the next; the last epoch is always validated."""
    seed: int = 0
    """Seed of initialisation, order, choice of views, mixup and stochastic depth."""

    device: str = "auto"
    """`auto` (a GPU if there is one), or a device as PyTorch names it."""
    precision: str = "auto"
    """`float32`, `bfloat16` (autocast), or `auto`: bfloat16 on a GPU, else float32."""
    memory_budget_bytes: int | None = None
    """Bytes of features that may stay in memory; None is 60 % of what is free. More is read as it is needed."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "validate_every"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name in ("learning_rate", "clip_grad"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(f"{name} must be above 0, got {value}")
        for name in ("weight_decay", "mixup", "memory_budget_bytes"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ConfigError(f"{name} must not be negative, got {value}")
        for name in ("label_smoothing", "ema"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {value}")
        if self.warmup_epochs is not None and not 0 <= self.warmup_epochs < self.epochs:
            raise ConfigError(
                f"warmup_epochs must be at least 0 and less than epochs ({self.epochs}), got {self.warmup_epochs}"
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be in [0, 2**32), got {self.seed}")
        if self.optimizer not in OPTIMIZERS:
            raise nearest(self.optimizer, list(OPTIMIZERS), "optimizer")
        if self.precision not in PRECISIONS:
            raise nearest(self.precision, list(PRECISIONS), "precision")
        self.model(dim=self.num_heads or 1, time=1, heads={"any": 1})  # refuses bad values of the model

    @property
    def resolved_warmup_epochs(self) -> float:
        return min(_WARMUP_EPOCHS, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs

    def model(self, *, dim: int, time: int, heads: dict[str, int]) -> "ModelConfig":
        """The model for tokens [batch, time, dim] and `heads` (number of classes of each)."""
        from vivit.stage2_temporal.model import ModelConfig

        return ModelConfig(
            dim=dim,
            time=time,
            heads=heads,
            adapter=self.adapter,
            adapter_width=self.adapter_width,
            temporal=self.temporal,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            drop_path=self.drop_path,
        )

    def identity(self) -> dict[str, Any]:
        """The settings that decide the weights, as JSON values; a run goes on only with equal ones."""
        values = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_IDENTITY}
        return values | {"warmup_epochs": self.resolved_warmup_epochs}
