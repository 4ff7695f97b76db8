"""What the processes of a data-parallel training (torchrun) agree on; in a single process each of these is trivial."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vivit.pipeline.device import resolve_device


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if _is_parallel() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _is_parallel() else 1


def summed(values: Tensor) -> Tensor:
    """The sum over all processes of tensors of one shape."""
    if _is_parallel():
        dist.all_reduce(values)
    return values


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in any process, so that all of them stop at the same step."""
    if not _is_parallel():
        return flag
    return bool(summed(torch.tensor(float(flag), device=device)).item())


def gathered(value: Any) -> list[Any]:
    """The objects of all processes, in their order."""
    if not _is_parallel():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    if _is_parallel():
        dist.barrier()


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def own_device(name: str) -> torch.device:
    """The device that `name` stands for; of the GPUs of a machine, the one that torchrun meant for this process.

    Collectives and pinned memory use the current device, so that is set too, before anything touches another GPU.
    """
    local = os.environ.get("LOCAL_RANK")
    if local is None or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return resolve_device(name)
    device = torch.device("cuda", int(local))
    torch.cuda.set_device(device)
    return device


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _is_parallel() -> bool:
    return dist.is_available() and dist.is_initialized()
