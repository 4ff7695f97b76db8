from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vivit.pipeline.errors import WeightsError
from vivit.pipeline.weights.msgpack_tree import flattened, read_tree

Encoder = Callable[..., bytes]


def test_arrays_scalars_and_numbers_come_back(tmp_path: Path, to_flax: Encoder) -> None:
    values = {
        name: np.arange(6).reshape(2, 3).astype(name)
        for name in ("float16", "float32", "float64", "int8", "int64", "uint8", "uint32", "bool")
    }
    tree: dict[str, Any] = {
        **values,
        "scalar": np.int32(1234),
        "z": 1 + 2j,
        "text": "a",
        "none": None,
        "empty": {},
    }
    (tmp_path / "file").write_bytes(to_flax({**tree, "nothing": np.zeros((0, 3), np.float32)}))
    found = read_tree(tmp_path / "file")
    for name, value in values.items():
        assert found[name].dtype == getattr(torch, name)
        np.testing.assert_array_equal(found[name].numpy(), value)
    assert found["scalar"].shape == ()
    assert int(found["scalar"]) == 1234
    assert found["nothing"].shape == (0, 3)
    assert (found["z"], found["text"], found["none"], found["empty"]) == (1 + 2j, "a", None, {})


def test_bfloat16_comes_back_bit_for_bit(tmp_path: Path, to_flax: Encoder) -> None:
    value = torch.randn(3, 5).bfloat16()
    (tmp_path / "file").write_bytes(to_flax({"a": value, "s": torch.tensor(2.5).bfloat16()}))
    found = read_tree(tmp_path / "file")
    assert found["a"].dtype == torch.bfloat16
    assert torch.equal(found["a"], value)
    assert float(found["s"]) == 2.5


def test_arrays_in_pieces_are_made_whole(tmp_path: Path, to_flax: Encoder) -> None:
    value = (
        np.random.default_rng(0).normal(size=(7, 11, 3)).astype(np.float32)
    )  # in 12 pieces: "10" after "9"
    (tmp_path / "file").write_bytes(to_flax({"deep": {"a": value}, "b": value[0, 0]}, chunk_bytes=80))
    assert len((tmp_path / "file").read_bytes().split(b"__msgpack_chunked_array__")) == 2
    found = read_tree(tmp_path / "file")
    np.testing.assert_array_equal(found["deep"]["a"].numpy(), value)
    np.testing.assert_array_equal(found["b"].numpy(), value[0, 0])


def test_tuples_stay_maps(tmp_path: Path, to_flax: Encoder) -> None:
    (tmp_path / "file").write_bytes(to_flax({"a": ({"b": np.ones(1)}, np.zeros(2))}))
    assert set(flattened(read_tree(tmp_path / "file"))) == {"a/0/b", "a/1"}


def test_optimizer_state_is_not_read(tmp_path: Path, to_flax: Encoder) -> None:
    array = np.ones(3)
    tree = {
        "optimizer": {"state": {"param_states": array}, "target": {"a": array}},
        "opt_state": {"0": array},
        "params": {"opt_state": array},
    }
    (tmp_path / "file").write_bytes(to_flax(tree))
    assert set(flattened(read_tree(tmp_path / "file"))) == {"optimizer/target/a", "params/opt_state"}


@pytest.mark.parametrize("at", [1, 20, 60, 100])
def test_a_file_that_is_cut_short_is_an_error(tmp_path: Path, to_flax: Encoder, at: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(to_flax({"opt_state": {"a": np.ones(5)}, "params": np.ones(5)})[:at])
    with pytest.raises(WeightsError, match=rf"file is cut short: .* its {at} bytes\. Fetch the file again"):
        read_tree(path)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (b"\x81\xa1a\xc7\x01\x09\x00", "extension type 9"),
        (b"\x81\xa1a\xc7\x0d\x01\x93\x91\x03\xa7float32\xc4\x00", "0 bytes for an array of shape"),
        (b"\x81\xa1a\xc7\x0b\x01\x93\x91\x00\xa6object\xa0", "arrays of type 'object'"),
        (b"\x81\x01\x02", "a key that is not text, '1'"),
        (b"\x81\xa1a\xc1", "damaged"),
        (b"\x81\xa1a\x01more", "4 bytes after its end"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
        (b"\x81\xa1a\x81\xb9__msgpack_chunked_array__\xc3", "in pieces without shape"),
        (b"\x93\x01\x02\x03", "damaged"),
    ],
)
def test_a_damaged_file_is_an_error(tmp_path: Path, damaged: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(damaged)
    with pytest.raises(WeightsError, match=message):
        read_tree(tmp_path / "file")
