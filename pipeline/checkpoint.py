"""A model in one safetensors file: its tensors, and what they are the tensors of.

`vivit pretrain` and `vivit import-weights` write such files; `extract --backbone`, `train-temporal --init`, `evaluate`
and `predict` read them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from vivit.pipeline.augmentation import NONE
from vivit.pipeline.errors import CheckpointError, ConfigError
from vivit.pipeline.tensor_file import read_about, read_tensors, write_tensors

FORMAT = "vivit-model-1"
FACTORISED_ENCODER = "fe"
JOINT, SELF_ATTENTION, DOT_PRODUCT = "joint", "factorised-self-attention", "factorised-dot-product"
VIDEO_MODELS = (FACTORISED_ENCODER, JOINT, SELF_ATTENTION, DOT_PRODUCT)
"""The ViViT paper's models 2, 1, 3 and 4."""
ORDERS = ("time_space", "space_time")
"""Which attention of a factorised-self-attention block comes first."""
IMAGE, BLOCKS = "image", "blocks"
"""A spatial encoder alone; transformer blocks alone, good for a start only."""
MODELS = (*VIDEO_MODELS, IMAGE, BLOCKS)
_REMEDY = "write it again with `vivit import-weights` or `vivit pretrain`"


@dataclass(frozen=True, kw_only=True)
class SpatialConfig:
    """A timm Vision Transformer, what is different about it, and how its pixels are made."""

    name: str
    """timm architecture or id that the ViT is built from."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `timm.create_model` that are not the architecture's own: embed_dim, depth, num_heads, act_layer, ..."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width of a crop in pixels."""
    tubelet: int = 1
    """Frames that one token looks at."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Mean of each channel, for pixels in [0, 1]."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Standard deviation of each channel."""
    interpolation: str = "bilinear"
    """Filter that crops are resized with."""

    def __post_init__(self) -> None:
        if self.tubelet < 1:
            raise ConfigError(f"tubelet must be at least 1, got {self.tubelet}")

    @property
    def crop_size(self) -> int:
        """Side of a square crop; ConfigError where crops are not square."""
        height, width = self.image_size
        if height != width:
            raise ConfigError(
                f"the model looks at {height} x {width} pixels: views are square, so it cannot see them"
            )
        return height

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What stands in a model file.

    Names of tensors, which are timm's within each part:

    fe       `spatial.*` (timm VisionTransformer; the kernel of a tubelet embedding is [dim, channel, frame, height, width]),
             `adapter.*`, `temporal.*` (timm names again), `heads.<head>.*`
    joint, factorised-*   `patch_embed.proj.*`, `cls_token`, `pos_embed` [1, [1 +] time * token, dim], `blocks.*`, `norm.*`,
             `heads.<head>.*`
    image    `spatial.*`
    blocks   `blocks.*`
    """

    model: str
    """One of `MODELS`."""
    spatial: SpatialConfig
    """The spatial ViT of an fe; for the other models the ViT that they are a ViT over space and time of."""
    rest: Mapping[str, Any] = field(default_factory=dict)
    """The rest of the model, as JSON values: stage 2's ModelConfig for an fe, SpaceTimeConfig for joint and factorised-*."""
    classes: Mapping[str, list[str]] = field(default_factory=dict)
    """Names of the classes of each head in id order; an empty list where they are not known."""
    source: str
    """Where the weights came from, in words."""
    views: Mapping[str, Any] = field(default_factory=dict)
    """The views that the model was trained on (num_frames, stride, ...); empty where they are not known."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What was measured when the weights were kept: epoch, accuracy, ..."""
    tensors: Mapping[str, Tensor] = field(repr=False)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `prefix`, without it."""
        return {
            name.removeprefix(prefix): value
            for name, value in self.tensors.items()
            if name.startswith(prefix)
        }

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        write_tensors(path, self.tensors, self.about())

    def about(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values."""
        return {
            "format": FORMAT,
            "model": self.model,
            "spatial": self.spatial.to_dict(),
            "rest": dict(self.rest),
            "classes": dict(self.classes),
            "source": self.source,
            "views": dict(self.views),
            "metrics": dict(self.metrics),
        }

    @classmethod
    def read(cls, path: Path) -> Self:
        """The model in `path`, a file or a run folder with one; CheckpointError where there is none."""
        path = model_file(path)
        tensors, about = read_tensors(path, remedy=_REMEDY)
        if about.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} is not a model file of vivit: import it first with `vivit import-weights {path}`"
            )
        try:
            return cls(
                model=about["model"],
                spatial=SpatialConfig.from_dict(about["spatial"]),
                rest=about["rest"],
                classes=about["classes"],
                source=about["source"],
                views=about["views"],
                metrics=about["metrics"],
                tensors=tensors,
            )
        except (KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{path} does not describe its model ({error}): {_REMEDY}") from error


def model_file(path: Path) -> Path:
    """`path` itself, or `model.safetensors` in it where it is a folder."""
    return path / "model.safetensors" if path.is_dir() else path


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a file that `Checkpoint.write` wrote; reads none of its tensors."""
    try:
        return read_about(path).get("format") == FORMAT
    except CheckpointError:
        return False


def views_for_spatial(path: Path) -> dict[str, Any]:
    """Fields of ViewSpec that follow from a model file: its crop size, and how its training cut, mirrored and changed
    crops."""
    about = read_about(model_file(path))
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a model file of vivit: import it first, `vivit import-weights {path}`"
        )
    size = SpatialConfig.from_dict(about["spatial"]).crop_size
    trained: Mapping[str, Any] = about["views"]
    known = {name: trained[name] for name in ("scale_min", "scale_max", "flip", "fps") if name in trained}
    if trained:
        known["augment"] = trained.get("augment", NONE)
    return {"crop_size": size, "resize": trained.get("resize", resize_for(size))} | known


def resize_for(crop_size: int) -> int:
    """Short side that frames are resized to for crops of this size: 256 for 224 and 288 for 256, as in the reference."""
    return crop_size + 32 if crop_size in (224, 256) else crop_size * 8 // 7
