"""Backbones: short names, timm models, and the weights that go into them."""

import hashlib
import os
import pickle
import socket
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import safetensors
import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from timm.data.config import resolve_model_data_config
from timm.models import load_checkpoint
from torch import Tensor, nn

from vivit.pipeline.checkpoint import FACTORISED_ENCODER, IMAGE, Checkpoint, SpatialConfig, model_file
from vivit.pipeline.errors import ConfigError, WeightsError
from vivit.pipeline.local_copy import local_file
from vivit.pipeline.spatial_vit import check_divides, create_spatial_vit
from vivit.pipeline.storage import Location, Url, location
from vivit.pipeline.workspace import nearest

SHORT_NAMES = {
    "vit_ti16": "vit_tiny_patch16_224.augreg_in21k",
    "vit_s16": "vit_small_patch16_224.augreg_in21k",
    "vit_s32": "vit_small_patch32_224.augreg_in21k",
    "vit_b16": "vit_base_patch16_224.augreg_in21k",
    "vit_b32": "vit_base_patch32_224.augreg_in21k",
    "vit_l16": "vit_large_patch16_224.augreg_in21k",
    "vit_h14": "vit_huge_patch14_clip_224.laion2b",
    "vit_g14": "vit_giant_patch14_clip_224.laion2b",
    "dinov2_s14": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2_b14": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2_l14": "vit_large_patch14_reg4_dinov2.lvd142m",
}
"""Short names and the timm id that each stands for."""

PRETRAINED, RANDOM = "pretrained", "random"
_RANDOM_SEED = 0
_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    AttributeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    safetensors.SafetensorError,
)


def timm_id(name: str) -> str:
    """The timm id of a short name or of a timm id; ConfigError with the nearest name otherwise."""
    full = SHORT_NAMES.get(name, name)
    if timm.is_model(full.split(".")[0]):
        return full
    raise nearest(name, [*SHORT_NAMES, *timm.list_models("vit_*")], "backbone") from None


@dataclass(frozen=True)
class LoadedBackbone:
    """A spatial encoder with its weights."""

    model: nn.Module
    """Without classifier, in evaluation mode."""
    config: SpatialConfig
    source: str
    """Where the weights came from: `pretrained:<tag>`, `file:<name>` or `random:<seed>`."""
    file: Location | None = None
    """The file or object that they came from."""


def load_backbone(name: str, *, weights: str = PRETRAINED, crop_size: int = 224) -> LoadedBackbone:
    """The spatial encoder `name`: a short name or timm id, or a model file that holds one.

    `weights` of a timm model: `pretrained` (timm's own, downloaded once), `random` (the same on every machine), or a
    file: .safetensors, .pth/.pt/.bin (read without running code) or Google's .npz. Files may be given by URL.
    """
    if is_model_file(name):
        if weights != PRETRAINED:
            raise ConfigError(f"{name} brings its own weights: leave out --weights {weights}")
        return _from(_from_checkpoint(local_file(name), crop_size), name)
    full = timm_id(name)
    if weights == PRETRAINED:
        return _loaded(_pretrained(full, crop_size), full, crop_size, f"pretrained:{_tag(full)}")
    if weights == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_RANDOM_SEED)
            return _loaded(_create(full, crop_size), full, crop_size, f"random:{_RANDOM_SEED}")
    model, path = _create(full, crop_size), local_file(weights)
    _load_file(model, full, path)
    _check_finite(model, path)
    return _from(_loaded(model, full, crop_size, f"file:{path.name}", path), weights)


def _from(loaded: LoadedBackbone, text: str) -> LoadedBackbone:
    """With the URL in the place of the file that was fetched from there."""
    place = location(text)
    return replace(loaded, file=place) if isinstance(place, Url) else loaded


def is_model_file(name: str) -> bool:
    """Whether a backbone's name is a path: of a model file, or of a folder with one."""
    return os.sep in name or name.endswith(".safetensors") or model_file(Path(name)) != Path(name)


