"""Tensors and a few JSON values in one safetensors file that knows its own checksum."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vivit.pipeline.errors import CheckpointError
from vivit.pipeline.workspace import storage_errors, write_atomically

_METADATA_KEY = "vivit"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write the file whole or not at all."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(about)
    # One entry: safetensors writes several in random order, and equal runs would have unequal files.
    metadata = json.dumps({"about": text, "sha256": _digest(stored, text)})
    with storage_errors(path):
        write_atomically(path, safetensors.torch.save(stored, {_METADATA_KEY: metadata}))


def read_tensors(path: Path, *, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON values of a file; CheckpointError with the `remedy` where it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): {remedy}") from error
    if "about" not in metadata or metadata.get("sha256") != _digest(tensors, metadata["about"]):
        raise CheckpointError(f"{path} is damaged (its checksum does not fit its contents): {remedy}")
    about: dict[str, Any] = json.loads(metadata["about"])
    return tensors, about


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
