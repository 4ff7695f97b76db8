"""Parameters of video models from those of an image ViT, by the reference's rules.

One thing differs on purpose: the image's class token is kept, also in the Factorised Encoder, where the reference
drops it without a word (a frozen encoder would not survive that).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vivit.pipeline.checkpoint import SELF_ATTENTION
from vivit.pipeline.errors import ConfigError

_BLOCK_PARTS = {"norm1": ("norm_space",), "attn": ("attn_time", "attn_space"), "norm2": ("norm_mlp",)}
"""Parts of an image block, and what they become in a factorised-self-attention block; its time norm stays fresh."""


def central_frame(kernel: Tensor, tubelet: int) -> Tensor:
    """Kernel [dim, channel, frame, height, width] that looks at frame tubelet // 2 only, as the image's kernel does."""
    inflated = kernel.new_zeros(*kernel.shape[:2], tubelet, *kernel.shape[2:])
    inflated[:, :, tubelet // 2] = kernel
    return inflated


def average_frame(kernel: Tensor, tubelet: int) -> Tensor:
    """Kernel [dim, channel, frame, height, width] that sees the mean of a tubelet's frames."""
    return (kernel / tubelet).unsqueeze(2).repeat(1, 1, tubelet, 1, 1)


INFLATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "central": central_frame,
    "average": average_frame,
}
"""Ways to make a tubelet's kernel of an image's [dim, channel, height, width]."""


def inflated(kernel: Tensor, tubelet: int, inflation: str) -> Tensor:
    """Kernel [dim, channel, frame, height, width]; one that has frames already is kept."""
    if kernel.ndim == 4:
        return INFLATIONS[inflation](kernel, tubelet)
    if kernel.shape[2] != tubelet:
        raise ConfigError(
            f"the backbone has tubelets of {kernel.shape[2]} frames: pass --tubelet {kernel.shape[2]}"
        )
    return kernel


def spatial_tensors(
    image: Mapping[str, Tensor], tubelet: int, inflation: str = "central"
) -> dict[str, Tensor]:
    """A spatial ViT's tensors with a tubelet embedding, from those of an image ViT (timm names)."""
    kernel = image["patch_embed.proj.weight"]
    if tubelet == 1 and kernel.ndim == 4:
        return dict(image)
    return {**image, "patch_embed.proj.weight": inflated(kernel, tubelet, inflation)}


def space_time_tensors(
    image: Mapping[str, Tensor],
    model: str,
    *,
    tubelet: int,
    time: int,
    has_token: bool,
    inflation: str = "central",
) -> dict[str, Tensor]:
    """Tensors of a `SpaceTimeTransformer` without heads, from those of an image ViT (timm names).

    Positions are tiled over time; the class token and its position are kept where the model has one. What an image
    cannot give (the time norm of factorised-self-attention) is left out. ConfigError for a ViT with other parts than
    the reference's.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in image.items():
        if name == "patch_embed.proj.weight":
            tensors[name] = inflated(value, tubelet, inflation)
        elif name == "pos_embed":
            tensors[name] = tiled(value, time, has_token=has_token)
        elif name == "cls_token":
            tensors |= {name: value} if has_token else {}
        elif name == "patch_embed.proj.bias" or name.startswith("norm."):
            tensors[name] = value
        elif name.startswith("blocks."):
            tensors |= dict.fromkeys(_block_names(name, model), value)
        else:
            raise ConfigError(
                f"the backbone has a part that {model} does not know ({name}): choose a plain vit_*"
            )
    for needed in ("cls_token", "pos_embed", "patch_embed.proj.bias"):
        if needed not in image:
            raise ConfigError(
                f"the backbone has no {needed}, which {model} starts from: choose a plain vit_*"
            )
    return tensors


def _block_names(name: str, model: str) -> list[str]:
    if model != SELF_ATTENTION:
        return [name]
    blocks, index, part, rest = name.split(".", 3)
    return [f"{blocks}.{index}.{other}.{rest}" for other in _BLOCK_PARTS.get(part, (part,))]


def tiled(positions: Tensor, time: int, *, has_token: bool) -> Tensor:
    """Positions [1, [1 +] time * token, dim] that repeat an image's [1, 1 + token, dim] at every time."""
    token, grid = positions[:, :1], positions[:, 1:]
    repeated = grid.repeat(1, time, 1)
    return torch.cat([token, repeated], dim=1) if has_token else repeated


def resized(positions: Tensor, grid: tuple[int, int], *, num_prefix: int = 1) -> Tensor:
    """Positions [1, prefix + height * width, dim] for another grid, from a square one [1, prefix + side * side, dim].

    Bilinear with aligned corners, as the reference's zoom does; the slots of the class token and its like are kept.
    """
    prefix, old = positions[:, :num_prefix], positions[:, num_prefix:]
    side = round(old.shape[1] ** 0.5)
    if side * side != old.shape[1]:
        raise ConfigError(
            f"the backbone has {old.shape[1]} positions, which are no square: choose a plain vit_*"
        )
    if (side, side) == grid:
        return positions
    picture = old.transpose(1, 2).reshape(1, -1, side, side)
    new = F.interpolate(picture, size=grid, mode="bilinear", align_corners=True)
    return torch.cat([prefix, new.flatten(2).transpose(1, 2)], dim=1)
