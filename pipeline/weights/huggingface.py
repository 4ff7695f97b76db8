"""Hugging Face's `VivitForVideoClassification` and `VivitModel`: ViViT's model 1, attention over space and time.

Pixels are taken to lie in [-1, 1], as in the reference that the published weights come from.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vivit.pipeline.checkpoint import JOINT, Checkpoint, SpatialConfig
from vivit.pipeline.errors import WeightsError
from vivit.pipeline.weights.arrays import ANY, ARCHITECTURE, Arrays
from vivit.pipeline.weights.classifier import Classifier, split_classifier
from vivit.pipeline.weights.file_content import Content
from vivit.pipeline.weights.hf_blocks import hf_size, take_hf_blocks
from vivit.pipeline.weights.request import Request
from vivit.pipeline.weights.token_grid import patch_option, time_of

_TANH = {"act_layer": "gelu_tanh"}
_ACTIVATIONS: dict[str, dict[str, str]] = {
    "gelu": {},
    "gelu_fast": _TANH,
    "gelu_new": _TANH,
    "gelu_pytorch_tanh": _TANH,
}
"""timm's options for each activation; the last three are one formula."""
_NORM_EPS = 1e-6


def import_huggingface(content: Content, request: Request) -> Checkpoint:
    """The joint model of a Hugging Face folder, with its classifier and the names of its classes where it has them."""
    arrays, config = Arrays(content.path, dict(content.tree)), content.config
    _check(content)
    arrays.drop("pooler.", "vivit.pooler.")
    base = "vivit." if "vivit.embeddings.cls_token" in arrays else ""
    size = hf_size(arrays, f"{base}encoder.layer.", config)
    kernel_name = f"{base}embeddings.patch_embeddings.projection"
    kernel = arrays.take(f"{kernel_name}.weight", size.dim, 3, ANY, ANY, ANY)
    positions = arrays.take(f"{base}embeddings.position_embeddings", 1, ANY, size.dim)
    patch = (kernel.shape[3], kernel.shape[4])
    image_size = request.image_size or _pair(config.get("image_size", 224))
    classifier = _take_classifier(arrays, size.dim, content, request)
    tensors: dict[str, Tensor] = {
        "cls_token": arrays.take(f"{base}embeddings.cls_token", 1, 1, size.dim),
        "pos_embed": positions,
        "patch_embed.proj.weight": kernel,
        "patch_embed.proj.bias": arrays.take(f"{kernel_name}.bias", size.dim),
        **take_hf_blocks(arrays, f"{base}encoder.layer.", size),
        "norm.weight": arrays.take(f"{base}layernorm.weight", size.dim),
        "norm.bias": arrays.take(f"{base}layernorm.bias", size.dim),
        **classifier.tensors,
    }
    arrays.finish("a Hugging Face ViViT", "only VivitModel and VivitForVideoClassification are known")
    activation = _ACTIVATIONS[config.get("hidden_act", "gelu_fast")]
    return Checkpoint(
        model=JOINT,
        spatial=SpatialConfig(
            name=ARCHITECTURE,
            options={**size.options, "patch_size": patch_option(patch), **activation},
            image_size=image_size,
            tubelet=kernel.shape[2],
        ),
        rest={
            "time": time_of(content.path, positions.shape[1] - 1, patch, image_size),
            "heads": classifier.counts,
            "pooling": "token",
            "order": "time_space",
            "drop_path": 0.0,
        },
        classes=classifier.names,
        source=f"Hugging Face ViViT {content.path.resolve().name}",
        tensors=tensors,
    )


def _check(content: Content) -> None:
    """WeightsError where config.json is missing, or asks for what our models do not compute."""
    config = content.config
    if config.get("model_type") != "vivit":
        found = (
            f"says {config['model_type']!r}" if "model_type" in config else "is not there or does not say it"
        )
        raise WeightsError(
            f"{content.path} is not a Hugging Face ViViT: its config.json should have the model_type 'vivit', but "
            f"{found}. Pass the folder that `save_pretrained` wrote"
        )
    if (eps := config.get("layer_norm_eps", _NORM_EPS)) != _NORM_EPS:
        raise WeightsError(
            f"{content.path} was trained with layer_norm_eps {eps}, and only {_NORM_EPS} can be computed here"
        )
    if (activation := config.get("hidden_act", "gelu_fast")) not in _ACTIVATIONS:
        raise WeightsError(
            f"{content.path} was trained with the activation {activation!r}, and only {', '.join(_ACTIVATIONS)} "
            "can be computed here"
        )


def _take_classifier(arrays: Arrays, dim: int, content: Content, request: Request) -> Classifier:
    if "classifier.weight" not in arrays:
        return Classifier()
    weight = arrays.take("classifier.weight", ANY, dim)
    bias = arrays.take("classifier.bias", len(weight))
    return split_classifier(
        content.path, weight, bias, request.heads, _class_names(content.config, len(weight))
    )


def _class_names(config: Mapping[str, Any], classes: int) -> list[str]:
    """Names of the classes; none where the file has only the placeholders LABEL_0, LABEL_1, ..."""
    labels = config.get("id2label") or {}
    names = [str(labels.get(str(index), f"LABEL_{index}")) for index in range(classes)]
    return [] if any(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, list) and len(size) == 2 and all(isinstance(part, int) for part in size):
        return size[0], size[1]
    raise WeightsError(
        f"config.json has the image_size {size!r}, which is neither a side nor height and width"
    )
