"""State dicts of timm's Vision Transformers as spatial encoders."""

from dataclasses import replace

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from vivit.pipeline.backbones import timm_id
from vivit.pipeline.checkpoint import IMAGE, Checkpoint, SpatialConfig
from vivit.pipeline.errors import ConfigError, WeightsError
from vivit.pipeline.weights.arrays import ANY, ARCHITECTURE, Arrays, EncoderSize, depth
from vivit.pipeline.weights.file_content import Content
from vivit.pipeline.weights.request import Request, by
from vivit.pipeline.weights.token_grid import image_size_of, patch_option

_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
"""Attention heads of the published ViTs by their width: Ti, S, B, L, H, g."""
_REMEDY = "pass the --backbone that it was made for"
_CLASSIFIER = ("head.", "head_dist.", "pre_logits.")
_PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def import_timm(content: Content, request: Request) -> Checkpoint:
    """The spatial encoder in a timm state dict; its classifier is left out.

    Without `request.backbone` the ViT must be a plain one, and its pixels are taken to lie in [-1, 1]: the file does
    not say how they were normalised.
    """
    arrays = Arrays(content.path, dict(content.tree))
    arrays.drop(*_CLASSIFIER)
    origin = f"timm weights {content.path.name}"
    backbone = request.backbone or _published_name(content)
    if backbone is not None:
        named = replace(request, backbone=backbone)
        return spatial_checkpoint(arrays, named, f"{origin} ({timm_id(backbone)})")
    return spatial_checkpoint(arrays, request, f"{origin} (a plain ViT; pixels in [-1, 1] assumed)")


def spatial_checkpoint(
    arrays: Arrays, request: Request, source: str, *, num_heads: int | None = None
) -> Checkpoint:
    """A spatial encoder of tensors that have timm's names; `num_heads` where the file tells it."""
    if request.backbone is not None:
        spatial, tensors = _named(arrays, request.backbone, request)
    else:
        spatial, tensors = _plain(arrays, request, num_heads)
    stored = {f"spatial.{name}": tensor for name, tensor in tensors.items()}
    return Checkpoint(model=IMAGE, spatial=spatial, source=source, tensors=stored)


def _published_name(content: Content) -> str | None:
    """timm id in the config.json of a folder from timm's hub; None where there is no such file."""
    architecture, published = content.config.get("architecture"), content.config.get("pretrained_cfg")
    if not isinstance(architecture, str):
        return None
    name = f"{architecture}.{published.get('tag')}" if isinstance(published, dict) else architecture
    return name if timm.get_pretrained_cfg(name) is not None else architecture


def heads_of(arrays: Arrays, dim: int, backbone: str | None) -> int:
    """Attention heads of a ViT of width `dim`: those of `backbone` where given, else of the published ViTs."""
    if backbone is None:
        if dim not in _HEADS:
            raise WeightsError(
                f"{arrays.path} does not tell the number of attention heads of its {dim} channels (known for "
                f"{', '.join(map(str, _HEADS))}): {_REMEDY}"
            )
        return _HEADS[dim]
    model = build(timm_id(backbone), None)
    if getattr(model, "embed_dim", None) != dim or not hasattr(model, "blocks"):
        raise WeightsError(
            f"{arrays.path} has {dim} channels, but {timm_id(backbone)} has {getattr(model, 'embed_dim', 'others')}: "
            f"{_REMEDY}"
        )
    return int(model.blocks[0].attn.num_heads)  # type: ignore[union-attr,index]


def build(name: str, image_size: tuple[int, int] | None) -> nn.Module:
    """The timm model without classifier and without memory for its weights."""
    with torch.device("meta"):
        if image_size is None:
            model: nn.Module = timm.create_model(name, num_classes=0)
            return model
        try:
            model = timm.create_model(name, num_classes=0, img_size=image_size)
        except TypeError:
            model = timm.create_model(name, num_classes=0)
        except AssertionError as error:
            raise ConfigError(f"{name} does not take crops of {by(image_size)} pixels: {error}") from error
    return model


