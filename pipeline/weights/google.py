"""Google's image ViTs as .npz files (the original releases and AugReg), as spatial encoders.

Their own code computes the GELU by its tanh approximation, Flax's default. timm runs the same weights with the exact
GELU and reports the published accuracies so; this does as timm does, so that one set of weights gives one set of
features however it came in.
"""

from torch import Tensor

from vivit.pipeline.checkpoint import Checkpoint
from vivit.pipeline.errors import WeightsError
from vivit.pipeline.weights.arrays import Arrays
from vivit.pipeline.weights.file_content import ACCEPTED, Content
from vivit.pipeline.weights.flax_names import (
    BLOCK,
    encoder_size,
    renumbered,
    take_embedding,
    take_encoder,
    take_positions,
)
from vivit.pipeline.weights.request import Request
from vivit.pipeline.weights.timm_vit import spatial_checkpoint

_PREFIXES = ("", "opt/target/")
_MARK = "embedding/kernel"
_CLASSIFIER = ("head/", "pre_logits/")


def import_google(content: Content, request: Request) -> Checkpoint:
    """The spatial encoder in a Google .npz; its classifier is left out."""
    arrays = Arrays(content.path, renumbered(_below_prefix(content)))
    arrays.drop(*_CLASSIFIER)
    size = encoder_size(arrays, "Transformer", BLOCK)
    kernel, bias = take_embedding(arrays, size.dim)
    if kernel.shape[2] != 1:
        raise WeightsError(f"{content.path} looks at {kernel.shape[2]} frames at once: it is no image ViT")
    tensors = {
        "cls_token": arrays.take("cls", 1, 1, size.dim),
        "pos_embed": take_positions(arrays, "Transformer", size.dim),
        "patch_embed.proj.weight": kernel[:, :, 0],
        "patch_embed.proj.bias": bias,
        **take_encoder(arrays, "Transformer", size),
    }
    arrays.finish("a plain ViT", "only ViTs without a convolutional stem and with a class token are known")
    source = f"Google ViT weights {content.path.name}"
    return spatial_checkpoint(Arrays(content.path, tensors), request, source, num_heads=size.num_heads)


def _below_prefix(content: Content) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if prefix + _MARK in content.tree:
            return {
                name.removeprefix(prefix): tensor
                for name, tensor in content.tree.items()
                if name.startswith(prefix)
            }
    names = ", ".join(list(content.tree)[:3]) or "nothing"
    raise WeightsError(
        f"{content.path} is an .npz file without a Google ViT (embedding/kernel); it holds {names}: pass {ACCEPTED}"
    )
