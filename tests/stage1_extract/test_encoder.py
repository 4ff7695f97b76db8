from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from vivit.pipeline import backbones
from vivit.pipeline.backbones import load_backbone, timm_id, weights_sha256
from vivit.pipeline.errors import ConfigError, WeightsError
from vivit.stage1_extract.encoder import (
    SpatialEncoder,
    class_tokens,
    has_class_token_path,
    pass_size,
)

CROPS = np.random.default_rng(0).integers(0, 256, (1, 5, 32, 32, 3), np.uint8)


def tiny(**options: object) -> torch.nn.Module:
    """A small VisionTransformer with every parameter random, so that a forgotten one shows."""
    torch.manual_seed(0)
    options = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 0,
    } | options
    model = timm.models.vision_transformer.VisionTransformer(**options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "crop_size"),
    [("vit_ti16", 224), ("vit_s16", 96), ("vit_b16", 64), ("vit_l16", 32), ("dinov2_s14", 56)],
)
def test_the_class_token_path_equals_timms_own_forward(name: str, crop_size: int) -> None:
    model = load_backbone(name, weights="random", crop_size=crop_size).model
    images = torch.randn(2, 3, crop_size, crop_size)
    assert has_class_token_path(model)
    with torch.inference_mode():
        torch.testing.assert_close(class_tokens(model, images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"init_values": 0.5}, id="layer-scale"),
        pytest.param({"qk_norm": True}, id="qk-norm"),
        pytest.param({"reg_tokens": 4, "no_embed_class": True}, id="registers"),
        pytest.param({"qkv_bias": False}, id="no-bias"),
        pytest.param({"scale_attn_norm": True, "scale_mlp_norm": True}, id="scale-norm"),
        pytest.param({"pre_norm": True}, id="pre-norm"),
        pytest.param({"fc_norm": True}, id="fc-norm"),
    ],
)
def test_every_build_of_the_block_is_followed(options: dict[str, object]) -> None:
    model, images = tiny(**options), torch.randn(2, 3, 32, 32)
    assert has_class_token_path(model)
    with torch.inference_mode():
        torch.testing.assert_close(class_tokens(model, images), model(images), rtol=1e-5, atol=1e-5)


def test_in_double_precision_the_two_are_equal_to_the_last_digits() -> None:
    model, images = tiny().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(class_tokens(model, images), model(images), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", [{"global_pool": "avg"}, {"global_pool": "map"}])
def test_a_model_without_class_token_runs_in_full(options: dict[str, object]) -> None:
    model, images = tiny(class_token=False, **options), torch.randn(2, 3, 32, 32)
    assert not has_class_token_path(model)
    with torch.inference_mode():
        assert torch.equal(class_tokens(model, images), model(images))


def encoder(**options: object) -> SpatialEncoder:
    settings = {"weights": "random", "crop_size": 32, "device": "cpu", "batch_size": 5} | options
    return SpatialEncoder("vit_ti16", **settings)  # type: ignore[arg-type]


def test_crops_are_normalised_as_the_models_configuration_says() -> None:
    ours = encoder().encode(CROPS)[0].numpy()
    model = load_backbone("vit_ti16", weights="random", crop_size=32).model
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**{**config, "input_size": (3, 32, 32), "crop_pct": 1.0})
    from PIL import Image

    with torch.inference_mode():
        theirs = model(torch.stack([transform(Image.fromarray(crop)) for crop in CROPS[0]]))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "batch_size", "size"), [(32, 32, 32), (40, 32, 20), (5, 32, 5), (7, 3, 3), (1, 1, 1)]
)
def test_passes_are_few_and_of_equal_size(count: int, batch_size: int, size: int) -> None:
    assert pass_size(count, batch_size) == size


def test_crops_in_one_pass_do_not_look_at_each_other() -> None:
    changed = CROPS.copy()
    changed[:, 1:] = 255 - changed[:, 1:]
    model = encoder()
    assert torch.equal(model.encode(CROPS)[0, 0], model.encode(changed)[0, 0])


def test_several_passes_give_what_one_gives() -> None:
    whole, parts = encoder().encode(CROPS), encoder(batch_size=2).encode(CROPS)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert parts.shape == (1, 5, 192)


