"""How a model learns, whatever it learns from. Free of torch, so that the command line can read the defaults."""

from dataclasses import dataclass

from vivit.pipeline.errors import ConfigError
from vivit.pipeline.workspace import nearest

OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("auto", "float32", "bfloat16")
_WARMUP_EPOCHS = 2.5


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Optimizer, schedule, regularisation and seed of a training."""

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
    """Alpha of Beta(alpha, alpha), from which the share of mixed clips is drawn; 0 mixes nothing."""
    clip_grad: float | None = 1.0
    """Largest norm of the gradient; None leaves it as it is."""
    ema: float | None = None
    """Decay of an average of the weights that is then validated and kept; None keeps the weights themselves."""
    validate_every: int = 1
    """Epochs from one validation to the next; the last epoch is always validated."""
    seed: int = 0
    """Seed of initialisation, order, choice of views, mixup and stochastic depth."""
    accumulate: int = 1
    """Parts that a batch goes through the model in, for less memory; the step stays the same."""

    device: str = "auto"
    """`auto` (a GPU if there is one), or a device as PyTorch names it."""
    precision: str = "auto"
    """`float32`, `bfloat16` (autocast), or `auto`: bfloat16 on a GPU, else float32."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "validate_every", "accumulate"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name in ("learning_rate", "clip_grad"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(f"{name} must be above 0, got {value}")
        for name in ("weight_decay", "mixup"):
            if (value := getattr(self, name)) < 0:
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

    @property
    def resolved_warmup_epochs(self) -> float:
        return min(_WARMUP_EPOCHS, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs
