"""ViViT checkpoints of Google's Scenic, in every layout that its releases wrote.

The parameters lie at `optimizer/target` (public ViViT weights), `optimizer/target/params` (older) or `params` (newer);
a file may also hold the parameters alone. Which model they are of, and all sizes, follow from their names and shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vivit.pipeline.checkpoint import (
    DOT_PRODUCT,
    FACTORISED_ENCODER,
    JOINT,
    SELF_ATTENTION,
    Checkpoint,
    SpatialConfig,
)
from vivit.pipeline.errors import WeightsError
from vivit.pipeline.weights.arrays import ANY, ARCHITECTURE, Arrays, EncoderSize
from vivit.pipeline.weights.classifier import Classifier, split_classifier
from vivit.pipeline.weights.file_content import Content
from vivit.pipeline.weights.flax_names import (
    BLOCK,
    SELF_ATTENTION_BLOCK,
    encoder_size,
    renumbered,
    take_dense,
    take_embedding,
    take_encoder,
    take_positions,
)
from vivit.pipeline.weights.msgpack_tree import flattened
from vivit.pipeline.weights.request import Request, by
from vivit.pipeline.weights.token_grid import DEFAULT_IMAGE_SIZE, image_size_of, patch_option, time_of

_PLACES = (
    ("optimizer", "target", "params"),
    ("optimizer", "target"),
    ("params", "params"),
    ("params",),
    (),
)
"""Where the parameters may lie, the innermost first."""
_SPACE, _TIME, _ALL = "SpatialTransformer", "TemporalTransformer", "Transformer"
_UNKNOWN = "only ViViT's four models with a linear classifier can be imported"


@dataclass(frozen=True)
class _File:
    """What is the same for all models."""

    arrays: Arrays
    origin: str
    """The file in words."""
    request: Request


def import_scenic(content: Content, request: Request) -> Checkpoint:
    """The model of a Scenic file: ViViT's models 1 to 4.

    A model 4 has the names of a model 1 that is pooled by the mean: without a class token it is taken for a model 4,
    unless `request.model` says otherwise.
    """
    arrays = Arrays(content.path, renumbered(_parameters(content)))
    step = content.tree.get("global_step")
    at = (
        f", step {int(step)}"
        if isinstance(step, int) or (isinstance(step, Tensor) and step.ndim == 0)
        else ""
    )
    file = _File(arrays, f"Scenic checkpoint {content.path.name}{at}", request)
    checkpoint = _factorised_encoder(file) if f"cls_{_SPACE}" in arrays else _over_all_tokens(file)
    arrays.finish("a ViViT", _UNKNOWN)
    return checkpoint


def _parameters(content: Content) -> dict[str, Tensor]:
    """The parameters by name; momentum and other state of an optimizer are never among them."""
    for place in _PLACES:
        tree: Any = content.tree
        for key in place:
            tree = tree.get(key) if isinstance(tree, Mapping) else None
        if isinstance(tree, Mapping) and "embedding" in tree and (_SPACE in tree or _ALL in tree):
            return flattened(dict(tree))
    raise WeightsError(
        f"{content.path} is a msgpack file without the parameters of a ViViT (embedding and {_SPACE} or {_ALL}, in params "
        f"or optimizer/target); it holds {', '.join(list(content.tree)[:5]) or 'nothing'}: {_UNKNOWN}"
    )


def _factorised_encoder(file: _File) -> Checkpoint:
    arrays = file.arrays
    space, time = encoder_size(arrays, _SPACE, BLOCK), encoder_size(arrays, _TIME, BLOCK)
    kernel, bias = take_embedding(arrays, space.dim)
    tubelet, patch = kernel.shape[2], (kernel.shape[3], kernel.shape[4])
    space_positions = take_positions(arrays, _SPACE, space.dim)
    time_positions = take_positions(arrays, _TIME, space.dim)
    classifier = _take_classifier(file, space.dim)
    tensors = {
        "spatial.cls_token": arrays.take(f"cls_{_SPACE}", 1, 1, space.dim),
        "spatial.pos_embed": space_positions,
        "spatial.patch_embed.proj.weight": kernel if tubelet > 1 else kernel[:, :, 0],
        "spatial.patch_embed.proj.bias": bias,
        **_below("spatial", take_encoder(arrays, _SPACE, space)),
        "temporal.cls_token": arrays.take(f"cls_{_TIME}", 1, 1, space.dim),
        "temporal.pos_embed": time_positions,
        **_below("temporal", take_encoder(arrays, _TIME, time)),
        **classifier.tensors,
    }
    image_size = image_size_of(arrays.path, space_positions.shape[1] - 1, patch, file.request.image_size)
    return Checkpoint(
        model=FACTORISED_ENCODER,
        spatial=_spatial(space, image_size, tubelet, patch),
        rest=_temporal_config(time, time_positions.shape[1] - 1, classifier),
        classes=classifier.names,
        source=f"{file.origin} (factorised encoder)",
        tensors=tensors,
    )


def _temporal_config(size: EncoderSize, time: int, classifier: Classifier) -> dict[str, Any]:
    """Stage 2's ModelConfig, as JSON values."""
    return {
        "dim": size.dim,
        "time": time,
        "heads": classifier.counts,
        "adapter": "none",
        "adapter_width": None,
        "temporal": "transformer",
        "depth": size.depth,
        "num_heads": size.num_heads,
        "mlp_ratio": size.mlp_ratio,
        "drop_path": 0.0,
    }


def _over_all_tokens(file: _File) -> Checkpoint:
    """Models 1, 3 and 4: one encoder over the tokens of all times."""
    arrays, request = file.arrays, file.request
    model, note = _model_of(arrays, request)
    parts = SELF_ATTENTION_BLOCK if model == SELF_ATTENTION else BLOCK
    size = encoder_size(arrays, _ALL, parts)
    kernel, bias = take_embedding(arrays, size.dim)
    tubelet, patch = kernel.shape[2], (kernel.shape[3], kernel.shape[4])
    positions = take_positions(arrays, _ALL, size.dim)
    token = {"cls_token": arrays.take("cls", 1, 1, size.dim)} if "cls" in arrays else {}
    image_size = request.image_size or DEFAULT_IMAGE_SIZE
    if request.image_size is None:
        note += f"; crops of {by(image_size)} pixels assumed"
    classifier = _take_classifier(file, size.dim)
    tensors = {
        **token,
        "pos_embed": positions,
        "patch_embed.proj.weight": kernel,
        "patch_embed.proj.bias": bias,
        **take_encoder(arrays, _ALL, size, parts),
        **classifier.tensors,
    }
    return Checkpoint(
        model=model,
        spatial=_spatial(size, image_size, tubelet, patch),
        rest={
            "time": time_of(arrays.path, positions.shape[1] - len(token), patch, image_size),
            "heads": classifier.counts,
            "pooling": "token" if token else "mean",
            "order": "time_space",
            "drop_path": 0.0,
        },
        classes=classifier.names,
        source=f"{file.origin} ({note})",
        tensors=tensors,
    )


def _model_of(arrays: Arrays, request: Request) -> tuple[str, str]:
    """The model that the names are of, and a remark on how that is known."""
    if f"{_ALL}/encoderblock_0/LayerNorm_time/scale" in arrays:
        return SELF_ATTENTION, "factorised self-attention; order time_space assumed, the file does not say it"
    if "cls" in arrays:
        return JOINT, "joint attention over space and time, as it has a class token"
    if request.model in (JOINT, DOT_PRODUCT):
        return request.model, f"{request.model} as asked: the file could be joint or {DOT_PRODUCT}"
    return (
        DOT_PRODUCT,
        f"{DOT_PRODUCT}, as it has no class token; a mean-pooled joint model looks the same: --model joint says so",
    )


def _take_classifier(file: _File, dim: int) -> Classifier:
    dense = take_dense(file.arrays, "output_projection", dim, ANY)
    return split_classifier(file.arrays.path, dense["weight"], dense["bias"], file.request.heads)


def _spatial(
    size: EncoderSize, image_size: tuple[int, int], tubelet: int, patch: tuple[int, int]
) -> SpatialConfig:
    return SpatialConfig(
        name=ARCHITECTURE,
        options={**size.options, "patch_size": patch_option(patch), "act_layer": "gelu_tanh"},
        image_size=image_size,
        tubelet=tubelet,
    )


def _below(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for name, tensor in tensors.items()}
