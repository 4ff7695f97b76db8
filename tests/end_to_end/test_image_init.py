import numpy as np
import pytest
import torch

from vivit.end_to_end.factorised_encoder import FactorisedEncoder
from vivit.end_to_end.image_init import average_frame, central_frame, resized, tiled
from vivit.end_to_end.video_models import create_video_model, take_image_weights
from vivit.pipeline.checkpoint import SpatialConfig
from vivit.pipeline.errors import ConfigError
from vivit.pipeline.spatial_vit import create_spatial_vit
from vivit.stage1_extract.encoder import class_tokens

OPTIONS = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}


def config(tubelet: int = 1, size: int = 16) -> SpatialConfig:
    return SpatialConfig(
        name="vit_tiny_patch16_224", options=OPTIONS, image_size=(size, size), tubelet=tubelet
    )


def image_vit(size: int = 16) -> torch.nn.Module:
    torch.manual_seed(3)
    model = create_spatial_vit(config(size=size))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def video_model(
    model: str, tubelet: int = 2, time: int = 3, size: int = 16, pooling: str = "mean"
) -> torch.nn.Module:
    rest = {"time": time, "heads": {"action": 4}}
    rest |= {"dim": 24, "num_heads": 2, "depth": 1} if model == "fe" else {"pooling": pooling}
    return create_video_model(model, config(tubelet, size), rest).eval()


def test_a_central_kernel_sees_one_frame_and_an_average_kernel_their_mean() -> None:
    image, clip = torch.randn(5, 3, 4, 4), torch.randn(1, 3, 3, 4, 4)
    seen = torch.nn.functional.conv3d(clip, central_frame(image, 3))
    torch.testing.assert_close(seen[:, :, 0], torch.nn.functional.conv2d(clip[:, :, 1], image))
    assert central_frame(image, 2)[:, :, 0].abs().sum() == 0, "of two frames the second is the central one"
    seen = torch.nn.functional.conv3d(clip, average_frame(image, 3))
    torch.testing.assert_close(seen[:, :, 0], torch.nn.functional.conv2d(clip.mean(2), image))


def test_positions_are_resized_with_aligned_corners_and_keep_the_class_slot() -> None:
    grid = torch.linspace(0, 3, 4)
    old = torch.cat([torch.tensor([[[9.0]]]), (grid[:, None] * 10 + grid).reshape(1, 16, 1)], dim=1)
    new = resized(old, (7, 7))
    fine = np.linspace(0, 3, 7)
    assert new[0, 0, 0] == 9
    np.testing.assert_allclose(new[0, 1:, 0].reshape(7, 7), fine[:, None] * 10 + fine, rtol=0, atol=1e-5)
    assert resized(old, (4, 4)) is old


@pytest.mark.parametrize("has_token", [True, False])
def test_positions_are_tiled_time_by_time(has_token: bool) -> None:
    old = torch.arange(5.0).view(1, 5, 1)
    new = tiled(old, 3, has_token=has_token)[0, :, 0].tolist()
    assert new == [0.0] * has_token + [1.0, 2.0, 3.0, 4.0] * 3


def test_the_spatial_half_starts_as_the_image_vit_with_its_class_token() -> None:
    image, model = image_vit(), video_model("fe", tubelet=1)
    assert isinstance(model, FactorisedEncoder)
    origins = take_image_weights(model, image, config())
    frames = torch.randn(2, 3, 3, 16, 16)
    with torch.inference_mode():
        expected = torch.stack([class_tokens(image, frames[:, :, i]) for i in range(3)], dim=1)
        torch.testing.assert_close(model.spatial_tokens(frames), expected)
    assert origins["spatial.cls_token"] == "the image ViT"
    assert not any(name.startswith(("temporal", "heads")) for name in origins)


@pytest.mark.parametrize("inflation", ["central", "average"])
def test_a_still_tubelet_looks_like_its_frame(inflation: str) -> None:
    image, model = image_vit(), video_model("fe", tubelet=2)
    assert isinstance(model, FactorisedEncoder)
    take_image_weights(model, image, config(2), inflation=inflation)
    frame = torch.randn(1, 3, 1, 16, 16)
    with torch.inference_mode():
        tokens = model.spatial_tokens(frame.expand(-1, -1, 6, -1, -1))
        torch.testing.assert_close(tokens[:, 0], class_tokens(image, frame[:, :, 0]), rtol=1e-4, atol=1e-5)


def test_joint_takes_blocks_class_token_and_tiled_positions() -> None:
    image = image_vit()
    model = video_model("joint", pooling="token")
    take_image_weights(model, image, config(2))  # type: ignore[arg-type]
    state, there = model.state_dict(), image.state_dict()
    assert torch.equal(state["cls_token"], there["cls_token"])
    assert torch.equal(state["pos_embed"][:, 1:5], state["pos_embed"][:, 5:9])
    for name in ("blocks.1.attn.qkv.weight", "blocks.0.mlp.fc2.bias", "norm.weight"):
        assert torch.equal(state[name], there[name]), name


def test_factorised_self_attention_takes_the_attention_twice_and_leaves_the_time_norm_fresh() -> None:
    image, model = image_vit(), video_model("factorised-self-attention")
    origins = take_image_weights(model, image, config(2))  # type: ignore[arg-type]
    state, there = model.state_dict(), image.state_dict()
    for part in ("attn_time", "attn_space"):
        assert torch.equal(state[f"blocks.0.{part}.qkv.weight"], there["blocks.0.attn.qkv.weight"])
    assert torch.equal(state["blocks.0.norm_space.weight"], there["blocks.0.norm1.weight"])
    assert torch.equal(state["blocks.0.norm_mlp.bias"], there["blocks.0.norm2.bias"])
    assert torch.equal(state["blocks.0.norm_time.weight"], torch.ones(24))
    assert "blocks.0.norm_time.weight" not in origins
    assert "cls_token" not in state


def test_a_backbone_with_other_tubelets_is_refused() -> None:
    image = create_spatial_vit(config(tubelet=2))
    with pytest.raises(ConfigError, match=r"tubelets of 2 frames: pass --tubelet 2"):
        take_image_weights(video_model("fe", tubelet=3), image, config(3))  # type: ignore[arg-type]


def test_slots_before_the_grid_are_kept_however_many_there_are() -> None:
    positions = torch.randn(1, 4, 8)
    assert resized(positions, (2, 2), num_prefix=0) is positions
    prefixed = torch.cat([torch.full((1, 5, 8), 7.0), positions], dim=1)
    assert torch.equal(resized(prefixed, (3, 3), num_prefix=5)[:, :5], prefixed[:, :5])
