"""Transformer blocks as Hugging Face's ViViT and VideoMAE name them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vivit.pipeline.errors import WeightsError
from vivit.pipeline.weights.arrays import ANY, Arrays, EncoderSize, depth

_PARTS = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def hf_size(arrays: Arrays, prefix: str, config: Mapping[str, Any]) -> EncoderSize:
    """Size of the layers `<prefix>0`, ...; the number of attention heads is in the config alone."""
    hidden, dim = arrays.shape(f"{prefix}0.intermediate.dense.weight", ANY, ANY)
    heads = config.get("num_attention_heads", 12)
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise WeightsError(
            f"{arrays.path} has {dim} channels, but its config.json has num_attention_heads {heads}, which does "
            "not divide them: fetch the folder again"
        )
    return EncoderSize(dim=dim, depth=depth(arrays, prefix), num_heads=heads, hidden=hidden)


def take_hf_blocks(arrays: Arrays, prefix: str, size: EncoderSize) -> dict[str, Tensor]:
    """`blocks.*` in timm's names of the layers `<prefix>0`, ...; query, key and value become one `qkv`."""
    dim, hidden = size.dim, size.hidden
    shapes = dict(zip(_PARTS, [(dim,), (dim, dim), (dim,), (hidden, dim), (dim, hidden)], strict=True))
    tensors: dict[str, Tensor] = {}
    for index in range(size.depth):
        layer, block = f"{prefix}{index}", f"blocks.{index}"
        tensors[f"{block}.attn.qkv.weight"], tensors[f"{block}.attn.qkv.bias"] = _take_qkv(arrays, layer, dim)
        for part, name in _PARTS.items():
            tensors[f"{block}.{name}.weight"] = arrays.take(f"{layer}.{part}.weight", *shapes[part])
            tensors[f"{block}.{name}.bias"] = arrays.take(f"{layer}.{part}.bias", shapes[part][0])
    return tensors


def _take_qkv(arrays: Arrays, layer: str, dim: int) -> tuple[Tensor, Tensor]:
    """Weight [3 dim, dim] and bias [3 dim]."""
    attention = f"{layer}.attention.attention"
    weights = [arrays.take(f"{attention}.{name}.weight", dim, dim) for name in ("query", "key", "value")]
    # VideoMAE has `q_bias` and `v_bias` and no bias of the keys, which would not change the attention.
    names = {"query": "q_bias", "value": "v_bias"} if f"{attention}.q_bias" in arrays else {}
    biases = [
        arrays.take(f"{attention}.{names.get(name, f'{name}.bias')}", dim)
        if name in names or f"{attention}.{name}.bias" in arrays
        else weights[0].new_zeros(dim)
        for name in ("query", "key", "value")
    ]
    return torch.cat(weights), torch.cat(biases)
