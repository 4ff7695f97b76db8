from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch

from vivit.pipeline.errors import WeightsError
from vivit.pipeline.weights import import_weights

OPTIONS: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0, "patch_size": 8}
Npz = dict[str, npt.NDArray[np.float32]]
Shapes = dict[str, tuple[int, ...]]


def google_arrays(*, dim: int = 24, heads: int = 3, hidden: int = 48, depth: int = 2, grid: int = 4) -> Npz:
    """A random ViT with 5 classes, in the names and shapes of the public .npz files."""
    rng = np.random.default_rng(0)
    attention: Shapes = {f"{name}/kernel": (dim, heads, dim // heads) for name in ("query", "key", "value")}
    attention |= {f"{name}/bias": (heads, dim // heads) for name in ("query", "key", "value")}
    attention |= {"out/kernel": (heads, dim // heads, dim), "out/bias": (dim,)}
    mlp: Shapes = {"Dense_0/kernel": (dim, hidden), "Dense_0/bias": (hidden,)}
    mlp |= {"Dense_1/kernel": (hidden, dim), "Dense_1/bias": (dim,)}
    norm: Shapes = {"scale": (dim,), "bias": (dim,)}
    block: dict[str, Shapes] = {
        "LayerNorm_0": norm,
        "MultiHeadDotProductAttention_1": attention,
        "LayerNorm_2": norm,
        "MlpBlock_3": mlp,
    }
    shapes: Shapes = {
        "cls": (1, 1, dim),
        "embedding/kernel": (8, 8, 3, dim),
        "embedding/bias": (dim,),
        "head/kernel": (dim, 5),
        "head/bias": (5,),
        "pre_logits/kernel": (dim, dim),
        "Transformer/posembed_input/pos_embedding": (1, 1 + grid * grid, dim),
        **{f"Transformer/encoder_norm/{leaf}": shape for leaf, shape in norm.items()},
    }
    for index in range(depth):
        for part, leaves in block.items():
            place = f"Transformer/encoderblock_{index}/{part}"
            shapes |= {f"{place}/{leaf}": shape for leaf, shape in leaves.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(path: Path, arrays: Mapping[str, Any], prefix: str = "") -> Path:
    np.savez(path, allow_pickle=False, **{prefix + name: value for name, value in arrays.items()})
    return path


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_the_tensors_are_those_that_timm_makes_of_the_file(tmp_path: Path, prefix: str) -> None:
    path = write(tmp_path / "ViT.npz", google_arrays(), prefix)
    checkpoint = import_weights(path)
    spatial = checkpoint.spatial
    model: Any = timm.create_model(
        spatial.name, num_classes=0, img_size=spatial.image_size, **spatial.options
    )
    model.load_pretrained(str(path))
    expected = model.state_dict()
    assert checkpoint.model == "image"
    assert checkpoint.tensors.keys() == {f"spatial.{name}" for name in expected}
    for name, value in expected.items():
        assert torch.equal(checkpoint.tensors[f"spatial.{name}"], value), name
    assert spatial.options == OPTIONS
    assert spatial.image_size == (32, 32)
    assert checkpoint.source == "Google ViT weights ViT.npz"
    assert checkpoint.classes == {}


def test_optimizer_state_beside_the_parameters_is_left_alone(tmp_path: Path) -> None:
    arrays = {f"opt/target/{name}": value for name, value in google_arrays().items()}
    state = {f"opt/state/{name}": value + 1 for name, value in google_arrays().items()}
    first = import_weights(write(tmp_path / "a.npz", {**state, **arrays}))
    second = import_weights(write(tmp_path / "b.npz", google_arrays()))
    assert all(torch.equal(first.tensors[name], value) for name, value in second.tensors.items())


def test_more_than_ten_blocks_keep_their_order(tmp_path: Path) -> None:
    arrays = google_arrays(depth=12)
    checkpoint = import_weights(write(tmp_path / "ViT.npz", arrays))
    norm = arrays["Transformer/encoderblock_11/LayerNorm_2/bias"]
    assert checkpoint.spatial.options["depth"] == 12
    np.testing.assert_array_equal(checkpoint.tensors["spatial.blocks.11.norm2.bias"].numpy(), norm)


def test_a_backbone_can_be_named(tmp_path: Path) -> None:
    arrays = google_arrays(dim=192, hidden=768, depth=12, grid=2)
    arrays["embedding/kernel"] = np.zeros((16, 16, 3, 192), np.float32)
    checkpoint = import_weights(write(tmp_path / "Ti.npz", arrays), backbone="vit_ti16")
    assert checkpoint.spatial.name == "vit_tiny_patch16_224.augreg_in21k"
    assert (checkpoint.spatial.options, checkpoint.spatial.image_size) == ({}, (32, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_root/kernel": np.ones((7, 7, 3, 4))}, r"a plain ViT does not have \(conv_root/kernel\)"),
        ({"cls": None}, "lacks the tensor cls"),
        ({"Transformer/encoder_norm/bias": np.ones(5)}, "encoder_norm/bias is 5, not 24"),
        ({"embedding/kernel": np.ones((2, 8, 8, 3, 24))}, "looks at 2 frames at once: it is no image ViT"),
        ({"embedding/kernel": None}, "is an .npz file without a Google ViT .*; it holds cls, "),
    ],
)
def test_a_file_of_another_model_is_an_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arrays = {name: value for name, value in {**google_arrays(), **change}.items() if value is not None}
    with pytest.raises(WeightsError, match=message):
        import_weights(write(tmp_path / "ViT.npz", arrays))
