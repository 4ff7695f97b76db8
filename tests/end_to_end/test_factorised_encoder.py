from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vivit.end_to_end.drop_path import ClipDropPath
from vivit.end_to_end.factorised_encoder import FactorisedEncoder
from vivit.end_to_end.video_models import VideoModel, create_video_model
from vivit.pipeline.checkpoint import SpatialConfig
from vivit.stage2_temporal.model import ModelConfig, TemporalModel

TINY = {"embed_dim": 24, "depth": 3, "num_heads": 3, "patch_size": 8}


def spatial(tubelet: int = 2, **options: Any) -> SpatialConfig:
    return SpatialConfig(
        name="vit_tiny_patch16_224", options=TINY | options, image_size=(16, 24), tubelet=tubelet
    )


def fe(tubelet: int = 2, time: int = 4, **options: Any) -> FactorisedEncoder:
    config = ModelConfig(dim=24, time=time, heads={"verb": 3, "noun": 5}, num_heads=3, depth=2, **options)
    torch.manual_seed(0)
    model = create_video_model("fe", spatial(tubelet), config.to_dict())
    assert isinstance(model, FactorisedEncoder)
    for name, parameter in model.named_parameters():
        if name.startswith("heads"):
            torch.nn.init.normal_(parameter)
    return model


def video(frames: int = 8, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, frames, 16, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tubelet", [1, 2])
def test_the_halves_one_after_the_other_give_what_the_whole_gives(tubelet: int) -> None:
    model = fe(tubelet, time=8 // tubelet).eval()
    half = TemporalModel(model.config).eval()
    half.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("spatial.")})
    with torch.inference_mode():
        tokens = model.spatial_tokens(video())
        whole, joined = model(video()), half(tokens)
    assert tokens.shape == (3, 8 // tubelet, 24)
    for head in ("verb", "noun"):
        assert torch.equal(whole[head], joined[head])


def test_an_incomplete_tubelet_at_the_end_is_dropped() -> None:
    model = fe().eval()
    with torch.inference_mode():
        assert torch.equal(model.spatial_tokens(video()[:, :, :7]), model.spatial_tokens(video()[:, :, :6]))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for is_on in (False, True):
        model = fe(drop_path=0.3).train()
        model.spatial.set_grad_checkpointing(is_on)
        torch.manual_seed(5)
        model(video())["verb"].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("half", ["spatial", "temporal"])
def test_a_frozen_half_gets_no_gradient_and_no_stochastic_depth(half: str) -> None:
    model = fe(drop_path=0.5)
    model.freeze(half)
    model.train()
    model(video())["verb"].sum().backward()
    with_gradient = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert half not in with_gradient
    assert {"spatial", "temporal"} - {half} <= with_gradient
    assert not any(module.training for module in model.get_submodule(half).modules())
    assert model.training


def test_stochastic_depth_drops_whole_clips_and_rescales_nothing() -> None:
    branch = torch.ones(1000 * 4, 2, 3)
    drop = ClipDropPath(0.3, rows_per_clip=4).train()
    kept = drop(branch).unflatten(0, (1000, 4))
    per_clip = kept.flatten(1)
    assert set(per_clip.unique().tolist()) == {0.0, 1.0}
    assert (per_clip == per_clip[:, :1]).all(), "the time steps of a clip share their fate"
    assert 0.25 < (per_clip[:, 0] == 0).float().mean() < 0.35
    assert torch.equal(drop.eval()(branch), branch)


def test_every_encoder_has_its_own_rising_rates() -> None:
    model = fe(drop_path=0.2)
    rates = [getattr(block.drop_path1, "rate", 0.0) for block in model.spatial.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])
    assert model.spatial.blocks[2].drop_path2.rows_per_clip == 4


BASE = {"name": "vit_base_patch16_224", "tubelet": 2}
LARGE = {"name": "vit_large_patch16_224", "tubelet": 2}


