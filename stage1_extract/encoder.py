"""The frozen spatial encoder: frame crops in, one vector for each out."""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from timm.data.config import resolve_model_data_config
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vivit.pipeline.cache_settings import Backbone
from vivit.pipeline.device import autocast, resolve_device, resolve_precision
from vivit.pipeline.errors import ConfigError
from vivit.stage1_extract.backbones import PRETRAINED, load_backbone, timm_id, weights_sha256


class SpatialEncoder:
    """A frozen timm ViT on one device."""

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
        self.device = resolve_device(device)
        precision = resolve_precision(precision, self.device)
        model, source = load_backbone(name, weights=weights, crop_size=crop_size)
        config: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        self.backbone = Backbone(
            name=timm_id(name),
            weights=source,
            weights_sha256=weights_sha256(model),
            embed_dim=cast(int, model.num_features),
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
    def encode(self, crops: npt.NDArray[np.uint8]) -> Tensor:
        """Vectors [crop, dim], float32 on the device, of the crops [crop, height, width, channel] of one clip.

        Crops are uint8 RGB. They go through the model in passes of equal size, at most `batch_size`, and never together
        with those of another clip: matrix products round differently at different places of a batch, so that otherwise
        the features of a clip would depend, in their last bits, on its neighbours.
        """
        size = pass_size(len(crops), self.backbone.batch_size)
        pixels = torch.from_numpy(crops)
        with autocast(self.device, self.backbone.precision):
            passes = [class_tokens(self.model, self._normalised(part)) for part in _parts(pixels, size)]
        return torch.cat(passes)[: len(crops)].float()

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Model input [batch, channel, height, width] of uint8 pixels [batch, height, width, channel]."""
        images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return images.to(torch.float32).mul_(self._scale).add_(self._shift)


def pass_size(count: int, batch_size: int) -> int:
    """Crops per pass when `count` of them go through in as few equal passes as `batch_size` allows."""
    return -(-count // -(-count // batch_size))


def _parts(pixels: Tensor, size: int) -> Iterator[Tensor]:
    """Equal parts of `size` crops; the last is filled up with black ones."""
    for part in torch.split(pixels, size):
        missing = size - len(part)
        yield torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part


def class_tokens(model: nn.Module, images: Tensor) -> Tensor:
    """What `model(images)` gives, [batch, dim], without computing what nobody reads.

    Of the last block only the class token's output is used, so only its query, projection and MLP are computed (keys
    and values of all tokens still are): about 7 % less work for 12 layers. Models of another build run in full.
    """
    if not has_class_token_path(model):
        return model(images)  # type: ignore[no-any-return]
    vit: Any = model
    tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    *blocks, last = vit.blocks
    for block in blocks:
        tokens = block(tokens)
    return vit.forward_head(vit.norm(_last_block(last, tokens)), pre_logits=True)  # type: ignore[no-any-return]


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


def _last_block(block: Any, tokens: Tensor) -> Tensor:
    """The class token [batch, 1, dim] after a timm `Block`, of all tokens [batch, token, dim] before it."""
    first = tokens[:, :1]
    first = first + block.ls1(_class_attention(block.attn, block.norm1(tokens)))
    return first + block.ls2(block.mlp(block.norm2(first)))  # type: ignore[no-any-return]


def _class_attention(attention: Any, tokens: Tensor) -> Tensor:
    """Output [batch, 1, dim] of a timm `Attention` for the first of the tokens [batch, token, dim]."""
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
