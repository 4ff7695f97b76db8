"""Flax's msgpack files without Flax: nested dicts of tensors.

The format is that of `flax.serialization.to_bytes`: maps with text keys, and arrays as extension types whose payload is
again msgpack. Tuples and lists stay maps with the keys "0", "1", ...
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import torch
from torch import Tensor

from vivit.pipeline.errors import WeightsError

_NDARRAY, _COMPLEX, _SCALAR = 1, 2, 3
"""Extension types."""
_CHUNKED = "__msgpack_chunked_array__"
"""Key that marks a map as an array in pieces, which arrays above 2^30 bytes are stored as."""
_OPTIMIZER_STATE = {("opt_state",), ("optimizer", "state")}
"""Maps that nothing is imported from: as large as the parameters, and with their names."""
_WALKED = {(), ("optimizer",)}
"""Maps that are read entry by entry, so that optimizer state is passed over and never in memory."""
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("bfloat16", "float16", "float32", "float64", "complex64", "complex128", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
}
_MAX_ARRAY_LENGTH = 1024
"""Longest plain msgpack array; Flax writes none, and a damaged length would take the machine's memory."""


def read_tree(path: Path) -> dict[str, Any]:
    """The file as nested dicts: arrays become tensors of their own dtype, numpy scalars tensors without dimensions.

    Optimizer state (`opt_state`, `optimizer/state`) is left out. WeightsError where the file is damaged or cut short.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            unpacker = msgpack.Unpacker(
                file, ext_hook=_extension, max_buffer_size=0, max_array_len=_MAX_ARRAY_LENGTH
            )
            tree: dict[str, Any] = _joined(dict(_entries(unpacker, ())))
            end = unpacker.tell()
    except msgpack.OutOfData as error:
        raise WeightsError(
            f"{path} is cut short: its msgpack data does not end within its {size} bytes. Fetch the file again"
        ) from error
    except (msgpack.UnpackException, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise WeightsError(
            f"{path} is damaged, or not a msgpack file of Flax ({_reason(error)}): fetch the file again"
        ) from error
    if end != size:
        raise WeightsError(
            f"{path} is damaged, or not a msgpack file of Flax ({size - end} bytes after its end): "
            "fetch the file again"
        )
    return tree


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a tree by their path, joined with `/`; what is not a tensor is left out."""
    found: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flattened(value, f"{prefix}{key}/")
        elif isinstance(value, Tensor):
            found[prefix + key] = value
    return found


def _entries(unpacker: Any, at: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The entries of the map that comes next, which stands at the path `at`."""
    for _ in range(unpacker.read_map_header()):
        key = unpacker.unpack()
        if not isinstance(key, str):
            raise TypeError(f"a key that is not text, {str(key)[:40]!r}")
        inner = (*at, key)
        if inner in _OPTIMIZER_STATE:
            unpacker.skip()
        elif inner in _WALKED:
            yield key, dict(_entries(unpacker, inner))
        else:
            yield key, unpacker.unpack()


def _extension(code: int, payload: bytes) -> Any:
    if code == _NDARRAY:
        return _array(payload)
    if code == _SCALAR:
        return _array(payload).reshape(())
    if code == _COMPLEX:
        return complex(*msgpack.unpackb(payload))
    raise ValueError(f"extension type {code}")


def _array(payload: bytes) -> Tensor:
    """The array of a payload (shape, name of the dtype, values in C order)."""
    shape, name, values = msgpack.unpackb(payload, raw=True)
    dtype = _DTYPES.get(name.decode())
    if dtype is None:
        raise ValueError(f"arrays of type {name.decode()!r}")
    if len(values) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(values)} bytes for an array of shape {shape} and type {name.decode()}")
    # A bytearray, since the memory of a tensor must be writable; torch takes none that is empty.
    flat = torch.frombuffer(bytearray(values), dtype=dtype) if values else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


def _joined(tree: Any) -> Any:
    """The tree with every array that is stored in pieces made whole."""
    if not isinstance(tree, dict):
        return tree
    if _CHUNKED not in tree:
        return {key: _joined(value) for key, value in tree.items()}
    if not isinstance(tree.get("shape"), dict) or not isinstance(tree.get("chunks"), dict):
        raise TypeError("an array in pieces without shape or chunks")
    pieces, shape = _in_order(tree["chunks"]), _in_order(tree["shape"])
    return torch.cat(pieces).reshape(shape)


def _in_order(values: dict[str, Any]) -> list[Any]:
    """The tuple that was stored as a map with the keys "0", "1", ..."""
    return [values[key] for key in sorted(values, key=int)]


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
