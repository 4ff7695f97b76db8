from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from vivit.pipeline.checkpoint import Checkpoint, SpatialConfig
from vivit.pipeline.errors import WeightsError
from vivit.pipeline.weights import import_weights
from vivit.stage2_temporal.model import ModelConfig, TemporalModel

Encoder = Callable[..., bytes]
Tree = Callable[[Mapping[str, Any]], dict[str, Any]]
GoldenModel = Callable[[str], Any]
CROP = (32, 48)
"""Height and width of the crops of the models 1, 3 and 4."""


def flax_encoder(tensors: Mapping[str, Tensor], encoder: str, num_heads: int) -> dict[str, Tensor]:
    """Flax names and shapes of an encoder in timm's: the way back, from the table of the reference."""
    arrays = {}
    for name, value in tensors.items():
        if name.startswith("norm."):
            arrays[f"{encoder}/encoder_norm/{'scale' if 'weight' in name else 'bias'}"] = value
        elif name == "pos_embed":
            arrays[f"{encoder}/posembed_input/pos_embedding"] = value
        elif name.startswith("blocks."):
            _, index, part = name.split(".", 2)
            found = flax_part(part, value, num_heads)
            arrays |= {f"{encoder}/encoderblock_{index}/{key}": array for key, array in found.items()}
    return arrays


def flax_part(part: str, value: Tensor, num_heads: int) -> dict[str, Tensor]:
    module, leaf = part.rsplit(".", 1)
    attention = "MultiHeadDotProductAttention_0"
    if module in ("norm1", "norm2"):
        name = {"norm1": "LayerNorm_0", "norm2": "LayerNorm_1"}[module]
        return {f"{name}/{'scale' if leaf == 'weight' else 'bias'}": value}
    if module in ("mlp.fc1", "mlp.fc2"):
        place = f"MlpBlock_0/Dense_{int(module[-1]) - 1}"
        return {f"{place}/kernel": value.T} if leaf == "weight" else {f"{place}/bias": value}
    dim = value.shape[-1]
    if module == "attn.proj":
        heads = value.T.reshape(num_heads, -1, dim) if leaf == "weight" else value
        return {f"{attention}/out/{'kernel' if leaf == 'weight' else 'bias'}": heads}
    names = ("query", "key", "value")
    if leaf == "weight":
        return {
            f"{attention}/{name}/kernel": part.T.reshape(dim, num_heads, -1)
            for name, part in zip(names, value.chunk(3), strict=True)
        }
    return {
        f"{attention}/{name}/bias": part.reshape(num_heads, -1)
        for name, part in zip(names, value.chunk(3), strict=True)
    }


def flax_arrays(checkpoint: Checkpoint, head: str = "action") -> dict[str, Tensor]:
    """The Flax parameters of a factorised encoder."""
    tensors = checkpoint.tensors
    arrays: dict[str, Tensor] = {}
    num_heads = checkpoint.spatial.options["num_heads"]
    for part, encoder in (("spatial.", "SpatialTransformer"), ("temporal.", "TemporalTransformer")):
        inside = checkpoint.part(part)
        arrays |= flax_encoder(inside, encoder, num_heads)
        arrays[f"cls_{encoder}"] = inside["cls_token"]
    kernel = tensors["spatial.patch_embed.proj.weight"]
    arrays["embedding/kernel"] = (
        kernel.permute(2, 3, 4, 1, 0) if kernel.ndim == 5 else kernel.permute(2, 3, 1, 0)
    )
    arrays["embedding/bias"] = tensors["spatial.patch_embed.proj.bias"]
    arrays["output_projection/kernel"] = tensors[f"heads.{head}.weight"].T
    arrays["output_projection/bias"] = tensors[f"heads.{head}.bias"]
    return arrays


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), np.asarray(value), err_msg=name, strict=True)


def assert_equal(first: Checkpoint, second: Checkpoint) -> None:
    assert first.spatial == second.spatial
    assert first.rest == second.rest
    assert_same(first.tensors, second.tensors)


