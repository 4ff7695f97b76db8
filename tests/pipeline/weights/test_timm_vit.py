import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from vivit.pipeline.errors import ConfigError, WeightsError
from vivit.pipeline.weights import import_weights

SMALL: dict[str, Any] = {"embed_dim": 192, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0, "patch_size": 16}


def state_of(name: str = "vit_base_patch16_224", **options: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = timm.create_model(name, **options).state_dict()
    return state


def small_state(**options: Any) -> dict[str, Tensor]:
    return state_of(**{**SMALL, "img_size": (32, 32), "num_classes": 5, **options})


def assert_holds(tensors: Any, state: dict[str, Tensor]) -> None:
    kept = {name: value for name, value in state.items() if not name.startswith("head.")}
    assert tensors.keys() == {f"spatial.{name}" for name in kept}
    assert all(torch.equal(tensors[f"spatial.{name}"], value) for name, value in kept.items())


@pytest.mark.parametrize(
    "file", ["a.safetensors", "a.pth", "legacy.pth", "model.pt", "state_dict.bin", "module.pth"]
)
def test_a_plain_vit_is_imported_from_each_kind_of_file(tmp_path: Path, file: str) -> None:
    state, path = small_state(), tmp_path / file
    if file.endswith("safetensors"):
        save_file(state, path)
    elif file == "a.pth":
        torch.save(state, path)
    elif file == "legacy.pth":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif file == "module.pth":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    else:
        torch.save({path.stem: state, "epoch": 3}, path)
    checkpoint = import_weights(path)
    assert checkpoint.model == "image"
    assert checkpoint.spatial.options == SMALL
    assert checkpoint.spatial.image_size == (32, 32)
    assert_holds(checkpoint.tensors, state)
    rebuilt = timm.create_model(
        checkpoint.spatial.name,
        num_classes=0,
        img_size=checkpoint.spatial.image_size,
        **checkpoint.spatial.options,
    )
    rebuilt.load_state_dict(checkpoint.part("spatial."))


def test_a_crop_that_is_not_square_is_asked_for(tmp_path: Path) -> None:
    torch.save(small_state(img_size=(32, 48)), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="6 tokens per frame, which is not a square: pass --image-size"):
        import_weights(tmp_path / "a.pth")
    assert import_weights(tmp_path / "a.pth", image_size=(32, 48)).spatial.image_size == (32, 48)


def test_a_named_backbone_gives_its_build_and_its_pixels(tmp_path: Path) -> None:
    name = "vit_small_patch14_reg4_dinov2.lvd142m"
    state = state_of(name, img_size=28, num_classes=0)
    save_file(state, tmp_path / "dino.safetensors")
    checkpoint = import_weights(tmp_path / "dino.safetensors", backbone="dinov2_s14")
    assert (checkpoint.spatial.name, checkpoint.spatial.options) == (name, {})
    assert checkpoint.spatial.image_size == (28, 28)
    assert checkpoint.spatial.mean == (0.485, 0.456, 0.406)
    assert checkpoint.spatial.interpolation == "bicubic"
    assert_holds(checkpoint.tensors, state)


def test_a_folder_of_timms_hub_says_what_it_is(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    state = state_of(name, img_size=32)
    save_file(state, tmp_path / "model.safetensors")
    config = {"architecture": name, "pretrained_cfg": {"tag": "augreg_in21k"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = import_weights(tmp_path)
    assert checkpoint.spatial.name == f"{name}.augreg_in21k"
    assert_holds(checkpoint.tensors, state)


def test_a_vit_that_is_not_plain_needs_its_backbone(tmp_path: Path) -> None:
    torch.save(state_of("vit_small_patch14_reg4_dinov2", img_size=28, depth=1), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"that a plain ViT does not have .*pass the --backbone"):
        import_weights(tmp_path / "a.pth", image_size=(28, 28))


def test_an_unknown_width_needs_its_backbone(tmp_path: Path) -> None:
    torch.save(small_state(embed_dim=48), tmp_path / "a.pth")
    with pytest.raises(
        WeightsError, match=r"number of attention heads of its 48 channels .*pass the --backbone"
    ):
        import_weights(tmp_path / "a.pth")


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    torch.save(small_state(), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"cls_token is 1 x 1 x 192, not 1 x 1 x 384: pass the --backbone"):
        import_weights(tmp_path / "a.pth", backbone="vit_s16")
    with pytest.raises(WeightsError, match=r"fc1\.weight is 384 x 192, not 768 x 192: pass the"):
        import_weights(tmp_path / "a.pth", backbone="vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match="unknown backbone 'vit_s17': did you mean"):
        import_weights(tmp_path / "a.pth", backbone="vit_s17")