@pytest.mark.parametrize(
    ("model", "vit", "heads", "depth", "parameters"),
    [
        pytest.param("fe", BASE, {"action": 400}, 4, 115_062_928, id="B, Kinetics 400"),
        pytest.param("fe", LARGE, {"noun": 300, "verb": 97}, 4, 354_900_365, id="L, EPIC-KITCHENS-100"),
        pytest.param("fe", LARGE, {"action": 400}, 24, 606_827_920, id="L, Kinetics 400, 24 temporal layers"),
        pytest.param("joint", BASE, {"action": 400}, 0, 88_954_000, id="B, joint"),
    ],
)
def test_models_have_as_many_parameters_as_published(
    model: str, vit: dict[str, Any], heads: dict[str, int], depth: int, parameters: int
) -> None:
    config = SpatialConfig(**vit)
    with torch.device("meta"):
        built = create_video_model(model, config, rest_of(model, vit, heads, depth))
    counts: dict[str, int] = {}
    for name, parameter in built.named_parameters():
        part = name.split(".")[1] if name.startswith("spatial.patch") else name.split(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    assert sum(counts.values()) == parameters
    if parameters == 115_062_928:  # the reference counts the class tokens, 768 each, apart
        assert counts["spatial"] == 85_207_296 + 768
        assert counts["temporal"] == 28_366_080 + 768
        assert counts["patch_embed"] == 1_180_416


def rest_of(model: str, vit: dict[str, Any], heads: dict[str, int], depth: int) -> dict[str, Any]:
    if model != "fe":
        return {"time": 16, "heads": heads, "pooling": "token" if model == "joint" else "mean"}
    dim = 768 if vit is BASE else 1024
    return ModelConfig(
        dim=dim, time=16, heads=heads, depth=depth, adapter="none", num_heads=dim // 64
    ).to_dict()


@pytest.mark.parametrize(
    ("model", "vit", "size", "gigaflops"),
    [
        pytest.param("fe", BASE, 224, 284.4, id="B/16x2 factorised encoder"),
        pytest.param("joint", BASE, 224, 455.2, id="B/16x2 joint"),
        pytest.param("factorised-self-attention", BASE, 224, 372.3, id="B/16x2 factorised self-attention"),
        pytest.param("factorised-dot-product", BASE, 224, 277.1, id="B/16x2 factorised dot-product"),
        pytest.param("joint", LARGE, 224, 1446, id="L/16x2 joint"),
        pytest.param("joint", LARGE, 320, 3992, id="L/16x2 joint, 320 pixels"),
    ],
)
def test_models_cost_as_many_operations_as_published(
    model: str, vit: dict[str, Any], size: int, gigaflops: float
) -> None:
    """Tables 2 and 6 of the ViViT paper (arXiv 2103.15691), 32 frames; a multiplication with its addition counts once."""
    assert operations(model, vit, size) / 1e9 == pytest.approx(gigaflops, rel=0.02)


@pytest.mark.parametrize("vit", [BASE, LARGE], ids=["B", "L"])
def test_the_factorised_encoder_costs_what_its_shapes_say(vit: dict[str, Any]) -> None:
    dim, depth, time, places = (768, 12, 16, 196) if vit is BASE else (1024, 24, 16, 196)

    def encoder(layers: int, tokens: int) -> int:
        return layers * tokens * (12 * dim * dim + 2 * tokens * dim)

    embedding = time * places * 2 * 16 * 16 * 3 * dim
    expected = embedding + time * encoder(depth, 1 + places) + encoder(4, 1 + time) + 400 * dim
    assert operations("fe", vit, 224) == expected


def operations(model: str, vit: dict[str, Any], size: int) -> float:
    """Multiplications with an addition of one forward pass of a view of 32 frames."""
    config = SpatialConfig(**vit, image_size=(size, size))
    with torch.device("meta"):
        built: VideoModel = create_video_model(model, config, rest_of(model, vit, {"action": 400}, 4))
        clip = torch.empty(1, 3, 32, size, size)
    if isinstance(built, FactorisedEncoder):
        # the reference computes all tokens of the last block, here only the class token's are
        vit_model: Any = built.spatial
        vit_model.global_pool = "avg"
    with FlopCounterMode(display=False) as counter:
        built.eval()(clip)
    return counter.get_total_flops() / 2
