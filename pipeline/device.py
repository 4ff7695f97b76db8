"""Where a model runs, and in which arithmetic."""

import torch

from vivit.pipeline.errors import ConfigError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """`auto` as a GPU if there is one; ConfigError for what this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}): pass auto, cpu or cuda") from error
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` as bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if name not in PRECISIONS:
        raise ConfigError(f"precision must be auto, {', '.join(PRECISIONS)}, got {name!r}")
    if name == "float16" and device.type == "cpu":
        raise ConfigError("precision float16 needs a GPU: use float32 or bfloat16 on the CPU")
    return name


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Arithmetic of a forward pass: float32, or a shorter type where that is safe."""
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "float32")
