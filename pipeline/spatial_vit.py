"""The spatial Vision Transformer: timm's, with a tubelet embedding where a token looks at several frames."""

from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vivit.pipeline.checkpoint import SpatialConfig
from vivit.pipeline.errors import ConfigError


class TubeletEmbed(nn.Module):
    """Tokens of non-overlapping tubelets: a 3-D convolution whose stride is its kernel."""

    def __init__(
        self,
        tubelet: int,
        patch_size: tuple[int, int],
        embed_dim: int,
        *,
        channels: int = 3,
        bias: bool = True,
    ) -> None:
        super().__init__()
        kernel = (tubelet, *patch_size)
        self.patch_size = patch_size
        self.proj = nn.Conv3d(channels, embed_dim, kernel_size=kernel, stride=kernel, bias=bias)

    def forward(self, video: Tensor) -> Tensor:
        """Tokens [batch, time * token, dim], ordered time, height, width, of a video [batch, channel, frame, height, width].

        An incomplete tubelet at the end is dropped.
        """
        tokens: Tensor = self.proj(video)
        return tokens.flatten(2).transpose(1, 2)


def create_spatial_vit(config: SpatialConfig) -> VisionTransformer:
    """A ViT with fresh weights as `config` describes it; its input is [batch, channel, height, width], with a tubelet
    above 1 [batch, channel, frame, height, width]. ConfigError where timm cannot build it."""
    try:
        model = timm.create_model(
            config.name, num_classes=0, img_size=tuple(config.image_size), **dict(config.options)
        )
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        options = f" with {dict(config.options)}" if config.options else ""
        raise ConfigError(
            f"timm cannot build {config.name}{options} as a Vision Transformer: {error}"
        ) from error
    if not isinstance(model, VisionTransformer):
        raise ConfigError(
            f"{config.name} is a {type(model).__name__}, not a plain Vision Transformer: choose a vit_*"
        )
    check_divides(model, config.name, config.image_size)
    if config.tubelet > 1:
        vit: Any = model
        vit.dynamic_img_size = False  # positions are added to a list of tokens, not to a grid
        image = vit.patch_embed
        vit.patch_embed = TubeletEmbed(
            config.tubelet, image.patch_size, vit.embed_dim, bias=image.proj.bias is not None
        )
    return model


def check_divides(model: nn.Module, name: str, image_size: tuple[int, int]) -> None:
    """ConfigError where crops are not made of whole patches."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if isinstance(patch, tuple) and any(size % side for size, side in zip(image_size, patch, strict=True)):
        side = patch[0]
        lower = image_size[0] - image_size[0] % side
        raise ConfigError(
            f"crops of {image_size[0]} pixels are not made of whole patches of {side} pixels of {name}: "
            f"use {lower or side} or {lower + side}"
        )
