import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from vivit.pipeline.errors import WeightsError
from vivit.pipeline.weights import import_weights

DIM, DEPTH, HIDDEN = 192, 2, 384


def blocks(*, dim: int = DIM) -> dict[str, Tensor]:
    """Random blocks in timm's names, in which the keys have no bias, as VideoMAE's have none."""
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_base_patch16_224", embed_dim=dim, depth=DEPTH, num_heads=3, mlp_ratio=HIDDEN / DIM, num_classes=0
    )
    state = {name: torch.randn_like(v) for name, v in vit.state_dict().items() if name.startswith("blocks.")}
    for index in range(DEPTH):
        state[f"blocks.{index}.attn.qkv.bias"][dim : 2 * dim] = 0
    return state


def videomae(state: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """The state dict of VideoMAE's own code around these blocks."""
    found = {}
    for name, value in state.items():
        if name.endswith("attn.qkv.bias"):
            place = prefix + name.removesuffix("qkv.bias")
            found[f"{place}q_bias"], _, found[f"{place}v_bias"] = (part.clone() for part in value.chunk(3))
        else:
            found[prefix + name] = value
    dim = len(state["blocks.0.norm1.weight"])
    found[f"{prefix}patch_embed.proj.weight"] = torch.randn(dim, 3, 2, 16, 16)
    found[f"{prefix}patch_embed.proj.bias"] = torch.randn(dim)
    others = [
        "encoder.norm.weight",
        "decoder.blocks.0.norm1.weight",
        "mask_token",
        "encoder_to_decoder.weight",
    ]
    extra = others if prefix else ["fc_norm.weight", "head.weight", "head.bias"]
    return {**found, **{name: torch.randn(3) for name in extra}}


FILES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "pretrained": lambda state: {
        "model": videomae(state, "encoder."),
        "optimizer": {"state": {0: torch.zeros(2)}},
        "epoch": 1,
        "args": argparse.Namespace(lr=0.1),
    },
    "fine-tuned": lambda state: {"model": videomae(state, "")},
    "DeepSpeed": lambda state: {"module": videomae(state, ""), "mp_world_size": 1},
    "bare": lambda state: videomae(state, ""),
}


@pytest.mark.parametrize("kind", list(FILES))
def test_the_blocks_of_every_kind_of_file_are_imported(tmp_path: Path, kind: str) -> None:
    expected = blocks()
    torch.save(FILES[kind](expected), tmp_path / "checkpoint.pth")
    checkpoint = import_weights(tmp_path / "checkpoint.pth")
    assert checkpoint.model == "blocks"
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.tensors[name], value) for name, value in expected.items())
    assert checkpoint.spatial.options == {
        "embed_dim": DIM,
        "depth": DEPTH,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "patch_size": 16,
        "act_layer": "gelu",
    }
    assert checkpoint.spatial.tubelet == 2
    assert checkpoint.spatial.mean == (0.485, 0.456, 0.406)
    assert checkpoint.source == "VideoMAE blocks of checkpoint.pth"


@pytest.mark.parametrize("classifier", [True, False], ids=["classifier", "pre-training"])
def test_a_hugging_face_videomae_is_imported_to_the_same_computation(
    tmp_path: Path, run_blocks: Callable[..., Tensor], classifier: bool
) -> None:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification
    from transformers.utils import logging

    config = VideoMAEConfig(
        image_size=32,
        num_frames=4,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        decoder_num_hidden_layers=1,
    )
    kind: Any = VideoMAEForVideoClassification if classifier else VideoMAEForPreTraining
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(tmp_path)
    checkpoint = import_weights(tmp_path)
    options = checkpoint.spatial.options
    assert (checkpoint.model, options["num_heads"], options["depth"]) == ("blocks", 4, 2)
    tokens = torch.randn(2, 8, 48)
    with torch.inference_mode():
        expected = model.videomae.encoder(tokens).last_hidden_state
        found = run_blocks(checkpoint.tensors, tokens, options=options, eps=config.layer_norm_eps)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_an_unknown_width_needs_its_backbone(tmp_path: Path) -> None:
    torch.save(videomae(blocks(dim=48), "encoder."), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"attention heads of its 48 channels .*: pass the --backbone"):
        import_weights(tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"has 48 channels, but vit_tiny_patch16_224.* has 192"):
        import_weights(tmp_path / "a.pth", backbone="vit_ti16")


def test_a_backbone_gives_the_number_of_heads(tmp_path: Path) -> None:
    torch.save(videomae(blocks(), "encoder."), tmp_path / "a.pth")
    checkpoint = import_weights(tmp_path / "a.pth", backbone="vit_ti16")
    assert checkpoint.spatial.options["num_heads"] == 3


def test_blocks_with_more_than_videomae_has_are_refused(tmp_path: Path) -> None:
    state = {**videomae(blocks(), ""), "blocks.1.gamma_1": torch.ones(DIM)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(
        WeightsError, match=r"has blocks with blocks\.1\.gamma_1, which VideoMAE's do not have"
    ):
        import_weights(tmp_path / "a.pth")


def test_another_state_dict_is_no_videomae(tmp_path: Path) -> None:
    torch.save(blocks(), tmp_path / "a.pth")
    with pytest.raises(
        WeightsError, match=r"has no tubelet embedding of VideoMAE .*; it holds blocks.0.norm1.weight"
    ):
        import_weights(tmp_path / "a.pth", kind="videomae")
