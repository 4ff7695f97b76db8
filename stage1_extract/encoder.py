"""The frozen spatial encoder: crops in, one vector for each time step out."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vivit.pipeline.backbones import PRETRAINED, load_backbone, weights_sha256
from vivit.pipeline.cache_settings import Backbone
from vivit.pipeline.device import autocast, resolve_device, resolve_precision
from vivit.pipeline.errors import ConfigError

logger = logging.getLogger(__name__)


class SpatialEncoder:
    """A frozen ViT on one device."""

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
        loaded = load_backbone(name, weights=weights, crop_size=crop_size)
        config = loaded.config
        self.backbone = Backbone(
            name=config.name,
            weights=loaded.source,
            weights_sha256=weights_sha256(loaded.model),
            options=dict(config.options),
            embed_dim=cast(int, loaded.model.num_features),
            tubelet=config.tubelet,
            pooling=str(getattr(loaded.model, "global_pool", "model")),
            mean=config.mean,
            std=config.std,
            interpolation=config.interpolation,
            precision=precision,
            batch_size=batch_size,
        )
        self.weights_file = loaded.file
        _warn_of_unseen_frames(loaded.model, config.tubelet)
        self.crop_size = crop_size
        self.model = loaded.model.requires_grad_(False).to(self.device)
        self._normalise = Normalise(config.mean, config.std, self.device)

    @torch.inference_mode()
    def encode(self, crops: npt.NDArray[np.uint8] | Tensor) -> Tensor:
        """Vectors [view, time, dim], float32 on the device, of the crops [view, frame, height, width, channel] of one clip.

        Crops are uint8 RGB, anywhere; each `tubelet` frames make one time step, and an incomplete tubelet at the end is dropped.
        They go through the model in passes of equal size, at most `batch_size` tubelets, and never together with those
        of another clip: matrix products round differently at different places of a batch, so that otherwise the
        features of a clip would depend, in their last bits, on its neighbours.
        """
        views, frames, height, width, channels = crops.shape
        times = frames // self.backbone.tubelet
        pixels = crops if isinstance(crops, Tensor) else torch.from_numpy(crops)
        whole = pixels[:, : times * self.backbone.tubelet]
        tubelets = whole.reshape(views * times, -1, height, width, channels)
        size = pass_size(len(tubelets), self.backbone.batch_size)
        with autocast(self.device, self.backbone.precision):
            passes = [class_tokens(self.model, self._images(part)) for part in _parts(tubelets, size)]
        return torch.cat(passes)[: len(tubelets)].float().view(views, times, -1)

    def _images(self, tubelets: Tensor) -> Tensor:
        """Model input of uint8 tubelets [batch, frame, height, width, channel]."""
        video = self._normalise(tubelets.to(self.device, non_blocking=True))
        return video[:, :, 0] if self.backbone.tubelet == 1 else video


def _warn_of_unseen_frames(model: nn.Module, tubelet: int) -> None:
    """A kernel from `central` inflation that never trained is zero for all frames but one: frozen, that is for good."""
    if tubelet == 1:
        return
    kernel = model.get_parameter("patch_embed.proj.weight")
    unseen = [str(frame) for frame in range(tubelet) if not kernel[:, :, frame].any()]
    if unseen:
        logger.warning(
            "the encoder does not look at frame %s of each %d: its tubelet embedding was not trained after inflation; "
            "an `average` inflation, or tubelets of 1 frame, would see all",
            " and ".join(unseen),
            tubelet,
        )


class Normalise:
    """Pixels as a model's configuration wants them."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        """`mean` and `std` of each channel, for pixels in [0, 1]."""
        means = torch.tensor(mean, device=device).view(-1, 1, 1, 1)
        stds = torch.tensor(std, device=device).view(-1, 1, 1, 1)
        self._scale, self._shift = 1 / (255 * stds), -means / stds

    def __call__(self, pixels: Tensor) -> Tensor:
        """Float32 [batch, channel, frame, height, width] of uint8 RGB [batch, frame, height, width, channel]."""
        return pixels.permute(0, 4, 1, 2, 3).to(torch.float32).mul_(self._scale).add_(self._shift)


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

    Images are [batch, channel, height, width], for a tubelet above 1 [batch, channel, frame, height, width].

    Of the last block only the class token's output is used, so only its query, projection and MLP are computed (keys
    and values of all tokens still are): about 7 % less work for 12 layers. Models of another build run in full.
    """
    if not has_class_token_path(model):
        return model(images)  # type: ignore[no-any-return]
    vit: Any = model
    tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    *blocks, last = vit.blocks
    is_kept = not (vit.grad_checkpointing and torch.is_grad_enabled())
    for block in blocks:
        tokens = block(tokens) if is_kept else checkpoint(block, tokens, use_reentrant=False)
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
    first = first + block.drop_path1(block.ls1(_class_attention(block.attn, block.norm1(tokens))))
    return first + block.drop_path2(block.ls2(block.mlp(block.norm2(first))))  # type: ignore[no-any-return]


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
