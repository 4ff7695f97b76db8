"""The frozen spatial encoder: frame crops in, one vector for each out."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from timm.layers import Attention, LayerScale
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vivit.pipeline.errors import ConfigError
from vivit.pipeline.feature_cache import Backbone
from vivit.stage1_extract.backbones import PRETRAINED, load_backbone, timm_id, weights_sha256

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; ConfigError for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name} is not there: this machine has {torch.cuda.device_count()} CUDA devices. Use --device cpu"
        )
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` is bfloat16 on a GPU that has it, float32 elsewhere."""
    if name == "auto":
        return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if name not in PRECISIONS:
        raise ConfigError(f"precision must be auto, {', '.join(PRECISIONS)}, got {name!r}")
    if name == "float16" and device.type == "cpu":
        raise ConfigError("precision float16 needs a GPU: use float32 or bfloat16 on the CPU")
    return name


class SpatialEncoder:
    """A frozen timm ViT on one device; every forward pass has exactly `batch_size` frame crops."""

    def __init__(
        self,
        name: str,
        *,
        weights: str = PRETRAINED,
        crop_size: int = 224,
        device: str = "auto",
        precision: str = "auto",
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        self.device = pick_device(device)
        precision = pick_precision(precision, self.device)
        model, source = load_backbone(name, weights=weights, crop_size=crop_size)
        config: dict[str, Any] = timm.data.resolve_model_data_config(model)
        self.backbone = Backbone(
            name=timm_id(name),
            weights=source,
            weights_sha256=weights_sha256(model),
            embed_dim=int(model.num_features),
            pooling=str(getattr(model, "global_pool", "model")),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"] if config["interpolation"] == "bilinear" else "bicubic",
            precision=precision,
            batch_size=batch_size,
        )
        self.crop_size = crop_size
        self.model = model.requires_grad_(False).to(self.device)
        mean = torch.tensor(self.backbone.mean, device=self.device).view(1, -1, 1, 1)
        std = torch.tensor(self.backbone.std, device=self.device).view(1, -1, 1, 1)
        self._scale, self._shift = 1 / (255 * std), -mean / std

    @torch.inference_mode()
    def encode(self, crops: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Vectors [batch, dim] of frame crops [batch, height, width, channel], uint8 RGB; at most `batch_size`.

        A smaller batch is filled up with black pictures: a pass always has the same shape, so that the vector of a
        crop does not depend on how many others came with it.
        """
        count, full = len(crops), self.backbone.batch_size
        if count > full:
            raise ValueError(f"{count} crops are more than the batch size {full}")
        pixels = torch.from_numpy(crops)
        if count < full:
            pixels = torch.cat([pixels, pixels.new_zeros(full - count, *pixels.shape[1:])])
        with self._autocast():
            vectors = class_tokens(self.model, self._normalised(pixels))
        return vectors[:count].float().cpu().numpy()

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Model input [batch, channel, height, width] of uint8 pixels [batch, height, width, channel]."""
        images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return images.to(torch.float32).mul_(self._scale).add_(self._shift)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.backbone.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, PRECISIONS[self.backbone.precision])


def class_tokens(model: nn.Module, images: Tensor) -> Tensor:
    """What `model(images)` gives, [batch, dim], without computing what nobody reads.

    Of the last block only the class token's output is used, so only its query, projection and MLP are computed (keys
    and values of all tokens still are): about 7 % less work for 12 layers. Models of another build run in full.
    """
    if not has_class_token_path(model):
        return model(images)  # type: ignore[no-any-return]
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    *blocks, last = model.blocks
    for block in blocks:
        tokens = block(tokens)
    return model.forward_head(model.norm(_last_block(last, tokens)), pre_logits=True)  # type: ignore[no-any-return]


def has_class_token_path(model: nn.Module) -> bool:
    """Whether the model is built of the parts that `class_tokens` knows."""
    return (
        isinstance(model, VisionTransformer)
        and type(model).forward_features is VisionTransformer.forward_features
        and model.global_pool == "token"
        and model.attn_pool is None
        and type(model.blocks[-1]) is Block
        and type(model.blocks[-1].attn) is Attention
    )


def _last_block(block: Block, tokens: Tensor) -> Tensor:
    """The class token [batch, 1, dim] after `block`, of all tokens [batch, token, dim] before it."""
    first = tokens[:, :1]
    normed = block.norm1(tokens)
    first = first + _scaled(block.ls1, _class_attention(block.attn, normed))
    return first + _scaled(block.ls2, block.mlp(block.norm2(first)))


def _class_attention(attention: Attention, tokens: Tensor) -> Tensor:
    """Attention output [batch, 1, dim] for the first of the tokens [batch, token, dim]."""
    batch, count, _ = tokens.shape
    width = attention.attn_dim
    weight, bias = attention.qkv.weight, attention.qkv.bias
    query = F.linear(tokens[:, :1], weight[:width], None if bias is None else bias[:width])
    pair = F.linear(tokens, weight[width:], None if bias is None else bias[width:])
    query = query.view(batch, 1, attention.num_heads, -1).transpose(1, 2)
    key, value = pair.view(batch, count, 2, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(attention.q_norm(query), attention.k_norm(key), value)
    mixed = attention.norm(mixed.transpose(1, 2).reshape(batch, 1, width))
    if attention.gate is not None:
        mixed = mixed * attention.gate(tokens[:, :1]).sigmoid()
    return attention.proj(mixed)  # type: ignore[no-any-return]


def _scaled(scale: LayerScale | nn.Identity, residual: Tensor) -> Tensor:
    # LayerScale may be in place; `residual` is always a fresh tensor here
    return scale(residual)  # type: ignore[no-any-return]
