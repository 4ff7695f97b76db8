"""The temporal half and the accuracies against what the reference implementations computed."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vivit.pipeline.checkpoint import Checkpoint, SpatialConfig
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.init_source import read_source
from vivit.stage2_temporal.initialisation import initialise
from vivit.stage2_temporal.metrics import action_in_top, correct_in_top
from vivit.stage2_temporal.model import ModelConfig, TemporalModel

ENCODER = "TemporalTransformer/"
TOKEN_TOLERANCE, LOGIT_TOLERANCE = 3e-5, 2e-5
"""Suggested in ../shared/golden/README.md; float32 PyTorch differs by at most 6e-6 from the stored values."""


@pytest.mark.parametrize("name", ["scenic_fe_i", "scenic_fe_ii"])
def test_the_temporal_half_computes_what_the_reference_does(shared: Callable[[str], Path], name: str) -> None:
    golden = np.load(shared(f"golden/{name}.npz"), allow_pickle=False)
    parameters = {key[7:]: torch.from_numpy(golden[key]) for key in golden if key.startswith("params/")}
    tokens = torch.from_numpy(golden["spatial_cls"])
    model = _model(parameters, tokens)
    with torch.no_grad():
        vectors, logits = model.temporal(tokens), model(tokens)["any"]
    np.testing.assert_allclose(vectors, golden["temporal_cls"], rtol=0, atol=TOKEN_TOLERANCE)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("kind", ["model file", "the reference's own file"])
def test_a_training_that_starts_from_the_reference_is_the_reference(
    shared: Callable[[str], Path], make_cache: Any, tmp_path: Path, kind: str
) -> None:
    golden = np.load(shared("golden/scenic_fe_i.npz"), allow_pickle=False)
    parameters = {key[7:]: torch.from_numpy(golden[key]) for key in golden if key.startswith("params/")}
    tokens = torch.from_numpy(golden["spatial_cls"])
    reference = _model(parameters, tokens)
    path, head = shared("golden/scenic_fe_i_checkpoint"), "action"
    if kind == "model file":
        path, head = tmp_path / "fe.safetensors", "any"
        Checkpoint(
            model="fe",
            spatial=SpatialConfig(name="vit_base_patch16_224", tubelet=2),
            rest=reference.config.to_dict(),
            source="golden",
            tensors=reference.state_dict(),
        ).write(path)
    features = golden["spatial_cls"][:, None]
    cache = make_cache({"train": (features, {head: [0, 1]})}, classes={head: 11}, num_frames=8)
    config = TrainConfig(cache=cache.path, run=tmp_path / "run", init=str(path))
    model = TemporalModel(config.temporal_model(dim=48, time=4, heads={head: 11})).eval()
    initialise(model, read_source(config.init, cache.settings), cache.manifest.heads)
    with torch.no_grad():
        vectors, logits = model.temporal(model.adapter(tokens)), model(tokens)[head]
    np.testing.assert_allclose(vectors, golden["temporal_cls"], rtol=0, atol=TOKEN_TOLERANCE)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=LOGIT_TOLERANCE)


def _model(parameters: dict[str, Tensor], tokens: Tensor) -> TemporalModel:
    """The model with the reference's parameters."""
    block = f"{ENCODER}encoderblock_0/"
    query, hidden = (
        parameters[block + key]
        for key in ("MultiHeadDotProductAttention_0/query/kernel", "MlpBlock_0/Dense_0/kernel")
    )
    config = ModelConfig(
        dim=tokens.shape[2],
        time=tokens.shape[1],
        heads={"any": parameters["output_projection/bias"].shape[0]},
        adapter="none",
        depth=len({key.split("/")[1] for key in parameters if key.startswith(f"{ENCODER}encoderblock_")}),
        num_heads=query.shape[1],
        mlp_ratio=hidden.shape[1] / hidden.shape[0],
    )
    state = {
        "temporal.cls_token": parameters["cls_TemporalTransformer"],
        "temporal.pos_embed": parameters[f"{ENCODER}posembed_input/pos_embedding"],
        "temporal.norm.weight": parameters[f"{ENCODER}encoder_norm/scale"],
        "temporal.norm.bias": parameters[f"{ENCODER}encoder_norm/bias"],
        "heads.any.weight": parameters["output_projection/kernel"].T,
        "heads.any.bias": parameters["output_projection/bias"],
    }
    for index in range(config.depth):
        state |= _block_state(parameters, f"{ENCODER}encoderblock_{index}/", f"temporal.blocks.{index}.")
    model = TemporalModel(config).eval()
    model.load_state_dict(state)
    return model


def _block_state(parameters: dict[str, Tensor], there: str, here: str) -> dict[str, Tensor]:
    attention = f"{there}MultiHeadDotProductAttention_0/"
    dim = parameters[f"{there}LayerNorm_0/scale"].shape[0]
    kernels = [
        parameters[f"{attention}{part}/kernel"].reshape(dim, dim).T for part in ("query", "key", "value")
    ]
    biases = [parameters[f"{attention}{part}/bias"].reshape(dim) for part in ("query", "key", "value")]
    state = {
        f"{here}attn.qkv.weight": torch.cat(kernels),
        f"{here}attn.qkv.bias": torch.cat(biases),
        f"{here}attn.proj.weight": parameters[f"{attention}out/kernel"].reshape(dim, dim).T,
        f"{here}attn.proj.bias": parameters[f"{attention}out/bias"],
    }
    for index in (0, 1):
        norm, dense = f"{there}LayerNorm_{index}/", f"{there}MlpBlock_0/Dense_{index}/"
        state |= {
            f"{here}norm{index + 1}.weight": parameters[f"{norm}scale"],
            f"{here}norm{index + 1}.bias": parameters[f"{norm}bias"],
            f"{here}mlp.fc{index + 1}.weight": parameters[f"{dense}kernel"].T,
            f"{here}mlp.fc{index + 1}.bias": parameters[f"{dense}bias"],
        }
    return state


def test_accuracies_are_those_of_the_official_epic_kitchens_evaluation(shared: Callable[[str], Path]) -> None:
    golden = np.load(shared("golden/ek100_metrics.npz"), allow_pickle=False)
    expected = json.loads(shared("golden/ek100_metrics.json").read_text())["metrics"]
    annotations = shared("annotations/epic-kitchens-100/EPIC_100_validation.csv")
    with annotations.open(newline="") as file:
        rows = {row["narration_id"]: row for row in csv.DictReader(file)}
    verbs, nouns = (
        np.array([int(rows[clip][f"{head}_class"]) for clip in golden["narration_id"]])
        for head in ("verb", "noun")
    )
    verb, noun = golden["verb_output"], golden["noun_output"]
    for k in (1, 5):
        found = {
            "verb": correct_in_top(k, verb, verbs),
            "noun": correct_in_top(k, noun, nouns),
            "action": action_in_top(k, verb, noun, verbs, nouns),
        }
        for head, correct in found.items():
            assert 100 * correct.mean() == pytest.approx(expected[f"all_{head}_accuracy_at_{k}"], abs=1e-6)