def _named(arrays: Arrays, backbone: str, request: Request) -> tuple[SpatialConfig, dict[str, Tensor]]:
    """Tensors of the timm model `backbone`, which must be all in the file."""
    name = timm_id(backbone)
    arrays.remedy = _REMEDY
    model = build(name, None)
    image_size = _image_size(arrays, model, request.image_size)
    expected = build(name, image_size).state_dict()
    tensors = {key: arrays.take(key, *value.shape) for key, value in expected.items()}
    arrays.finish(name, _REMEDY)
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    spatial = SpatialConfig(
        name=name,
        image_size=image_size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
    )
    return spatial, tensors


def _image_size(arrays: Arrays, model: nn.Module, asked: tuple[int, int] | None) -> tuple[int, int]:
    """Crop of a file: from its positions, or the model's own where it has none."""
    kernel = "patch_embed.proj.weight"
    if arrays.ndim("pos_embed") != 3 or arrays.ndim(kernel) != 4:
        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        return asked or (config["input_size"][1], config["input_size"][2])
    _, tokens, _ = arrays.shape("pos_embed", 1, ANY, ANY)
    height, width = arrays.shape(kernel, ANY, ANY, ANY, ANY)[2:]
    prefix = 0 if getattr(model, "no_embed_class", False) else int(getattr(model, "num_prefix_tokens", 1))
    return image_size_of(arrays.path, tokens - prefix, (height, width), asked)


def _plain(
    arrays: Arrays, request: Request, num_heads: int | None
) -> tuple[SpatialConfig, dict[str, Tensor]]:
    """Tensors of a plain ViT with a class token, whose sizes follow from their shapes."""
    dim, _, height, width = arrays.shape("patch_embed.proj.weight", ANY, 3, ANY, ANY)
    hidden, _ = arrays.shape("blocks.0.mlp.fc1.weight", ANY, dim)
    heads = heads_of(arrays, dim, None) if num_heads is None else num_heads
    size = EncoderSize(dim=dim, depth=depth(arrays, "blocks."), num_heads=heads, hidden=hidden)
    positions = arrays.take("pos_embed", 1, ANY, dim)
    tensors = {
        "cls_token": arrays.take("cls_token", 1, 1, dim),
        "pos_embed": positions,
        "patch_embed.proj.weight": arrays.take("patch_embed.proj.weight", dim, 3, height, width),
        "patch_embed.proj.bias": arrays.take("patch_embed.proj.bias", dim),
        **take_blocks(arrays, "", size),
        "norm.weight": arrays.take("norm.weight", dim),
        "norm.bias": arrays.take("norm.bias", dim),
    }
    arrays.finish("a plain ViT", _REMEDY)
    spatial = SpatialConfig(
        name=ARCHITECTURE,
        options={**size.options, "patch_size": patch_option((height, width))},
        image_size=image_size_of(arrays.path, positions.shape[1] - 1, (height, width), request.image_size),
        interpolation="bicubic",
    )
    return spatial, tensors


def take_blocks(arrays: Arrays, prefix: str, size: EncoderSize) -> dict[str, Tensor]:
    """`blocks.*` of tensors that have timm's names below `prefix`."""
    dim, hidden = size.dim, size.hidden
    shapes = dict(
        zip(_PARTS, [(dim,), (3 * dim, dim), (dim, dim), (dim,), (hidden, dim), (dim, hidden)], strict=True)
    )
    tensors: dict[str, Tensor] = {}
    for index in range(size.depth):
        for part, shape in shapes.items():
            name = f"blocks.{index}.{part}"
            tensors[f"{name}.weight"] = arrays.take(f"{prefix}{name}.weight", *shape)
            tensors[f"{name}.bias"] = arrays.take(f"{prefix}{name}.bias", shape[0])
    return tensors
