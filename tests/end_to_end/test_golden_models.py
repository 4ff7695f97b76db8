"""The four models against what the reference implementation computed, from its parameters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from vivit.end_to_end.factorised_encoder import FactorisedEncoder
from vivit.end_to_end.space_time import SpaceTimeTransformer
from vivit.end_to_end.video_models import VideoModel, load_video_model
from vivit.pipeline.checkpoint import Checkpoint
from vivit.pipeline.weights import import_weights

TOKEN_TOLERANCE, LOGIT_TOLERANCE = 3e-5, 2e-5
"""Suggested in ../shared/golden/README.md; a float64 computation differs by at most 6e-6 from the stored values."""


def load(golden: Any, folder: Path, **options: Any) -> tuple[Checkpoint, VideoModel]:
    """The golden parameters through a file in the reference's format, and the importer."""
    tree: dict[str, Any] = {}
    for key in golden:
        if key.startswith("params/"):
            *parents, name = key.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            array = golden[key]
            packed = msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True)
            node[name] = msgpack.ExtType(1, packed)
    (folder / "checkpoint").write_bytes(msgpack.packb(tree))
    size = tuple(json.loads(str(golden["config_json"]))["frame_hw"])
    stored = import_weights(folder / "checkpoint", image_size=size, **options)
    return stored, load_video_model(stored)


def video_of(golden: Any) -> torch.Tensor:
    return torch.from_numpy(golden["video"]).permute(0, 4, 1, 2, 3)


def use_attention(model: torch.nn.Module, kind: str) -> None:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = kind == "sdpa"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["scenic_fe_i", "scenic_fe_ii"])
def test_the_factorised_encoder_computes_what_the_reference_does(
    shared: Callable[[str], Path], tmp_path: Path, name: str, attention: str
) -> None:
    golden = np.load(shared(f"golden/{name}.npz"), allow_pickle=False)
    _, model = load(golden, tmp_path)
    assert isinstance(model, FactorisedEncoder)
    use_attention(model, attention)
    with torch.inference_mode():
        tokens = model.spatial_tokens(video_of(golden))
        vectors, logits = model.temporal(tokens), model(video_of(golden))["action"]
    assert_allclose(tokens, golden["spatial_cls"], rtol=0, atol=TOKEN_TOLERANCE)
    assert_allclose(vectors, golden["temporal_cls"], rtol=0, atol=TOKEN_TOLERANCE)
    assert_allclose(logits, golden["logits"], rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["scenic_model1", "scenic_model3", "scenic_model4"])
def test_the_models_over_all_tokens_compute_what_the_reference_does(
    shared: Callable[[str], Path], tmp_path: Path, name: str, attention: str
) -> None:
    golden = np.load(shared(f"golden/{name}.npz"), allow_pickle=False)
    _, model = load(golden, tmp_path)
    use_attention(model, attention)
    check(model, golden, "encoded_tokens", "logits")


def test_factorised_self_attention_works_in_both_orders(
    shared: Callable[[str], Path], tmp_path: Path
) -> None:
    golden = np.load(shared("golden/scenic_model3.npz"), allow_pickle=False)
    stored, _ = load(golden, tmp_path)
    rest = {**stored.rest, "order": "space_time"}
    turned = load_video_model(
        Checkpoint(
            model=stored.model,
            spatial=stored.spatial,
            rest=rest,
            source=stored.source,
            tensors=stored.tensors,
        )
    )
    check(turned, golden, "encoded_tokens_space_time", "logits_space_time")


def check(model: VideoModel, golden: Any, tokens: str, logits: str) -> None:
    assert isinstance(model, SpaceTimeTransformer)
    with torch.inference_mode():
        found, scores = model.encoded_tokens(video_of(golden)), model(video_of(golden))["action"]
    assert_allclose(found, golden[tokens], rtol=0, atol=TOKEN_TOLERANCE)
    assert_allclose(scores, golden[logits], rtol=0, atol=LOGIT_TOLERANCE)


def test_the_checkpoint_of_the_reference_runs_too(shared: Callable[[str], Path]) -> None:
    golden = np.load(shared("golden/scenic_fe_i.npz"), allow_pickle=False)
    model = load_video_model(import_weights(shared("golden/scenic_fe_i_checkpoint")))
    with torch.inference_mode():
        logits = model(video_of(golden))["action"]
    assert_allclose(logits, golden["logits"], rtol=0, atol=LOGIT_TOLERANCE)
