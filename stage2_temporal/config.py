"""What a stage-2 training is told. Free of torch, so that the command line can read the defaults."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivit.pipeline.errors import ConfigError
from vivit.pipeline.local_copy import local_file
from vivit.pipeline.storage import Location
from vivit.pipeline.workspace import nearest
from vivit.stage2_temporal.optimisation import Optimisation
from vivit.stage2_temporal.time_sampling import FRAME_SAMPLINGS

if TYPE_CHECKING:
    from vivit.stage2_temporal.model import ModelConfig

SCRATCH, SPATIAL = "scratch", "spatial"
"""Values of `init` that are not files."""
_DEFAULT_SIZES: dict[str, Any] = {"depth": 4, "num_heads": None, "mlp_ratio": 4.0}
_NOT_IN_IDENTITY = ("cache", "run", "allow_partial", "device", "precision", "memory_budget_bytes")
"""Where things lie and run; the cache is known by its identity, and the precision once it is resolved."""


@dataclass(frozen=True, kw_only=True)
class TemporalOptions:
    """What the temporal half is made of, and what it starts from."""

    init: str = SCRATCH
    """What the temporal half starts from: `scratch`, a model file or run folder, or `spatial`, the last blocks of the
    ViT that made the cache."""
    adapter: str = "bottleneck"
    """Adapter between the spatial encoder and the temporal half: `bottleneck`, `linear`, `temporal-conv` (sees the
    neighbouring time steps) or `none`."""
    adapter_width: int | None = None
    """Channels inside a bottleneck or temporal-conv adapter; None is a quarter of the token's."""
    temporal: str = "transformer"
    """`transformer`, or `mean` for the mean over time."""
    depth: int | None = None
    """Blocks of the temporal transformer; None is as many as the temporal half in `init` has, else 4."""
    num_heads: int | None = None
    """Attention heads; None is as many as the temporal half in `init` has, else one for each 64 channels."""
    mlp_ratio: float | None = None
    """Hidden channels of a block's MLP, in units of the token's; None is that of the temporal half in `init`, else 4."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; earlier blocks have less, the first none."""
    joint_head: bool = False
    """A third head over the (verb, noun) pairs seen in training."""

    def __post_init__(self) -> None:
        if not self.init:
            raise ConfigError(f"init is empty: pass {SCRATCH}, {SPATIAL}, a model file or a run folder")
        if self.num_heads is not None and self.num_heads < 1:
            raise ConfigError(f"num_heads must be at least 1, got {self.num_heads}")
        shape = {"dim": self.num_heads or 1, "time": 1, "heads": {"any": 1}}
        self._model(shape, self._sizes(_DEFAULT_SIZES))  # refuses bad values of the model

    @property
    def init_path(self) -> Path | None:
        """The file or folder that the temporal half starts from, fetched from a URL; None for a word."""
        return None if self.init in (SCRATCH, SPATIAL) else local_file(self.init)

    def temporal_model(
        self, *, dim: int, time: int, heads: dict[str, int], pairs: list[int] | None = None
    ) -> "ModelConfig":
        """The model for tokens [batch, time, dim] and `heads` (number of classes of each), the joint one among them.

        Reads the file in `init`: CheckpointError where that cannot be done.
        """
        return self._model(
            {"dim": dim, "time": time, "heads": heads, "pairs": pairs}, self._resolved_sizes(dim)
        )

    def temporal_identity(self) -> dict[str, Any]:
        """Those of these settings that stand for something else, resolved, as JSON values.

        A file in `init` is known by the digest of its bytes: CheckpointError where it cannot be read.
        """
        from vivit.stage2_temporal.init_source import file_sha256

        values = self._resolved_sizes()
        if self.init_path is not None:
            values["init"] = f"sha256:{file_sha256(self.init_path)}"
        return values

    def _resolved_sizes(self, dim: int | None = None) -> dict[str, Any]:
        """`depth`, `num_heads` and `mlp_ratio`; those of the temporal half in `init` where they are not given."""
        from vivit.stage2_temporal.init_source import check_width, temporal_half

        there = None if self.init_path is None else temporal_half(self.init_path)
        if there is None:
            return self._sizes(_DEFAULT_SIZES)
        if dim is not None:
            check_width(self.init, there.dim, dim)  # before its heads are tried on another width
        return self._sizes(
            {"depth": there.depth, "num_heads": there.resolved_num_heads, "mlp_ratio": there.mlp_ratio}
        )

    def _sizes(self, default: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in default}
        return {name: default[name] if value is None else value for name, value in given.items()}

    def _model(self, shape: Mapping[str, Any], sizes: Mapping[str, Any]) -> "ModelConfig":
        from vivit.stage2_temporal.model import ModelConfig

        return ModelConfig(
            **shape,
            **sizes,
            adapter=self.adapter,
            adapter_width=self.adapter_width,
            temporal=self.temporal,
            drop_path=self.drop_path,
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TemporalOptions, Optimisation):
    """How the temporal half is trained on a feature cache."""

    cache: Location
    """Feature cache to train on."""
    run: Path
    """Run folder to write, or to go on with."""
    train_split: str = "train"
    """Split to learn from."""
    validation_split: str | None = "validation"
    """Split that chooses the best epoch, where the cache has it; None keeps the last epoch."""
    allow_partial: bool = False
    """Train on what is there when the cache is not complete."""
    num_frames: int | None = None
    """Frames of each view to look at, a multiple of the tubelet; None is all. Nothing is extracted again."""
    frame_sampling: str = "stride"
    """Which: `stride`, spread over the whole view, or `window`, neighbours. Training draws where they begin."""

    memory_budget_bytes: int | None = None
    """Bytes of features that may stay in memory; None is 60 % of what is free. More is read as it is needed."""

    def __post_init__(self) -> None:
        Optimisation.__post_init__(self)
        TemporalOptions.__post_init__(self)
        if self.num_frames is not None and self.num_frames < 1:
            raise ConfigError(f"num_frames must be at least 1, got {self.num_frames}")
        if self.memory_budget_bytes is not None and self.memory_budget_bytes < 0:
            raise ConfigError(f"memory_budget_bytes must not be negative, got {self.memory_budget_bytes}")
        if self.frame_sampling not in FRAME_SAMPLINGS:
            raise nearest(self.frame_sampling, list(FRAME_SAMPLINGS), "frame sampling")

    def identity(self) -> dict[str, Any]:
        """The settings that decide the weights, as JSON values; a run goes on only with equal ones."""
        values = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_IDENTITY}
        if not self.joint_head:
            del values["joint_head"]  # runs from before there were any stay the same
        if self.num_frames is None:
            values["frame_sampling"] = None  # decides nothing where all frames are used
        return values | self.temporal_identity() | {"warmup_epochs": self.resolved_warmup_epochs}