def test_every_array_of_the_reference_checkpoint_is_imported_bit_for_bit(
    shared: Callable[[str], Path], golden: GoldenModel
) -> None:
    checkpoint = import_weights(shared("golden/scenic_fe_i_checkpoint"))
    params = golden("fe_i").params
    assert len(params) == 76
    assert_same(flax_arrays(checkpoint), params)
    assert checkpoint.model == "fe"
    assert checkpoint.spatial == SpatialConfig(
        name="vit_base_patch16_224",
        options={
            "embed_dim": 48,
            "depth": 2,
            "num_heads": 4,
            "mlp_ratio": 2.0,
            "patch_size": 16,
            "act_layer": "gelu_tanh",
        },
        image_size=(64, 64),
        tubelet=2,
    )
    assert checkpoint.rest == {
        "dim": 48,
        "time": 4,
        "heads": {"action": 11},
        "adapter": "none",
        "adapter_width": None,
        "temporal": "transformer",
        "depth": 2,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "drop_path": 0.0,
    }
    assert checkpoint.classes == {"action": []}
    assert checkpoint.source == "Scenic checkpoint scenic_fe_i_checkpoint, step 1234 (factorised encoder)"
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in checkpoint.tensors.values())


@pytest.mark.parametrize("name", ["fe_i", "fe_ii"])
def test_an_imported_factorised_encoder_computes_what_the_reference_does(
    tmp_path: Path, golden: GoldenModel, name: str
) -> None:
    reference = golden(name)
    checkpoint = import_weights(reference.write(tmp_path / "checkpoint_7"))
    spatial = checkpoint.spatial
    vit: Any = timm.create_model(spatial.name, num_classes=0, img_size=spatial.image_size, **spatial.options)
    state = checkpoint.part("spatial.")
    kernel, bias = state.pop("patch_embed.proj.weight"), state["patch_embed.proj.bias"]
    assert kernel.ndim == (5 if spatial.tubelet > 1 else 4)
    assert vit.load_state_dict(state, strict=False).missing_keys == ["patch_embed.proj.weight"]
    kernel = kernel if kernel.ndim == 5 else kernel[:, :, None]
    temporal = TemporalModel(ModelConfig.from_dict(dict(checkpoint.rest)))
    temporal.load_state_dict({k: v for k, v in checkpoint.tensors.items() if not k.startswith("spatial.")})
    with torch.inference_mode():
        video = reference.tensor("video").permute(0, 4, 1, 2, 3)
        tokens = F.conv3d(video, kernel, bias, stride=kernel.shape[2:]).flatten(3).permute(0, 2, 3, 1)
        batch, time = tokens.shape[:2]
        encoded = vit.norm(vit.blocks(vit._pos_embed(tokens.flatten(0, 1))))
        spatial_cls = encoded[:, 0].view(batch, time, -1)
        logits = temporal.eval()(spatial_cls)["action"]
    torch.testing.assert_close(spatial_cls, reference.tensor("spatial_cls"), atol=3e-5, rtol=0)
    torch.testing.assert_close(logits, reference.tensor("logits"), atol=2e-5, rtol=0)


