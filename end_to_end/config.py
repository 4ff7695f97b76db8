"""What an end-to-end training is told."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vivit.end_to_end.image_init import INFLATIONS
from vivit.pipeline.checkpoint import FACTORISED_ENCODER, ORDERS, VIDEO_MODELS
from vivit.pipeline.errors import ConfigError
from vivit.pipeline.local_copy import local_file
from vivit.pipeline.storage import Location
from vivit.pipeline.views import ViewSpec
from vivit.pipeline.workspace import nearest
from vivit.stage2_temporal.config import TemporalOptions
from vivit.stage2_temporal.optimisation import Optimisation

FREEZABLE = ("none", "spatial", "temporal")
WARM_UP_FRAMES = 8
"""Frames of a warm-up's views, as in the paper."""
_NOT_IN_IDENTITY = (
    "manifest",
    "data_root",
    "run",
    "device",
    "precision",
    "decode_threads",
    "decode_memory_mb",
    "checkpoint_gradients",
)
"""Where things lie and run, and what changes nothing but time and memory."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TemporalOptions, Optimisation):
    """How a whole video model is trained on videos: the paper's warm-up on few frames, and its baselines."""

    manifest: Location
    """Manifest of the clips."""
    data_root: Location
    """Folder that the manifest's video paths start from."""
    run: Path
    """Run folder to write, or to go on with."""
    train_split: str = "train"
    """Split to learn from."""
    validation_split: str | None = "validation"
    """Split that chooses the best epoch, where the manifest has it; None keeps the last epoch."""

    model: str = "fe"
    """`fe` (Factorised Encoder), `joint`, `factorised-self-attention` or `factorised-dot-product`."""
    backbone: str = "vit_b16"
    """Image ViT to start from: a short name or timm id, or a model file."""
    weights: str = "pretrained"
    """Its weights: `pretrained`, `random`, or a file, whose positions timm fits to the crop size if they are for another."""
    views: ViewSpec = field(default_factory=lambda: warm_up_views(ViewSpec()))
    """Frames and crops; each epoch draws new views."""
    tubelet: int | None = None
    """Frames that one token looks at; None is those of the backbone, 1 for an image ViT."""
    inflation: str = "central"
    """How a tubelet's kernel is made of an image's: `central` frame, as the reference does, or `average`."""
    order: str = "time_space"
    """Which attention of factorised-self-attention comes first: `time_space` or `space_time`."""
    freeze: str = "none"
    """Half of the Factorised Encoder that is not trained: `none`, `spatial` or `temporal`."""

    adapter: str = "none"
    """Adapter between the halves of the Factorised Encoder."""
    learning_rate: float = 1e-4
    """Highest learning rate, after the warm-up."""
    drop_path: float = 0.0
    """Stochastic depth of the last block of each encoder; earlier blocks have less, the first none."""

    checkpoint_gradients: bool = False
    """Compute inner results again in the backward pass instead of keeping them: less memory, a third more time."""
    decode_threads: int = 0
    """Threads that decode ahead of the steps, per process; 0 chooses for this machine."""
    decode_memory_mb: int = 2048
    """Memory for decoded clips that wait, per process, in MiB."""
    clip_timeout_sec: float = 120.0
    """Longest time that one clip may take to decode, in seconds."""

    def __post_init__(self) -> None:
        Optimisation.__post_init__(self)
        TemporalOptions.__post_init__(self)
        known = {"model": VIDEO_MODELS, "inflation": INFLATIONS, "freeze": FREEZABLE, "order": ORDERS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise nearest(getattr(self, name), list(values), name)
        for name, least in (("tubelet", 1), ("decode_threads", 0), ("decode_memory_mb", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if self.clip_timeout_sec <= 0:
            raise ConfigError(f"clip_timeout_sec must be above 0, got {self.clip_timeout_sec}")
        if self.model != FACTORISED_ENCODER:
            parts = (
                "freeze",
                "adapter",
                "init",
                "depth",
                "num_heads",
                "mlp_ratio",
                "adapter_width",
                "joint_head",
            )
            for name in parts:
                value = getattr(self, name)
                if value != getattr(PretrainConfig, name):
                    raise ConfigError(f"{name} {value} needs the two halves of --model fe, not {self.model}")

    def identity(self) -> dict[str, Any]:
        """The settings that decide the weights, as JSON values; a run goes on only with equal ones.

        Files are known by the digest of their bytes: CheckpointError where one cannot be read.
        """
        from vivit.stage2_temporal.init_source import file_sha256

        values = {name: value for name, value in vars(self).items() if name not in _NOT_IN_IDENTITY}
        if not self.joint_head:
            del values["joint_head"]  # runs from before there were any stay the same
        for name in ("backbone", "weights"):
            if (file := local_file(values[name])).exists():
                values[name] = f"sha256:{file_sha256(file)}"
        values["warmup_epochs"] = self.resolved_warmup_epochs
        return values | {"views": self.views.to_dict()} | self.temporal_identity()


def warm_up_views(views: ViewSpec, num_frames: int | None = None) -> ViewSpec:
    """Fewer frames over as long a time as `views`."""
    few = num_frames or WARM_UP_FRAMES
    return replace(views, num_frames=few, stride=max(1, views.num_frames * views.stride // few))
