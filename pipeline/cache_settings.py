"""The identity of a feature cache: everything that decides its bytes, except the videos themselves."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from vivit.pipeline.checkpoint import SpatialConfig
from vivit.pipeline.errors import ConfigError
from vivit.pipeline.views import ViewSpec

CODECS = ("none", "zstd")
_NOT_COMPARED = ("dataset", "backbone.weights", "views.train_views")
"""Names that people may change, whose content is compared by its digest, and what may grow: each view is the same whatever
their number."""


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What makes the encoder a fixed function of a frame crop."""

    name: str
    """timm id."""
    weights: str
    """Where the weights came from: `pretrained:<tag>`, `file:<name>` or `random:<seed>`."""
    weights_sha256: str
    """Digest of all tensors of the encoder, with their names."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What is different from the timm model of that name and no tensor shows: activation, attention heads, ..."""
    embed_dim: int
    """Length of a token."""
    tubelet: int = 1
    """Frames that one token looks at."""
    pooling: str = "token"
    """How one vector is made of the last layer's tokens."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Mean of each channel, for pixels in [0, 1]."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Standard deviation of each channel."""
    interpolation: str = "bicubic"
    """Filter that the crops are resized with."""
    precision: str = "float32"
    """Type of the encoder's arithmetic."""
    batch_size: int = 32
    """Most frame crops in one forward pass; a pass never holds crops of two clips."""

    def computes_like(self, spatial: SpatialConfig) -> bool:
        """Whether an encoder with the same tensors computes the same from the same picture."""
        here = (dict(self.options), self.tubelet, self.mean, self.std, self.interpolation)
        return here == (
            json.loads(json.dumps(dict(spatial.options))),
            spatial.tubelet,
            spatial.mean,
            spatial.std,
            spatial.interpolation,
        )


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """The identity of a cache: everything that decides its bytes, except the videos themselves."""

    dataset: str
    """Name of the data set."""
    manifest_sha256: str
    """Digest of the clips' ids, videos and times."""
    backbone: Backbone
    views: ViewSpec
    seed: int = 0
    """Seed of the training views."""
    decoder: str = "pyav:accurate_rnd+full_chroma"
    """How frames become RGB pictures."""
    block_size: int = 64
    """Clips per block: what is computed, committed and lost together."""
    codec: str = "none"
    """Compression of each chunk: none or zstd."""
    dtype: str = "float16"
    """Type of the stored numbers."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError(f"block_size must be at least 1, got {self.block_size}")
        if self.codec not in CODECS:
            raise ConfigError(f"codec must be one of {', '.join(CODECS)}, got {self.codec!r}")
        if self.views.num_frames < self.backbone.tubelet:
            raise ConfigError(
                f"num_frames {self.views.num_frames} is less than the tubelet {self.backbone.tubelet}"
            )

    @property
    def num_times(self) -> int:
        """Tokens per view: incomplete tubelets at the end are dropped."""
        return self.views.num_frames // self.backbone.tubelet

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values; `from_dict` gives equal ones back."""
        return json.loads(json.dumps(asdict(self) | {"views": self.views.to_dict()}))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        backbone: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values["backbone"].items()
        }
        return cls(
            **{**values, "backbone": Backbone(**backbone), "views": ViewSpec.from_dict(values["views"])}
        )

    def differences(self, other: "CacheSettings") -> list[str]:
        """`views.num_frames: 32 here, 16 there`, one entry for each value that decides bytes and differs."""
        here, there = flattened(self.to_dict()), flattened(other.to_dict())
        # `to_dict` leaves out that there is none
        here["views.augment"], there["views.augment"] = self.views.augment, other.views.augment
        compared = [key for key in here if key not in _NOT_COMPARED]
        return [
            f"{key}: {here[key]} here, {there.get(key)} there"
            for key in compared
            if here[key] != there.get(key)
        ]


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