def _from_checkpoint(path: Path, crop_size: int) -> LoadedBackbone:
    stored = Checkpoint.read(path)
    if stored.model not in (FACTORISED_ENCODER, IMAGE):
        raise WeightsError(
            f"{path} holds a model ({stored.model}) that has no spatial encoder of its own: "
            "pass a factorised encoder or an image ViT"
        )
    if crop_size != stored.spatial.crop_size:
        raise ConfigError(
            f"{path} looks at crops of {stored.spatial.crop_size} pixels, not {crop_size}: "
            f"pass --crop-size {stored.spatial.crop_size}"
        )
    model = create_spatial_vit(stored.spatial)
    try:
        model.load_state_dict(stored.part("spatial."))
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit the encoder that it describes: {error}") from error
    _check_finite(model, path)
    return LoadedBackbone(model.eval(), stored.spatial, f"file:{model_file(path).name}", model_file(path))


def _loaded(
    model: nn.Module, full: str, crop_size: int, source: str, file: Path | None = None
) -> LoadedBackbone:
    data: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    config = SpatialConfig(
        name=full,
        image_size=(crop_size, crop_size),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"] if data["interpolation"] == "bilinear" else "bicubic",
    )
    return LoadedBackbone(model.eval(), config, source, file)


def _check_finite(model: nn.Module, path: Path) -> None:
    broken = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(
            f"{path} holds values that are not finite, the first in {broken[0]}: fetch the file again"
        )


def weights_sha256(model: nn.Module) -> str:
    """Digest of every tensor of the model, with its name, shape and type."""
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Digest of tensors, with their names, shapes and types."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _create(full: str, crop_size: int, **options: Any) -> nn.Module:
    """A timm model for crops of `crop_size` pixels; models that fit any size take no `img_size`."""
    try:
        model: nn.Module = timm.create_model(full, num_classes=0, img_size=crop_size, **options)
    except TypeError:
        model = timm.create_model(full, num_classes=0, **options)
    except AssertionError as error:
        raise ConfigError(f"{full} does not take crops of {crop_size} pixels: {error}") from error
    check_divides(model, full, (crop_size, crop_size))
    return model


def _tag(full: str) -> str:
    config = timm.get_pretrained_cfg(full)
    return str(config.tag) if config is not None else ""


def _pretrained(full: str, crop_size: int) -> nn.Module:
    config = timm.get_pretrained_cfg(full)
    if config is None or not config.has_weights:
        raise WeightsError(
            f"timm has no pretrained weights for {full}: pass --weights FILE, or --weights random"
        )
    remedy = "Without a network, pass --weights FILE (.safetensors, .pth or .npz), or --weights random to try things out"
    if config.hf_hub_id and not _cached(config.hf_hub_id) and not _hub_resolves():
        raise WeightsError(
            f"the pretrained weights of {full} are not on this machine and its hub is out of reach. {remedy}"
        )
    try:
        return _create(full, crop_size, pretrained=True).eval()
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"the pretrained weights of {full} could not be loaded ({_first_line(error)}). {remedy}"
        ) from error


def _cached(repo: str) -> bool:
    return any(
        isinstance(try_to_load_from_cache(repo, name), str)
        for name in ("model.safetensors", "pytorch_model.bin")
    )


def _hub_resolves() -> bool:
    """Whether the hub's name is known: without this look, its client retries for most of a minute."""
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return bool(getproxies())
    return True


def _load_file(model: nn.Module, full: str, path: Path) -> None:
    if not path.is_file():
        raise WeightsError(f"the weights {path} do not exist: pass --weights FILE, `pretrained` or `random`")
    if path.suffix == ".npz" and not zipfile.is_zipfile(path):
        raise WeightsError(f"{path} does not hold weights of {full}: it is not a whole .npz file")
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        result = load_checkpoint(
            model, str(path), strict=False, filter_fn=convert or (lambda state, _: state), weights_only=True
        )
    except _UNREADABLE as error:
        raise WeightsError(f"{path} does not hold weights of {full}: {_first_line(error)}") from error
    if result is not None and result.missing_keys:
        missing = ", ".join(result.missing_keys[:3])
        raise WeightsError(
            f"{path} lacks {len(result.missing_keys)} tensors of {full} ({missing}, ...): "
            "pass the --backbone that the file was made for"
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
