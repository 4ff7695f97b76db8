"""Published weights of other programs, read into a `Checkpoint`: no Flax, no transformers, and no code of the file runs."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vivit.pipeline.checkpoint import MODELS, ORDERS, SELF_ATTENTION, Checkpoint
from vivit.pipeline.errors import ConfigError, WeightsError
from vivit.pipeline.weights.file_content import ACCEPTED, MSGPACK, NPZ, STATE, Content, read_content
from vivit.pipeline.weights.google import import_google
from vivit.pipeline.weights.huggingface import import_huggingface
from vivit.pipeline.weights.request import Request
from vivit.pipeline.weights.scenic import import_scenic
from vivit.pipeline.weights.timm_vit import import_timm
from vivit.pipeline.weights.videomae import import_videomae, is_videomae
from vivit.pipeline.workspace import nearest

_IMPORTERS: dict[str, tuple[str, Callable[[Content, Request], Checkpoint]]] = {
    "scenic": (MSGPACK, import_scenic),
    "google": (NPZ, import_google),
    "timm": (STATE, import_timm),
    "huggingface": (STATE, import_huggingface),
    "videomae": (STATE, import_videomae),
}
"""Format and importer of each kind of weights."""
_TELL_THEIR_BUILD = ("scenic", "huggingface")
KINDS = tuple(_IMPORTERS)
AUTO = "auto"
_FORMATS = {MSGPACK: "a msgpack file", NPZ: "an .npz file", STATE: "a state dict"}
__all__ = ["AUTO", "KINDS", "import_weights"]


def import_weights(
    path: Path,
    *,
    kind: str = AUTO,
    backbone: str | None = None,
    heads: Mapping[str, int] | None = None,
    image_size: tuple[int, int] | None = None,
    model: str | None = None,
    order: str | None = None,
) -> Checkpoint:
    """The model of the published weights in `path`, a file or a Hugging Face folder.

    kind: one of `KINDS`, or `auto` to tell it from the file.
    backbone: timm id or short name of a ViT whose file does not tell its build or its number of attention heads.
    heads: classes of each head, in the order in which they share the file's classifier; one head `action` by default.
    image_size: height and width of a crop in pixels, where the file does not tell it or crops are not square.
    model: one of `checkpoint.MODELS`, where names alone do not tell (joint or factorised-dot-product).
    order: `time_space` (by default) or `space_time`, which attention of a factorised-self-attention comes first; no file
    tells it.

    Tensors come out contiguous, in float32. WeightsError for a file that is damaged, unknown or does not fit what is
    asked, ConfigError for an option that has no such value.
    """
    if kind != AUTO and kind not in KINDS:
        raise nearest(kind, [AUTO, *KINDS], "kind of weights")
    if model is not None and model not in MODELS:
        raise nearest(model, list(MODELS), "model")
    request = Request(backbone=backbone, heads=heads, image_size=image_size, model=model)
    content = read_content(path)
    kind = _kind_of(content, request) if kind == AUTO else kind
    format, importer = _IMPORTERS[kind]
    if content.format != format:
        raise WeightsError(
            f"{path} is {_FORMATS[content.format]}, and {kind} weights come in {_FORMATS[format]}: "
            f"pass another --kind, or --kind {AUTO}"
        )
    if backbone is not None and kind in _TELL_THEIR_BUILD:
        raise ConfigError(f"{kind} weights tell what they are built of: leave --backbone {backbone} out")
    checkpoint = importer(content, request)
    _check_asked(path, checkpoint, request)
    return _finished(path, _ordered(path, checkpoint, order))


def _kind_of(content: Content, request: Request) -> str:
    """The kind of weights that a file's format and names are of."""
    if content.format != STATE:
        return "scenic" if content.format == MSGPACK else "google"
    if content.config.get("model_type") == "vivit":
        return "huggingface"
    if is_videomae(content.tree):
        return "videomae"
    if request.backbone is not None or "blocks.0.attn.qkv.weight" in content.tree:
        return "timm"
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in content.tree):
        return "huggingface"  # whose importer says what is wrong with config.json
    names = ", ".join(list(content.tree)[:3])
    raise WeightsError(
        f"{content.path} holds tensors of an unknown model ({names}, ...): pass {ACCEPTED}, "
        "or --backbone with the timm id that it was made for"
    )


def _check_asked(path: Path, checkpoint: Checkpoint, request: Request) -> None:
    if request.model not in (None, checkpoint.model):
        raise WeightsError(
            f"{path} holds a model of the kind {checkpoint.model}, not {request.model}: leave --model out"
        )
    if request.heads is not None and not checkpoint.classes:
        raise ConfigError(
            f"{path} gives no classifier that heads could be made of ({checkpoint.source}): leave --heads out"
        )


def _ordered(path: Path, checkpoint: Checkpoint, order: str | None) -> Checkpoint:
    if order is None:
        return checkpoint
    if order not in ORDERS:
        raise nearest(order, list(ORDERS), "order of attention")
    if checkpoint.model != SELF_ATTENTION:
        raise ConfigError(
            f"{path} holds a model ({checkpoint.model}) without an order of attention: leave --order out"
        )
    return replace(checkpoint, rest={**checkpoint.rest, "order": order})


def _finished(path: Path, checkpoint: Checkpoint) -> Checkpoint:
    """The same with contiguous tensors in float32; WeightsError where one holds values that are not finite."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        tensors[name] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        if not torch.isfinite(tensors[name]).all():
            raise WeightsError(
                f"{path} holds values that are not finite, the first in {name}: fetch the file again"
            )
    return replace(checkpoint, tensors=tensors)
