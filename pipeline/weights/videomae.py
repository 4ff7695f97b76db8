"""VideoMAE, as its own code (pre-training and fine-tuned) and Hugging Face store it: the encoder's blocks alone.

Its positions, its tubelets and its mean over tokens are those of another model, so that only the blocks are of use:
as the start of a temporal transformer or of another video model.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vivit.pipeline.checkpoint import BLOCKS, Checkpoint, SpatialConfig
from vivit.pipeline.errors import WeightsError
from vivit.pipeline.weights.arrays import ANY, ARCHITECTURE, Arrays, EncoderSize, depth
from vivit.pipeline.weights.file_content import ACCEPTED, Content
from vivit.pipeline.weights.hf_blocks import hf_size, take_hf_blocks
from vivit.pipeline.weights.request import Request
from vivit.pipeline.weights.timm_vit import heads_of, take_blocks
from vivit.pipeline.weights.token_grid import DEFAULT_IMAGE_SIZE, patch_option

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HUGGING_FACE = "videomae."
_LAYOUTS = {
    "encoder.": "patch_embed.proj",
    "": "patch_embed.proj",
    _HUGGING_FACE: "embeddings.patch_embeddings.projection",
}
"""Prefix of the encoder's names in a pre-training, a fine-tuned and a Hugging Face file, and its tubelet embedding."""


def import_videomae(content: Content, request: Request) -> Checkpoint:
    """The blocks of a VideoMAE encoder in timm's names; decoder, embedding, last norm and classifier are left out."""
    arrays = Arrays(content.path, dict(content.tree))
    prefix, embedding = _layout(arrays)
    dim, _, tubelet, height, width = arrays.shape(f"{prefix}{embedding}.weight", ANY, 3, ANY, ANY, ANY)
    if prefix == _HUGGING_FACE:
        layers = f"{prefix}encoder.layer."
        size = hf_size(arrays, layers, content.config)
        blocks = take_hf_blocks(arrays, layers, size)
    else:
        layers = f"{prefix}blocks."
        size = _size(arrays, layers, dim, request)
        blocks = _take_blocks(arrays, prefix, size)
    left = [name for name in arrays if name.startswith(layers)]
    if left:
        raise WeightsError(
            f"{content.path} has blocks with {left[0]}, which VideoMAE's do not have: only plain VideoMAE is known"
        )
    return Checkpoint(
        model=BLOCKS,
        spatial=SpatialConfig(
            name=ARCHITECTURE,
            options={**size.options, "patch_size": patch_option((height, width)), "act_layer": "gelu"},
            image_size=request.image_size or DEFAULT_IMAGE_SIZE,
            tubelet=tubelet,
            mean=_MEAN,
            std=_STD,
        ),
        source=f"VideoMAE blocks of {content.path.resolve().name}",
        tensors=blocks,
    )


def is_videomae(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors are VideoMAE's: by the biases of its attention, or by its tubelet embedding."""
    return any(name.endswith((".attn.q_bias", "attention.attention.q_bias")) for name in tensors) or any(
        isinstance(value := tensors.get(f"{prefix}{embedding}.weight"), Tensor) and value.ndim == 5
        for prefix, embedding in _LAYOUTS.items()
    )


def _layout(arrays: Arrays) -> tuple[str, str]:
    for prefix, embedding in _LAYOUTS.items():
        if arrays.ndim(f"{prefix}{embedding}.weight") == 5:
            return prefix, embedding
    raise WeightsError(
        f"{arrays.path} has no tubelet embedding of VideoMAE (encoder.patch_embed.proj.weight of 5 dimensions); it holds "
        f"{', '.join(list(arrays)[:3])}: pass {ACCEPTED}"
    )


def _size(arrays: Arrays, layers: str, dim: int, request: Request) -> EncoderSize:
    hidden, _ = arrays.shape(f"{layers}0.mlp.fc1.weight", ANY, dim)
    heads = heads_of(arrays, dim, request.backbone)
    return EncoderSize(dim=dim, depth=depth(arrays, layers), num_heads=heads, hidden=hidden)


def _take_blocks(arrays: Arrays, prefix: str, size: EncoderSize) -> dict[str, Tensor]:
    """Blocks of VideoMAE's own code, which are timm's but for the biases of queries, keys and values."""
    joined: dict[str, Tensor] = {}
    for index in range(size.depth):
        attention = f"{prefix}blocks.{index}.attn"
        if f"{attention}.q_bias" in arrays:
            query = arrays.take(f"{attention}.q_bias", size.dim)
            value = arrays.take(f"{attention}.v_bias", size.dim)
            # A bias of the keys would not change the attention: VideoMAE has none.
            joined[f"{attention}.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    arrays.add(joined)
    return take_blocks(arrays, prefix, size)
