"""Names and shapes of transformer encoders in Flax (Scenic, Google's ViT), and timm's names for them.

A Flax kernel is [in, out], a torch weight [out, in]; Flax keeps heads as axes of their own: query [dim, head, channel],
out [head, channel, dim].
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vivit.pipeline.weights.arrays import ANY, Arrays, EncoderSize, depth

_ATTENTION, _MLP = "MultiHeadDotProductAttention", "MlpBlock"
BLOCK = {"LayerNorm_0": "norm1", f"{_ATTENTION}_0": "attn", "LayerNorm_1": "norm2", f"{_MLP}_0": "mlp"}
"""Parts of a block and timm's names for them."""
SELF_ATTENTION_BLOCK = {
    "LayerNorm_time": "norm_time",
    f"{_ATTENTION}_time": "attn_time",
    "LayerNorm_space": "norm_space",
    f"{_ATTENTION}_space": "attn_space",
    "LayerNorm_mlp": "norm_mlp",
    _MLP: "mlp",
}
"""Parts of a block with attention over time, then over space (ViViT's model 3)."""
_NUMBERED_PART = re.compile(r"(.*encoderblock_\d+/)(\w+)_(\d+)(/.*)")


def renumbered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the parts of each block numbered by class, from 0.

    Before Flax's Linen one counter ran over all parts: LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2,
    MlpBlock_3 are LayerNorm_0, MultiHeadDotProductAttention_0, LayerNorm_1, MlpBlock_0. New names stay as they are.
    """
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in tensors:
        if match := _NUMBERED_PART.fullmatch(name):
            numbers.setdefault((match[1], match[2]), set()).add(int(match[3]))

    def new(name: str) -> str:
        if not (match := _NUMBERED_PART.fullmatch(name)):
            return name
        place = sorted(numbers[match[1], match[2]]).index(int(match[3]))
        return f"{match[1]}{match[2]}_{place}{match[4]}"

    return {new(name): tensor for name, tensor in tensors.items()}


def encoder_size(arrays: Arrays, encoder: str, parts: Mapping[str, str]) -> EncoderSize:
    """Size of the encoder below `encoder`, whose blocks have `parts`."""
    first = f"{encoder}/encoderblock_0"
    attention = next(part for part in parts if part.startswith(_ATTENTION))
    mlp = next(part for part in parts if part.startswith(_MLP))
    query = f"{first}/{attention}/query/kernel"
    dim, num_heads, _ = arrays.shape(query, ANY, ANY, ANY)
    arrays.shape(query, dim, num_heads, dim // num_heads)
    _, hidden = arrays.shape(f"{first}/{mlp}/Dense_0/kernel", dim, ANY)
    return EncoderSize(
        dim=dim, depth=depth(arrays, f"{encoder}/encoderblock_"), num_heads=num_heads, hidden=hidden
    )


def take_encoder(
    arrays: Arrays, encoder: str, size: EncoderSize, parts: Mapping[str, str] = BLOCK
) -> dict[str, Tensor]:
    """`blocks.*` and `norm.*` in timm's names."""
    tensors: dict[str, Tensor] = {}
    for index in range(size.depth):
        for part, name in parts.items():
            place = f"{encoder}/encoderblock_{index}/{part}"
            tensors |= _prefixed(f"blocks.{index}.{name}", _take_part(arrays, place, part, size))
    return tensors | _prefixed("norm", _take_norm(arrays, f"{encoder}/encoder_norm", size.dim))


def take_positions(arrays: Arrays, encoder: str, dim: int) -> Tensor:
    """Learned positions [1, token, dim]."""
    return arrays.take(f"{encoder}/posembed_input/pos_embedding", 1, ANY, dim)


def take_embedding(arrays: Arrays, dim: int) -> tuple[Tensor, Tensor]:
    """Kernel [dim, channel, frame, height, width] and bias [dim]; the frame axis is 1 for an embedding of one frame."""
    name = "embedding/kernel"
    if arrays.ndim(name) == 4:
        kernel = arrays.take(name, ANY, ANY, 3, dim)[None]
    else:
        kernel = arrays.take(name, ANY, ANY, ANY, 3, dim)
    return kernel.permute(4, 3, 0, 1, 2), arrays.take("embedding/bias", dim)


def take_dense(arrays: Arrays, name: str, inputs: int, outputs: int = ANY) -> dict[str, Tensor]:
    """`weight` [out, in] and `bias` [out] of a Dense layer."""
    weight = arrays.take(f"{name}/kernel", inputs, outputs).T
    return {"weight": weight, "bias": arrays.take(f"{name}/bias", len(weight))}


def _take_part(arrays: Arrays, place: str, part: str, size: EncoderSize) -> dict[str, Tensor]:
    if part.startswith(_ATTENTION):
        return _take_attention(arrays, place, size)
    if part.startswith(_MLP):
        first = take_dense(arrays, f"{place}/Dense_0", size.dim, size.hidden)
        return _prefixed("fc1", first) | _prefixed(
            "fc2", take_dense(arrays, f"{place}/Dense_1", size.hidden, size.dim)
        )
    return _take_norm(arrays, place, size.dim)


def _take_attention(arrays: Arrays, place: str, size: EncoderSize) -> dict[str, Tensor]:
    dim, heads = size.dim, size.num_heads
    channels = dim // heads
    weights, biases = [], []
    for name in ("query", "key", "value"):
        weights.append(arrays.take(f"{place}/{name}/kernel", dim, heads, channels).reshape(dim, dim).T)
        biases.append(arrays.take(f"{place}/{name}/bias", heads, channels).reshape(dim))
    return {
        "qkv.weight": torch.cat(weights),
        "qkv.bias": torch.cat(biases),
        "proj.weight": arrays.take(f"{place}/out/kernel", heads, channels, dim).reshape(dim, dim).T,
        "proj.bias": arrays.take(f"{place}/out/bias", dim),
    }


def _take_norm(arrays: Arrays, place: str, dim: int) -> dict[str, Tensor]:
    return {"weight": arrays.take(f"{place}/scale", dim), "bias": arrays.take(f"{place}/bias", dim)}


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
