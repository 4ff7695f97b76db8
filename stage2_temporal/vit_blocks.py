"""Blocks of an image or video transformer that a temporal half can start from."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import gelu

from vivit.pipeline.checkpoint import SpatialConfig
from vivit.pipeline.errors import CheckpointError
from vivit.pipeline.spatial_vit import create_spatial_vit

_LAYER_SCALE = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}
"""Scales of a block's two branches, and the last linear map of each."""


@dataclass(frozen=True, kw_only=True)
class BlockSource:
    """Transformer blocks that were not made for a temporal half."""

    name: str
    """The file or the ViT, in words."""
    prefix: str
    """What stands before `blocks.<index>.` in the names of the file."""
    dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    activation: str | None
    """Activation of the MLPs where it is not the one of a temporal half."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    """`blocks.<index>.*`."""

    @classmethod
    def of(cls, name: str, prefix: str, tensors: Mapping[str, Tensor], spatial: SpatialConfig) -> Self:
        """The blocks among `tensors`, of a model whose blocks are those of the ViT `spatial`."""
        blocks = {key: value for key, value in tensors.items() if re.match(r"blocks\.\d+\.", key)}
        if not blocks:
            raise CheckpointError(f"{name} has no transformer blocks {prefix}blocks.*: pass another --init")
        if any(key.endswith(tuple(_LAYER_SCALE)) for key in blocks):
            blocks = _without_layer_scale(blocks)
            name = f"{name} (layer scale multiplied in)"
        depth = 1 + max(int(key.split(".")[1]) for key in blocks)
        try:
            hidden, dim = blocks[f"blocks.{depth - 1}.mlp.fc1.weight"].shape
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{name} has blocks of another make: pass another --init") from error
        num_heads, activation = _of_a_block(spatial)
        return cls(
            name=name,
            prefix=prefix,
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=hidden / dim,
            activation=activation,
            tensors=blocks,
        )


def _of_a_block(spatial: SpatialConfig) -> tuple[int, str | None]:
    """Attention heads, and the activation where it is not the tanh approximation of GELU, of a ViT's blocks."""
    one_block = replace(spatial, options={**spatial.options, "depth": 1}, tubelet=1)
    block: Any = create_spatial_vit(one_block).blocks[0]
    activation = getattr(block.mlp, "act", None)
    if activation is None:
        return block.attn.num_heads, type(block.mlp).__name__
    x = torch.linspace(-4, 4, 65)
    is_ours = torch.allclose(activation(x), gelu(x, approximate="tanh"), rtol=0, atol=1e-6)
    return block.attn.num_heads, None if is_ours else str(activation)


def _without_layer_scale(blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same function in blocks that have no layer scale: the scale of a branch is put in its last linear map."""
    scaled = {key: value for key, value in blocks.items() if not key.endswith(tuple(_LAYER_SCALE))}
    for key in blocks.keys() - scaled.keys():
        block, scale = key.rsplit(".", 2)[0], ".".join(key.rsplit(".", 2)[1:])
        last = f"{block}.{_LAYER_SCALE[scale]}"
        scaled[f"{last}.weight"] = scaled[f"{last}.weight"] * blocks[key][:, None]
        scaled[f"{last}.bias"] = scaled[f"{last}.bias"] * blocks[key]
    return scaled
