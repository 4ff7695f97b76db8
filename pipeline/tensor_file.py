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
    metadata = _metadata(path, remedy)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}): {remedy}") from error
    if metadata.get("sha256") != _digest(tensors, metadata["about"]):
        raise CheckpointError(f"{path} is damaged (its checksum does not fit its contents): {remedy}")
    about: dict[str, Any] = json.loads(metadata["about"])
    return tensors, about


def read_about(path: Path) -> dict[str, Any]:
    """The JSON values of a file, without its tensors and unchecked; CheckpointError where it has none."""
    remedy = "pass another file"
    try:
        about: dict[str, Any] = json.loads(_metadata(path, remedy)["about"])
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}): {remedy}") from error
    return about


def _metadata(path: Path, remedy: str) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get(_METADATA_KEY)
        metadata = {} if stored is None else json.loads(stored)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): {remedy}") from error
    if stored is None:
        raise CheckpointError(f"{path} was not written by vivit, or is damaged: {remedy}")
    if not isinstance(metadata, dict) or "about" not in metadata:
        raise CheckpointError(f"{path} is damaged (it does not describe itself): {remedy}")
    return metadata


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
