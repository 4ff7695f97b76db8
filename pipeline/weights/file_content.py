"""What lies in a file or folder of published weights, whatever model it is of."""

import argparse
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vivit.pipeline.errors import WeightsError
from vivit.pipeline.weights.msgpack_tree import read_tree

MSGPACK, NPZ, STATE = "msgpack", "npz", "state"
"""A Flax tree, a numpy archive, and a state dict (.safetensors or a PyTorch file)."""
ACCEPTED = (
    "a Scenic msgpack file, a Google ViT .npz, a timm or VideoMAE state dict (.safetensors, .pth, .pt or .bin), "
    "or a Hugging Face folder with config.json"
)
_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "ocdbt.process_0")
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
_NESTED_IN = ("model", "module", "state_dict")
"""Keys that training programs store a state dict under."""


@dataclass(frozen=True)
class Content:
    """The tensors of a file before anything is known about their names."""

    path: Path
    """What the user named."""
    format: str
    """MSGPACK, NPZ or STATE."""
    tree: Mapping[str, Any] = field(repr=False)
    """Nested dicts for MSGPACK, else tensors by name."""
    config: Mapping[str, Any]
    """config.json of the file's folder, empty where there is none."""


def read_content(path: Path) -> Content:
    """The weights in `path`, a file or a Hugging Face folder; WeightsError where there are none that can be read."""
    if not path.exists():
        raise WeightsError(f"{path} does not exist: pass {ACCEPTED}")
    file = _file_in(path) if path.is_dir() else path
    format = _format(file)
    tree = {MSGPACK: read_tree, NPZ: _read_npz, STATE: _read_state}[format](file)
    config = _config(file.parent / "config.json") if format == STATE else {}
    return Content(path, format, tree, config)


def _file_in(folder: Path) -> Path:
    names = {entry.name for entry in folder.iterdir()}
    if names.intersection(_ORBAX):
        raise WeightsError(
            f"{folder} is an Orbax checkpoint, which is a folder that only JAX reads: restore it with Flax, "
            "write it as one file with `flax.serialization.to_bytes`, and import that file"
        )
    for name in _FOLDER_FILES:
        if name in names and "config.json" in names:
            return folder / name
    listed = ", ".join(sorted(names)[:5]) or "nothing"
    raise WeightsError(
        f"{folder} is not a Hugging Face folder (config.json beside {' or '.join(_FOLDER_FILES)}); "
        f"it holds {listed}: pass {ACCEPTED}"
    )


def _format(file: Path) -> str:
    """Format of a file by its first bytes, since Scenic's files have no ending of their own."""
    with file.open("rb") as opened:
        head = opened.read(200)
    if not head:
        raise WeightsError(f"{file} is empty: fetch the file again")
    if head[8:10] == b'{"':
        return STATE
    if head[:2] == b"PK":
        return _zip_format(file)
    if head[:1] == b"\x80":
        return STATE
    if 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):
        return MSGPACK
    raise WeightsError(f"{file} {_looks_like(head)}: pass {ACCEPTED}")


def _zip_format(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise WeightsError(
            f"{file} is damaged or cut short (not a whole zip archive): fetch the file again"
        ) from error
    if any(name.endswith("data.pkl") for name in names):
        return STATE
    if any(name.endswith(".npy") for name in names):
        return NPZ
    raise WeightsError(f"{file} is a zip archive without weights: pass {ACCEPTED}")


def _looks_like(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the weights that it points to (run `git lfs pull`)"
    try:
        text = head.decode()
    except UnicodeDecodeError:
        return f"is of no known format (it begins with the bytes {head[:8].hex(' ')})"
    return f"is a text file that begins with {text[:40]!r}"


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error}): fetch the file again") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} does not describe a model: fetch the file again")
    return config


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise WeightsError(f"{path} is damaged ({_reason(error)}): fetch the file again") from error
    return {name: torch.from_numpy(value) for name, value in arrays.items() if value.dtype.kind in "fiub"}


def _read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name; nested state dicts are found, `module.` of parallel training is taken off."""
    state = _read_safetensors(path) if _is_safetensors(path) else _load_torch(path)
    while nested := next((state[key] for key in _NESTED_IN if isinstance(state.get(key), Mapping)), None):
        state = nested
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(
            f"{path} holds no tensors by name (it holds {_first_names(state)}): pass {ACCEPTED}"
        )
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(10)[8:] == b'{"'


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            if "vivit" in (file.metadata() or {}):
                raise WeightsError(f"{path} was written by vivit already: use it as it is, without an import")
        return safetensors.torch.load_file(path)
    except (SafetensorError, ValueError) as error:
        raise WeightsError(
            f"{path} is damaged or cut short ({_reason(error)}): fetch the file again"
        ) from error


def _load_torch(path: Path) -> Mapping[str, Any]:
    """What a PyTorch file holds, read without running code; settings (`args`) of a training program may be in it."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        KeyError,
        EOFError,
        OSError,
        TypeError,
    ) as error:
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise WeightsError(
                f"{path} asks to run {code[1]}, which weights have no need of, so it was not loaded: "
                "save its state dict alone, as .safetensors, where you trust it"
            ) from error
        raise WeightsError(
            f"{path} is damaged, or not a PyTorch file ({_reason(error)}): fetch the file again"
        ) from error
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds a {type(loaded).__name__} and no tensors by name: pass {ACCEPTED}")
    return loaded


def _first_names(names: Mapping[Any, Any]) -> str:
    return ", ".join(str(name)[:60] for name in list(names)[:3]) or "nothing"


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
