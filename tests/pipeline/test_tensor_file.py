from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vivit.pipeline.errors import CheckpointError
from vivit.pipeline.tensor_file import read_tensors, write_tensors

TENSORS = {
    "matrix": torch.randn(3, 4),
    "transposed": torch.randn(5, 2).T,
    "half": torch.randn(7).bfloat16(),
    "scalar": torch.tensor(3.0),
    "count": torch.tensor([1, 2]),
    "empty": torch.zeros(0, 4),
}


def test_tensors_and_values_come_back_equal(tmp_path: Path) -> None:
    about = {"step": 3, "loss": 0.1 + 0.2, "history": [{"score": 0.5}], "none": None}
    write_tensors(tmp_path / "deep" / "file", TENSORS, about)
    tensors, found = read_tensors(tmp_path / "deep" / "file", remedy="")
    assert found == about
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert torch.equal(tensors[name], value)
        assert tensors[name].dtype == value.dtype
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


@given(data=st.data())
def test_no_damage_goes_unnoticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    write_tensors(path, TENSORS, {"step": 3})
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1), label="byte")
    damaged = bytearray(whole)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    path.write_bytes(damaged if data.draw(st.booleans(), label="flip or cut") else whole[:at])
    with pytest.raises(CheckpointError, match=r"is damaged.*: mend it"):
        read_tensors(path, remedy="mend it")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist: make it"):
        read_tensors(tmp_path / "nothing", remedy="make it")


def test_a_file_of_another_program_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "file")
    with pytest.raises(CheckpointError, match="was not written by vivit"):
        read_tensors(tmp_path / "file", remedy="")
