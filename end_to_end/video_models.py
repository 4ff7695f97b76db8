"""The four ViViT models by name, built from what a model file says, with its weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vivit.end_to_end.factorised_encoder import FactorisedEncoder
from vivit.end_to_end.image_init import resized, space_time_tensors, spatial_tensors
from vivit.end_to_end.space_time import SpaceTimeConfig, SpaceTimeTransformer
from vivit.pipeline.checkpoint import FACTORISED_ENCODER, VIDEO_MODELS, Checkpoint, SpatialConfig
from vivit.pipeline.errors import CheckpointError, ConfigError
from vivit.pipeline.spatial_vit import create_spatial_vit
from vivit.pipeline.workspace import nearest
from vivit.stage2_temporal.model import ModelConfig

VideoModel = FactorisedEncoder | SpaceTimeTransformer
"""Maps a video [batch, channel, frame, height, width] to logits [batch, class] per head."""


def create_video_model(model: str, spatial: SpatialConfig, rest: Mapping[str, Any]) -> VideoModel:
    """A model with fresh weights; `rest` as in `Checkpoint.rest`."""
    if model == FACTORISED_ENCODER:
        config = ModelConfig.from_dict(dict(rest))
        return FactorisedEncoder(create_spatial_vit(spatial), spatial.tubelet, config)
    if model not in VIDEO_MODELS:
        raise nearest(model, list(VIDEO_MODELS), "model")
    return SpaceTimeTransformer(model, spatial, SpaceTimeConfig.from_dict(dict(rest)))


def load_video_model(stored: Checkpoint) -> VideoModel:
    """The model of a file, in evaluation mode; CheckpointError where it holds none or does not fit itself."""
    if stored.model not in VIDEO_MODELS:
        raise CheckpointError(
            f"{stored.source} is no whole video model ({stored.model}): use it for `extract --backbone` or "
            "`train-temporal --init`"
        )
    try:
        model = create_video_model(stored.model, stored.spatial, stored.rest)
        model.load_state_dict(dict(stored.tensors))
    except (RuntimeError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"the weights of {stored.source} do not fit the model that they name: {error}"
        ) from error
    return model.eval()


def take_image_weights(
    model: VideoModel, image: nn.Module, spatial: SpatialConfig, *, inflation: str = "central"
) -> dict[str, str]:
    """Give `model` the weights of an image ViT (timm), and say of each tensor taken where it is from.

    Positions for another crop size are resized as in the reference. `spatial` is the video model's.
    """
    tensors: dict[str, Tensor] = dict(image.state_dict())
    if "patch_embed.proj.weight" not in tensors or "pos_embed" not in tensors:
        raise ConfigError(
            f"{spatial.name} is no Vision Transformer with learned positions: choose a plain vit_*"
        )
    patch = tensors["patch_embed.proj.weight"].shape[-2:]
    grid = (spatial.image_size[0] // patch[0], spatial.image_size[1] // patch[1])
    vit: Any = image
    num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    tensors["pos_embed"] = resized(tensors["pos_embed"], grid, num_prefix=num_prefix)
    if isinstance(model, FactorisedEncoder):
        half = spatial_tensors(tensors, spatial.tubelet, inflation)
        taken = {f"spatial.{name}": value for name, value in half.items()}
        needed = {name for name in model.state_dict() if name.startswith("spatial.")}
        if different := sorted(needed ^ taken.keys()):
            raise ConfigError(f"{spatial.name} has or lacks {different[0]}: choose a plain vit_*")
    else:
        taken = space_time_tensors(
            tensors,
            model.model,
            tubelet=spatial.tubelet,
            time=model.config.time,
            has_token=model.cls_token is not None,
            inflation=inflation,
        )
    model.load_state_dict(taken, strict=False)
    kernel = f"the image ViT, {inflation} frame" if spatial.tubelet > 1 else "the image ViT"
    return {name: kernel if name.endswith("patch_embed.proj.weight") else "the image ViT" for name in taken}
