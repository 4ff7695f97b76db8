"""Optimizer and learning rate."""

import math

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from vivit.stage2_temporal.optimisation import Optimisation

_MOMENTUM = 0.9
_NO_DECAY = ("cls_token", "pos_embed")


def learning_rate(step: int, *, base: float, warmup_steps: float, total_steps: int) -> float:
    """Linear rise from 0 over `warmup_steps`, times a cosine that ends at 0; `step` counts from 0."""
    rise = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    passed = max(0.0, step - warmup_steps) / (total_steps - int(warmup_steps))
    return base * rise * 0.5 * (1 + math.cos(math.pi * passed))


def create_optimizer(model: nn.Module, config: Optimisation) -> Optimizer:
    """AdamW or SGD with momentum, fused where PyTorch has it, for all parameters that are not frozen.

    Set the learning rate before each step.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim <= 1 or name.endswith(_NO_DECAY)
        (free if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    if config.optimizer == "sgd":
        return SGD(groups, lr=config.learning_rate, momentum=_MOMENTUM, fused=fused)
    return AdamW(groups, lr=config.learning_rate, fused=fused)


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def optimizer_tensors(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's memory as `<parameter index>/<name>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}/{name}": value
        for index, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def load_optimizer_tensors(optimizer: Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Give an optimizer the memory that `optimizer_tensors` took out of an equal one."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
