import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import VivitConfig, VivitForVideoClassification, VivitModel
from transformers.utils import logging

from vivit.pipeline.checkpoint import Checkpoint
from vivit.pipeline.errors import ConfigError, WeightsError
from vivit.pipeline.weights import import_weights

SIZE: dict[str, Any] = {
    "image_size": 32,
    "num_frames": 6,
    "tubelet_size": [2, 16, 16],
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
}


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    yield
    logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def random_model(kind: Any = VivitForVideoClassification, **options: Any) -> Any:
    """A model in which every parameter is random, so that none can be forgotten."""
    torch.manual_seed(0)
    model = kind(VivitConfig(**{**SIZE, "num_labels": 5, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def save(folder: Path, model: Any, **config: Any) -> Path:
    """A folder of `save_pretrained`, with changes to its config.json; None takes an entry away."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


def logits_of(checkpoint: Checkpoint, video: Tensor, run_blocks: Callable[..., Tensor]) -> Tensor:
    """Class scores of a video [batch, frame, channel, height, width], from the imported tensors and timm's blocks."""
    tensors = checkpoint.tensors
    kernel = tensors["patch_embed.proj.weight"]
    tokens = F.conv3d(
        video.transpose(1, 2), kernel, tensors["patch_embed.proj.bias"], stride=kernel.shape[2:]
    )
    tokens = tokens.flatten(2).transpose(1, 2)
    tokens = torch.cat([tensors["cls_token"].expand(len(tokens), -1, -1), tokens], 1) + tensors["pos_embed"]
    tokens = run_blocks(tensors, tokens, options=checkpoint.spatial.options)
    dim = tokens.shape[-1]
    tokens = F.layer_norm(tokens, (dim,), tensors["norm.weight"], tensors["norm.bias"], eps=1e-6)
    return F.linear(tokens[:, 0], tensors["heads.action.weight"], tensors["heads.action.bias"])


@pytest.mark.parametrize(
    ("activation", "image_size"), [("gelu_fast", 32), ("gelu", 32), ("gelu_pytorch_tanh", [32, 48])]
)
def test_an_imported_model_computes_what_transformers_does(
    tmp_path: Path, run_blocks: Callable[..., Tensor], activation: str, image_size: Any
) -> None:
    model = random_model(hidden_act=activation, image_size=image_size)
    checkpoint = import_weights(save(tmp_path, model))
    height, width = checkpoint.spatial.image_size
    video = torch.randn(2, 6, 3, height, width)
    with torch.inference_mode():
        expected, found = model(video).logits, logits_of(checkpoint, video, run_blocks)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert checkpoint.spatial.options.get("act_layer") == (None if activation == "gelu" else "gelu_tanh")


def test_a_folder_says_everything_about_its_model(tmp_path: Path) -> None:
    checkpoint = import_weights(save(tmp_path / "vivit-b", random_model()))
    assert checkpoint.model == "joint"
    assert checkpoint.rest == {
        "time": 3,
        "heads": {"action": 5},
        "pooling": "token",
        "order": "time_space",
        "drop_path": 0.0,
    }
    assert checkpoint.spatial.options == {
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 4,
        "mlp_ratio": 80 / 48,
        "patch_size": 16,
        "act_layer": "gelu_tanh",
    }
    assert (checkpoint.spatial.tubelet, checkpoint.spatial.mean) == (2, (0.5, 0.5, 0.5))
    assert checkpoint.classes == {"action": []}
    assert checkpoint.source == "Hugging Face ViViT vivit-b"


def test_the_file_beside_its_config_and_a_pytorch_file_do_as_well(tmp_path: Path) -> None:
    model = random_model()
    folder = save(tmp_path, model)
    expected = import_weights(folder).tensors
    found = [import_weights(folder / "model.safetensors").tensors]
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found.append(import_weights(folder).tensors)
    for tensors in found:
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def test_class_names_go_with_their_heads(tmp_path: Path) -> None:
    names = dict(enumerate(["run", "jump", "cup", "door", "cat"]))
    save(tmp_path, random_model(id2label=names))
    assert import_weights(tmp_path).classes == {"action": list(names.values())}
    split = import_weights(tmp_path, heads={"verb": 2, "noun": 3})
    assert split.classes == {"verb": ["run", "jump"], "noun": ["cup", "door", "cat"]}
    assert split.rest["heads"] == {"verb": 2, "noun": 3}


def test_a_model_without_a_classifier_has_no_heads(tmp_path: Path) -> None:
    checkpoint = import_weights(save(tmp_path, random_model(VivitModel)))
    assert checkpoint.rest["heads"] == {}
    assert not any("head" in name or "pooler" in name for name in checkpoint.tensors)
    with pytest.raises(
        ConfigError, match=r"gives no classifier that heads could be made of .*: leave --heads out"
    ):
        import_weights(tmp_path, heads={"action": 5})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps 1e-12, and only 1e-06 can be computed"),
        ({"hidden_act": "relu"}, "the activation 'relu', and only gelu, gelu_fast"),
        ({"num_attention_heads": 5}, "num_attention_heads 5, which does not divide them"),
        (
            {"model_type": None},
            "config.json should have the model_type 'vivit', but is not there or does not say it",
        ),
        ({"model_type": "bert"}, "should have the model_type 'vivit', but says 'bert'"),
        ({"image_size": 48}, "12 tokens, .* frames of 48 x 48 pixels"),
        ({"image_size": "large"}, "has the image_size 'large'"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        import_weights(save(tmp_path, random_model(), **config))


def test_a_config_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, random_model())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json is not JSON \(.*\): fetch the file again"):
        import_weights(tmp_path)