def pre_linen(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as they were numbered before Linen: one counter over all parts of a block."""
    numbers = {
        "LayerNorm_1": "LayerNorm_2",
        "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    }
    numbers["MlpBlock_0"] = "MlpBlock_3"
    return {"/".join(numbers.get(part, part) for part in name.split("/")): v for name, v in params.items()}


def layouts(params: Mapping[str, Any], to_tree: Tree) -> dict[str, dict[str, Any]]:
    """The trees that Scenic wrote over the years, with momentum that differs from the parameters."""
    momentum = to_tree({name: value + 1 for name, value in params.items()})
    leaves = to_tree({f"{name}/momentum": value + 1 for name, value in params.items()})
    common = {"global_step": np.int32(9), "model_state": {}, "rng": np.zeros(2, np.uint32)}
    state = {"step": np.int32(9), "param_states": leaves}
    old = to_tree(pre_linen(params))
    return {
        "optimizer/target": {**common, "optimizer": {"target": to_tree(params), "state": state}},
        "state first": {**common, "optimizer": {"state": state, "target": to_tree(params)}},
        "optimizer/target/params": {
            **common,
            "optimizer": {"target": {"params": old}, "state": {"param_states": {"params": leaves}}},
        },
        "params": {**common, "opt_state": ({"trace": momentum}, {}), "params": to_tree(params)},
        "params/params": {"params": {"params": to_tree(params)}},
        "bare": to_tree(params),
    }


@pytest.mark.parametrize(
    "layout",
    ["optimizer/target", "state first", "optimizer/target/params", "params", "params/params", "bare"],
)
def test_every_layout_gives_the_same_model(
    tmp_path: Path,
    shared: Callable[[str], Path],
    golden: GoldenModel,
    to_flax: Encoder,
    to_tree: Tree,
    layout: str,
) -> None:
    path = tmp_path / "checkpoint"
    path.write_bytes(to_flax(layouts(golden("fe_i").params, to_tree)[layout]))
    assert_equal(import_weights(path), import_weights(shared("golden/scenic_fe_i_checkpoint")))


def test_momentum_alone_is_not_taken_for_parameters(
    tmp_path: Path, golden: GoldenModel, to_flax: Encoder, to_tree: Tree
) -> None:
    path = tmp_path / "checkpoint"
    path.write_bytes(
        to_flax({"opt_state": {"0": {"trace": to_tree(golden("fe_i").params)}}, "rng": np.ones(2)})
    )
    with pytest.raises(WeightsError, match=r"without the parameters of a ViViT .*; it holds rng"):
        import_weights(path)


def test_arrays_in_pieces_and_bfloat16_are_imported(
    tmp_path: Path, golden: GoldenModel, to_flax: Encoder, to_tree: Tree
) -> None:
    params = golden("fe_ii").params
    (tmp_path / "whole").write_bytes(to_flax({"params": to_tree(params)}))
    (tmp_path / "pieces").write_bytes(to_flax({"params": to_tree(params)}, chunk_bytes=500))
    half = {name: torch.from_numpy(value).bfloat16() for name, value in params.items()}
    (tmp_path / "half").write_bytes(to_flax({"params": to_tree(half)}))
    whole = import_weights(tmp_path / "whole")
    assert_equal(import_weights(tmp_path / "pieces"), whole)
    rounded = import_weights(tmp_path / "half").tensors
    assert_same(rounded, {name: value.bfloat16().float() for name, value in whole.tensors.items()})


@pytest.mark.parametrize("depth", [4, 24])
def test_the_depth_of_the_temporal_encoder_is_in_the_file(
    tmp_path: Path, golden: GoldenModel, to_flax: Encoder, to_tree: Tree, depth: int
) -> None:
    params = {}
    for name, value in golden("fe_ii").params.items():
        if name.startswith("TemporalTransformer/encoderblock_0/"):
            for index in range(depth):
                params[name.replace("encoderblock_0", f"encoderblock_{index}")] = value + index
        else:
            params[name] = value
    path = tmp_path / "checkpoint"
    path.write_bytes(to_flax({"params": to_tree(params)}))
    checkpoint = import_weights(path)
    assert checkpoint.rest["depth"] == depth
    assert checkpoint.spatial.options["depth"] == 3
    norm = checkpoint.tensors[f"temporal.blocks.{depth - 1}.norm1.weight"]
    first = checkpoint.tensors["temporal.blocks.0.norm1.weight"]
    torch.testing.assert_close(norm, first + depth - 1)


def test_an_imported_model_1_computes_what_the_reference_does(
    tmp_path: Path, golden: GoldenModel, run_blocks: Callable[..., Tensor]
) -> None:
    reference = golden("model1")
    checkpoint = import_weights(reference.write(tmp_path / "checkpoint"), image_size=CROP)
    assert checkpoint.model == "joint"
    assert checkpoint.rest == {
        "time": 3,
        "heads": {"action": 7},
        "pooling": "token",
        "order": "time_space",
        "drop_path": 0.0,
    }
    assert checkpoint.spatial.image_size == CROP
    assert "step 7 (joint attention" in checkpoint.source
    tensors = checkpoint.tensors
    kernel = tensors["patch_embed.proj.weight"]
    with torch.inference_mode():
        video = reference.tensor("video").permute(0, 4, 1, 2, 3)
        tokens = F.conv3d(video, kernel, tensors["patch_embed.proj.bias"], stride=kernel.shape[2:])
        tokens = tokens.flatten(2).transpose(1, 2)
        tokens = (
            torch.cat([tensors["cls_token"].expand(len(tokens), -1, -1), tokens], 1) + tensors["pos_embed"]
        )
        tokens = run_blocks(tensors, tokens, options=checkpoint.spatial.options)
        tokens = F.layer_norm(tokens, (32,), tensors["norm.weight"], tensors["norm.bias"], eps=1e-6)
        logits = F.linear(tokens[:, 0], tensors["heads.action.weight"], tensors["heads.action.bias"])
    torch.testing.assert_close(tokens, reference.tensor("encoded_tokens"), atol=3e-5, rtol=0)
    torch.testing.assert_close(logits, reference.tensor("logits"), atol=2e-5, rtol=0)


def test_model_3_has_two_attentions_in_each_block(tmp_path: Path, golden: GoldenModel) -> None:
    reference = golden("model3")
    checkpoint = import_weights(reference.write(tmp_path / "checkpoint"), image_size=CROP)
    assert checkpoint.model == "factorised-self-attention"
    assert (checkpoint.rest["time"], checkpoint.rest["pooling"]) == (3, "mean")
    parts = ["norm_time", "attn_time.qkv", "attn_time.proj", "norm_space", "attn_space.qkv"]
    parts += ["attn_space.proj", "norm_mlp", "mlp.fc1", "mlp.fc2"]
    names = {f"blocks.{index}.{part}" for index in range(2) for part in parts}
    names |= {"patch_embed.proj", "norm", "heads.action"}
    assert set(checkpoint.tensors) == {f"{n}.{leaf}" for n in names for leaf in ("weight", "bias")} | {
        "pos_embed"
    }
    for axis in ("time", "space"):
        source = f"Transformer/encoderblock_1/MultiHeadDotProductAttention_{axis}"
        query = torch.from_numpy(reference.params[f"{source}/query/kernel"]).reshape(32, 32).T
        out = torch.from_numpy(reference.params[f"{source}/out/kernel"]).reshape(32, 32).T
        assert torch.equal(checkpoint.tensors[f"blocks.1.attn_{axis}.qkv.weight"][:32], query)
        assert torch.equal(checkpoint.tensors[f"blocks.1.attn_{axis}.proj.weight"], out)
        norm = torch.from_numpy(reference.params[f"Transformer/encoderblock_1/LayerNorm_{axis}/scale"])
        assert torch.equal(checkpoint.tensors[f"blocks.1.norm_{axis}.weight"], norm)


def test_model_4_is_told_by_its_missing_class_token(tmp_path: Path, golden: GoldenModel) -> None:
    path = golden("model4").write(tmp_path / "checkpoint")
    checkpoint = import_weights(path, image_size=CROP)
    assert checkpoint.model == "factorised-dot-product"
    assert (checkpoint.rest["time"], checkpoint.rest["pooling"]) == (3, "mean")
    assert "cls_token" not in checkpoint.tensors
    assert checkpoint.tensors["patch_embed.proj.weight"].shape == (32, 3, 2, 16, 16)
    assert "a mean-pooled joint model looks the same: --model joint says so" in checkpoint.source


def test_a_joint_model_pooled_by_the_mean_can_be_asked_for(tmp_path: Path, golden: GoldenModel) -> None:
    path = golden("model4").write(tmp_path / "checkpoint")
    checkpoint = import_weights(path, image_size=CROP, model="joint")
    assert (checkpoint.model, checkpoint.rest["pooling"]) == ("joint", "mean")
    assert checkpoint.source.endswith("(joint as asked: the file could be joint or factorised-dot-product)")


def test_a_model_that_the_names_deny_cannot_be_asked_for(tmp_path: Path, golden: GoldenModel) -> None:
    path = golden("model3").write(tmp_path / "checkpoint")
    with pytest.raises(
        WeightsError, match="of the kind factorised-self-attention, not joint: leave --model out"
    ):
        import_weights(path, image_size=CROP, model="joint")


def test_an_embedding_of_one_frame_has_a_frame_axis_in_the_models_over_all_tokens(
    tmp_path: Path, golden: GoldenModel, to_flax: Encoder, to_tree: Tree
) -> None:
    params = golden("model1").params
    params["embedding/kernel"] = params["embedding/kernel"][0]
    (tmp_path / "file").write_bytes(to_flax(to_tree(params)))
    checkpoint = import_weights(tmp_path / "file", image_size=CROP)
    assert checkpoint.tensors["patch_embed.proj.weight"].shape == (32, 3, 1, 16, 16)
    assert checkpoint.spatial.tubelet == 1


def test_the_size_of_the_crop_must_fit_the_positions(
    tmp_path: Path, golden: GoldenModel, shared: Callable[[str], Path]
) -> None:
    path = golden("model1").write(tmp_path / "checkpoint")
    with pytest.raises(
        WeightsError, match=r"18 tokens, .* frames of 224 x 224 pixels \(196 patches of 16 x 16\)"
    ):
        import_weights(path)
    with pytest.raises(WeightsError, match="32 x 40 pixels are no multiple of: pass another --image-size"):
        import_weights(path, image_size=(32, 40))
    with pytest.raises(WeightsError, match="16 tokens per frame, but 32 x 64 pixels are 8 patches"):
        import_weights(shared("golden/scenic_fe_i_checkpoint"), image_size=(32, 64))
    wide = import_weights(shared("golden/scenic_fe_i_checkpoint"), image_size=(32, 128))
    assert wide.spatial.image_size == (32, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pre_logits/kernel": np.ones((48, 48))},
            r"holds 1 tensors that a ViViT does not have \(pre_logits/kernel",
        ),
        ({"cls_TemporalTransformer": None}, "lacks the tensor cls_TemporalTransformer: fetch the file again"),
        ({"embedding/bias": np.ones(7)}, "embedding/bias is 7, not 48: fetch the file again"),
        (
            {"embedding/kernel": np.ones((2, 16, 48))},
            "embedding/kernel is 2 x 16 x 48, not any x any x any x 3 x 48",
        ),
        ({"SpatialTransformer/posembed_input/pos_embedding": np.ones((1, 16, 48))}, "15 tokens per frame"),
        (
            {"TemporalTransformer/encoderblock_3/x": np.ones(1)},
            "lacks the block TemporalTransformer/encoderblock_2",
        ),
        ({"output_projection/bias": np.full(11, np.nan)}, "not finite, the first in heads.action.bias"),
    ],
)
def test_a_tree_that_does_not_fit_together_is_an_error(
    tmp_path: Path, golden: GoldenModel, to_flax: Encoder, to_tree: Tree, change: dict[str, Any], message: str
) -> None:
    params = {**golden("fe_i").params, **change}
    params = {name: value for name, value in params.items() if value is not None}
    (tmp_path / "file").write_bytes(to_flax({"params": to_tree(params)}))
    with pytest.raises(WeightsError, match=message):
        import_weights(tmp_path / "file")


def test_the_checkpoint_comes_back_from_its_file(tmp_path: Path, shared: Callable[[str], Path]) -> None:
    checkpoint = import_weights(shared("golden/scenic_fe_i_checkpoint"))
    checkpoint.write(tmp_path / "model.safetensors")
    assert_equal(Checkpoint.read(tmp_path / "model.safetensors"), checkpoint)
