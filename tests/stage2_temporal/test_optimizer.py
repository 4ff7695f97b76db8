from pathlib import Path
from typing import Any

import pytest
import torch

from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.model import ModelConfig, TemporalModel
from vivit.stage2_temporal.optimizer import create_optimizer, learning_rate

KINETICS_B: dict[str, Any] = {"base": 0.05, "warmup_steps": 8390, "total_steps": 100680}


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (4195, 0.025), (8390, 0.05), (54535, 0.025), (100680, 0.0)]
)
def test_the_schedule_is_the_reference(step: int, expected: float) -> None:
    assert learning_rate(step, **KINETICS_B) == pytest.approx(expected, abs=1e-12)


def test_a_warm_up_may_end_between_two_steps() -> None:
    at: dict[str, Any] = {"base": 0.1, "warmup_steps": 14187.5, "total_steps": 170250}
    assert learning_rate(14187, **at) == pytest.approx(0.1 * 14187 / 14187.5)
    assert learning_rate(14188, **at) < 0.1
    assert learning_rate(0, base=0.1, warmup_steps=0, total_steps=10) == 0.1


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_only_matrices_decay(name: str) -> None:
    model = TemporalModel(ModelConfig(dim=8, time=2, heads={"verb": 3}, depth=1))
    config = TrainConfig(cache=Path("c"), run=Path("r"), optimizer=name, weight_decay=0.3)
    optimizer = create_optimizer(model, config)
    decay = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    decayed = {key for key, parameter in model.named_parameters() if decay[id(parameter)] == 0.3}
    assert decayed == {
        *(f"temporal.blocks.0.{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        *("adapter.down.weight", "adapter.up.weight", "heads.verb.weight"),
    }
    assert all(group["fused"] for group in optimizer.param_groups)


def test_sgd_is_the_reference_rule() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    config = TrainConfig(cache=Path("c"), run=Path("r"), optimizer="sgd", weight_decay=0, learning_rate=0.1)
    optimizer = create_optimizer(model, config)
    weight, velocity = model.weight.detach().clone(), torch.zeros(1, 2)
    for gradient in (torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 0.5]])):
        model.weight.grad = gradient.clone()
        optimizer.step()
        velocity = 0.9 * velocity + gradient
        weight = weight - 0.1 * velocity
        torch.testing.assert_close(model.weight.detach(), weight)
