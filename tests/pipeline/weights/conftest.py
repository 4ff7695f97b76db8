"""Flax files and transformer blocks, written here once more and independently of the importer."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

Arrays = dict[str, npt.NDArray[Any]]


def flax_bytes(tree: Any, *, chunk_bytes: int = 1 << 30) -> bytes:
    """What `flax.serialization.to_bytes` writes of a tree of numpy arrays and bfloat16 tensors."""
    packed: bytes = msgpack.packb(_chunked(tree, chunk_bytes), default=_extension, strict_types=True)
    return packed


def _extension(value: Any) -> msgpack.ExtType:
    if isinstance(value, Tensor):
        payload = (tuple(value.shape), "bfloat16", value.reshape(-1).view(torch.uint8).numpy().tobytes())
        return msgpack.ExtType(1, msgpack.packb(payload))
    if isinstance(value, complex):
        return msgpack.ExtType(2, msgpack.packb((value.real, value.imag)))
    payload = (value.shape, value.dtype.name, value.tobytes())
    return msgpack.ExtType(3 if isinstance(value, np.generic) else 1, msgpack.packb(payload))


def _chunked(tree: Any, chunk_bytes: int) -> Any:
    if isinstance(tree, dict):
        return {key: _chunked(value, chunk_bytes) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return {str(index): _chunked(value, chunk_bytes) for index, value in enumerate(tree)}
    if not isinstance(tree, np.ndarray) or tree.nbytes <= chunk_bytes:
        return tree
    flat, step = tree.reshape(-1), max(1, chunk_bytes // tree.itemsize)
    pieces = tuple(flat[start : start + step] for start in range(0, len(flat), step))
    return {
        "__msgpack_chunked_array__": True,
        "shape": _chunked(tree.shape, chunk_bytes),
        "chunks": _chunked(pieces, chunk_bytes),
    }


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of arrays that are named by their paths."""
    tree: dict[str, Any] = {}
    for name, value in arrays.items():
        *folders, leaf = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = value
    return tree


class Golden:
    """One of `shared/golden/scenic_*.npz`."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        self.params: Arrays = {
            name.removeprefix("params/"): value
            for name, value in arrays.items()
            if name.startswith("params/")
        }
        self.config: dict[str, Any] = json.loads(str(arrays["config_json"]))
        self._arrays = arrays

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self._arrays[name])

    def write(self, path: Path) -> Path:
        """A Scenic checkpoint with the parameters."""
        path.write_bytes(flax_bytes({"global_step": np.int32(7), "params": nested(self.params)}))
        return path


@pytest.fixture(scope="session")
def golden(shared: Callable[[str], Path]) -> Callable[[str], Golden]:
    """A function that gives a golden model by its name: `fe_i`, `model1`, ..."""
    return lambda name: Golden(shared(f"golden/scenic_{name}.npz"))


@pytest.fixture(scope="session")
def to_flax() -> Callable[..., bytes]:
    return flax_bytes


@pytest.fixture(scope="session")
def to_tree() -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    return nested


@pytest.fixture(scope="session")
def run_blocks() -> Callable[..., Tensor]:
    """A function that runs timm blocks with `tensors` (`blocks.*`) on tokens [batch, token, dim]."""

    def run(
        tensors: Mapping[str, Tensor], tokens: Tensor, *, options: Mapping[str, Any], eps: float = 1e-6
    ) -> Tensor:
        approximate = "tanh" if options.get("act_layer") == "gelu_tanh" else "none"
        blocks = nn.Sequential(
            *(
                Block(
                    options["embed_dim"],
                    options["num_heads"],
                    mlp_ratio=options["mlp_ratio"],
                    qkv_bias=True,
                    norm_layer=partial(nn.LayerNorm, eps=eps),  # type: ignore[arg-type]
                    act_layer=partial(nn.GELU, approximate=approximate),  # type: ignore[arg-type]
                )
                for _ in range(options["depth"])
            )
        )
        state = {k.removeprefix("blocks."): v for k, v in tensors.items() if k.startswith("blocks.")}
        blocks.load_state_dict(state)
        output: Tensor = blocks(tokens)
        return output

    return run
