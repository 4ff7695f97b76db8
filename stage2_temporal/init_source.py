"""What a temporal half can start from: another temporal half, or the blocks of an image or video transformer."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vivit.pipeline.backbones import PRETRAINED, RANDOM, LoadedBackbone, load_backbone, weights_sha256
from vivit.pipeline.cache_settings import CacheSettings
from vivit.pipeline.checkpoint import (
    BLOCKS,
    FACTORISED_ENCODER,
    FORMAT,
    IMAGE,
    JOINT,
    Checkpoint,
)
from vivit.pipeline.checkpoint import model_file as file_in
from vivit.pipeline.errors import CheckpointError, ConfigError
from vivit.pipeline.local_copy import local_file
from vivit.pipeline.tensor_file import read_tensors
from vivit.stage2_temporal.config import SCRATCH, SPATIAL
from vivit.stage2_temporal.model import ModelConfig
from vivit.stage2_temporal.run_folder import RunFolder
from vivit.stage2_temporal.vit_blocks import BlockSource

_BLOCKS_BELOW = {IMAGE: "spatial.", JOINT: "", BLOCKS: ""}
"""What stands before `blocks.<index>.` in the models whose blocks a temporal half can use."""
TEMPORAL_PARTS = ("adapter.", "temporal.", "heads.")
"""What the tensors of a temporal half, its adapter and its heads are called."""


@dataclass(frozen=True, kw_only=True)
class TemporalSource:
    """A temporal half, with the adapter before it and the heads behind it."""

    name: str
    """The file, in words."""
    model: ModelConfig
    classes: Mapping[str, list[str]] = field(default_factory=dict)
    """Names of the classes of each head; none or an empty list where they are not known."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    """`adapter.*`, `temporal.*` and `heads.*`."""


Source = TemporalSource | BlockSource


def read_source(init: str, spatial: CacheSettings | LoadedBackbone) -> Source | None:
    """What `init` stands for: None for scratch. `spatial` is the spatial ViT, or the settings of the cache that it made.

    CheckpointError, WeightsError or ConfigError where it cannot be read, or has nothing that a temporal half can use.
    """
    if init == SCRATCH:
        return None
    if init == SPATIAL:
        return _of_backbone(spatial if isinstance(spatial, LoadedBackbone) else _loaded_again(spatial))
    return _of_file(local_file(init))


def temporal_half(path: Path) -> ModelConfig | None:
    """What the temporal half in a file or folder is made of; None where there is none."""
    file = init_file(path)
    about = file.stat()
    return _temporal_half(file, about.st_size, about.st_mtime_ns)


def file_sha256(path: Path) -> str:
    """Digest of the bytes of a model file, or of the one in a folder."""
    file = init_file(path)
    about = file.stat()
    return _file_sha256(file, about.st_size, about.st_mtime_ns)


def init_file(path: Path) -> Path:
    """The model file that `path` is or has in it; CheckpointError where it does not exist."""
    file = file_in(path)
    if file.is_file():
        return file.resolve()
    if path.is_dir():
        raise CheckpointError(f"{path} has no {file.name}: pass a model file or a run folder with --init")
    raise CheckpointError(
        f"--init {path} is not {SCRATCH}, not {SPATIAL}, and no file or folder of that name exists"
    )


def check_width(name: str, there: int, dim: int) -> None:
    """CheckpointError where the source `name` was made for tokens of another width than `dim`."""
    if there != dim:
        raise CheckpointError(
            f"{name} is for tokens of {there} channels, and here they have {dim}: "
            "pass an --init that was made with a backbone of that width, or --init scratch"
        )


@lru_cache(maxsize=8)
def _temporal_half(file: Path, size: int, mtime_ns: int) -> ModelConfig | None:
    """Kept, since it is asked for several times and the whole file is read for it; size and time tell a new file."""
    source = _of_file(file)
    return source.model if isinstance(source, TemporalSource) else None


@lru_cache(maxsize=8)
def _file_sha256(file: Path, size: int, mtime_ns: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _of_file(path: Path) -> Source:
    file = init_file(path)
    name = f"{file.parent.name}/{file.name}"
    about = _about(file)
    if about is None:
        from vivit.pipeline.weights import import_weights

        return _of_checkpoint(name, import_weights(file))
    if about.get("format") == FORMAT:
        return _of_checkpoint(name, Checkpoint.read(file))
    return _of_run(name, file)


def _about(file: Path) -> Mapping[str, Any] | None:
    """What a file says that vivit wrote; None for another program's. Reads none of its tensors."""
    try:
        with safe_open(file, framework="pt") as opened:
            stored = (opened.metadata() or {}).get("vivit")
        about: dict[str, Any] | None = None if stored is None else json.loads(json.loads(stored)["about"])
        return about
    except (SafetensorError, OSError, ValueError, KeyError):
        # A .safetensors that cannot be opened is taken for a model file: reading it says what is wrong.
        return {"format": FORMAT} if file.suffix == ".safetensors" else None


def _of_checkpoint(name: str, stored: Checkpoint) -> Source:
    if stored.model == FACTORISED_ENCODER:
        parts = {key: value for key, value in stored.tensors.items() if key.startswith(TEMPORAL_PARTS)}
        return TemporalSource(
            name=name, model=_model_config(name, stored.rest), classes=stored.classes, tensors=parts
        )
    if stored.model not in _BLOCKS_BELOW:
        raise CheckpointError(
            f"{name} is a model ({stored.model}) whose blocks attend over time and space apart, so that no temporal "
            f"half can start from them: pass a file with one of {FACTORISED_ENCODER}, {', '.join(_BLOCKS_BELOW)}"
        )
    prefix = _BLOCKS_BELOW[stored.model]
    return BlockSource.of(name, prefix, stored.part(prefix), stored.spatial)


def _of_run(name: str, file: Path) -> TemporalSource:
    """The model of a stage-2 run, from its folder: the weights alone do not say what they are the weights of."""
    config = RunFolder(file.parent).read_config()
    tensors, _ = read_tensors(file, remedy="run the `vivit train-temporal` command that wrote it again")
    return TemporalSource(
        name=name, model=_model_config(name, config["model"]), classes=config["heads"], tensors=tensors
    )


def _model_config(name: str, values: Mapping[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.from_dict(dict(values))
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{name} does not describe its temporal half ({error}): pass another --init"
        ) from error


def _of_backbone(loaded: LoadedBackbone) -> BlockSource:
    name = f"{loaded.config.name} ({loaded.source})"
    return BlockSource.of(name, "", loaded.model.state_dict(), loaded.config)


def _loaded_again(cache: CacheSettings) -> LoadedBackbone:
    """The ViT that made a cache."""
    backbone = cache.backbone
    weights = backbone.weights.split(":")[0]
    if weights not in (PRETRAINED, RANDOM):
        raise CheckpointError(
            f"the cache was made with weights from a file ({backbone.weights}), which it does not hold: "
            "pass that file itself, --init FILE"
        )
    loaded = load_backbone(backbone.name, weights=weights, crop_size=cache.views.crop_size)
    if weights_sha256(loaded.model) != backbone.weights_sha256:
        raise CheckpointError(
            f"the {weights} weights of {backbone.name} are not those that made the cache (another version of timm or "
            "of its weights): pass a file with the blocks to start from, --init FILE"
        )
    return loaded