def test_random_weights_are_the_same_every_time_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    digests = {
        weights_sha256(load_backbone("vit_ti16", weights="random", crop_size=32).model) for _ in range(2)
    }
    assert len(digests) == 1
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file_are_those_in_the_file(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(9)
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7)
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": source.state_dict(), "epoch": 3}, path)
    else:
        safetensors.torch.save_file(source.state_dict(), path)
    loaded = load_backbone("vit_ti16", weights=str(path), crop_size=32)
    assert (loaded.source, loaded.file) == (f"file:w{suffix}", path)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_positions_are_resized_to_the_crop(tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = load_backbone("vit_ti16", weights=str(tmp_path / "w.safetensors"), crop_size=32).model
    assert model.pos_embed.shape == (1, 1 + 4, 192)
    assert torch.equal(model.pos_embed[:, 0], source.pos_embed[:, 0])


def test_google_npz_weights_are_read(tmp_path: Path) -> None:
    torch.manual_seed(4)
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    np.savez(tmp_path / "w.npz", **google_arrays(source))
    model = load_backbone("vit_ti16", weights=str(tmp_path / "w.npz"), crop_size=32).model
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, source.state_dict()[name], rtol=0, atol=0, msg=name)


def google_arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The arrays of a timm ViT under the names and shapes of Google's .npz files."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    heads, dim = model.blocks[0].attn.num_heads, model.embed_dim
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for index in range(len(model.blocks)):
        ours, theirs = f"blocks.{index}.", f"Transformer/encoderblock_{index}/"
        attention = theirs + "MultiHeadDotProductAttention_1/"
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(part * dim, (part + 1) * dim)
            arrays[f"{attention}{name}/kernel"] = state[ours + "attn.qkv.weight"][rows].T.reshape(
                dim, heads, -1
            )
            arrays[f"{attention}{name}/bias"] = state[ours + "attn.qkv.bias"][rows].reshape(heads, -1)
        arrays[attention + "out/kernel"] = state[ours + "attn.proj.weight"].T.reshape(heads, -1, dim)
        arrays[attention + "out/bias"] = state[ours + "attn.proj.bias"]
        for layer in (0, 1):
            dense = f"{theirs}MlpBlock_3/Dense_{layer}/"
            arrays[dense + "kernel"] = state[f"{ours}mlp.fc{layer + 1}.weight"].T
            arrays[dense + "bias"] = state[f"{ours}mlp.fc{layer + 1}.bias"]
            norm = f"{theirs}LayerNorm_{2 * layer}/"
            arrays[norm + "scale"] = state[f"{ours}norm{layer + 1}.weight"]
            arrays[norm + "bias"] = state[f"{ours}norm{layer + 1}.bias"]
    return arrays


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pth", None, "do not exist"),
        ("bad.pth", b"not weights", "does not hold weights of vit_tiny"),
        ("bad.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!", "does not hold weights"),
        ("bad.npz", b"PK\x03\x04 cut short", "does not hold weights"),
    ],
)
def test_a_damaged_weights_file_is_one_error(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        load_backbone("vit_ti16", weights=str(tmp_path / name), crop_size=32)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(WeightsError, match=r"lacks \d+ tensors of vit_tiny_patch16_224"):
        load_backbone("vit_ti16", weights=str(tmp_path / "resnet.safetensors"), crop_size=32)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    source.norm.weight.data[3] = float("nan")
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"not finite, the first in norm\.weight"):
        load_backbone("vit_ti16", weights=str(tmp_path / "w.safetensors"), crop_size=32)


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError):
        load_backbone("vit_ti16", weights=str(tmp_path / "evil.pth"), crop_size=32)
    assert not (tmp_path / "ran").exists()


def test_without_a_network_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_hub_resolves", lambda: False)
    monkeypatch.setattr(backbones, "_cached", lambda repo: False)
    with pytest.raises(WeightsError, match=r"out of reach.*--weights FILE.*--weights random"):
        load_backbone("vit_ti16")


def test_names_are_resolved_and_wrong_ones_get_a_suggestion() -> None:
    assert timm_id("vit_l16") == "vit_large_patch16_224.augreg_in21k"
    assert timm_id("vit_base_patch16_clip_224.openai") == "vit_base_patch16_clip_224.openai"
    with pytest.raises(ConfigError, match=r"unknown backbone 'vit_l61': did you mean vit_l16\?"):
        timm_id("vit_l61")


@pytest.mark.parametrize("short", backbones.SHORT_NAMES)
def test_every_short_name_stands_for_a_model_with_weights(short: str) -> None:
    config = timm.get_pretrained_cfg(timm_id(short))
    assert config is not None
    assert config.has_weights


def test_bfloat16_features_are_close_to_float32() -> None:
    full, half = (encoder(precision=p).encode(CROPS).numpy() for p in ("float32", "bfloat16"))
    cosine = (full * half).sum(-1) / np.linalg.norm(full, axis=-1) / np.linalg.norm(half, axis=-1)
    assert cosine.min() > 0.999
    assert not np.array_equal(full, half)


@pytest.mark.gpu
def test_the_gpu_gives_the_cpus_vectors() -> None:
    on_gpu = encoder(device="cuda", precision="float32").encode(CROPS).cpu().numpy()
    np.testing.assert_allclose(on_gpu, encoder().encode(CROPS).numpy(), rtol=1e-2, atol=1e-3)
