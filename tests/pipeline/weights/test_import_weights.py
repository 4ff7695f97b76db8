"""What holds for every kind of weights: detection, refused files, heads."""

import contextlib
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vivit.pipeline.checkpoint import Checkpoint
from vivit.pipeline.errors import ConfigError, WeightsError
from vivit.pipeline.weights import KINDS, import_weights

FE = "golden/scenic_fe_i_checkpoint"
Shared = Callable[[str], Path]


def test_the_kinds_are_these() -> None:
    assert KINDS == ("scenic", "google", "timm", "huggingface", "videomae")


def test_the_one_classifier_is_split_in_the_order_of_the_heads(shared: Shared) -> None:
    whole = import_weights(shared(FE))
    split = import_weights(shared(FE), heads={"noun": 8, "verb": 3})
    for leaf in ("weight", "bias"):
        parts = [split.tensors[f"heads.{head}.{leaf}"] for head in ("noun", "verb")]
        assert [len(part) for part in parts] == [8, 3]
        assert torch.equal(torch.cat(parts), whole.tensors[f"heads.action.{leaf}"])
    assert split.rest["heads"] == {"noun": 8, "verb": 3}
    assert split.classes == {"noun": [], "verb": []}
    assert "heads.action.weight" not in split.tensors


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        (
            {"noun": 300, "verb": 97},
            WeightsError,
            r"a classifier of 11 classes, but the heads noun 300 \+ verb 97 make 397: pass --heads with 11 classes",
        ),
        ({}, WeightsError, "a classifier of 11 classes, but the heads  make 0"),
        ({"a": 12, "b": -1}, ConfigError, "head b must have at least 1 class, got -1"),
        ({"a.b": 11}, ConfigError, "a head cannot be called 'a.b'"),
    ],
)
def test_heads_that_do_not_fit_are_an_error(
    shared: Shared, heads: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        import_weights(shared(FE), heads=heads)


def test_options_without_such_a_value_are_errors(shared: Shared) -> None:
    with pytest.raises(ConfigError, match="unknown kind of weights 'senic': did you mean scenic"):
        import_weights(shared(FE), kind="senic")
    with pytest.raises(ConfigError, match="unknown model 'joined': did you mean joint"):
        import_weights(shared(FE), model="joined")
    with pytest.raises(ConfigError, match="at least 1 x 1 pixels, got 0 x 224"):
        import_weights(shared(FE), image_size=(0, 224))
    with pytest.raises(
        ConfigError, match="scenic weights tell what they are built of: leave --backbone vit_b16"
    ):
        import_weights(shared(FE), backbone="vit_b16")
    with pytest.raises(WeightsError, match="is a msgpack file, and timm weights come in a state dict"):
        import_weights(shared(FE), kind="timm")


def orbax(path: Path) -> None:
    (path / "d").mkdir(parents=True)
    (path / "_METADATA").write_text("{}")
    (path / "manifest.ocdbt").write_bytes(b"\x0c")


def folder(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")


class Code:
    """Unpickled with its code, this would make a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return (os.mkdir, ("ran",))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "does not exist: pass a Scenic msgpack file, a Google ViT .npz"),
    "empty": (lambda path: path.write_bytes(b""), "is empty: fetch the file again"),
    "text": (
        lambda path: path.write_text("Not found"),
        "is a text file that begins with 'Not found': pass a Scenic",
    ),
    "lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00"),
        "is a Git LFS pointer and not the weights that it points to",
    ),
    "bytes": (lambda path: path.write_bytes(b"\xff\xfe\x00\x01"), "begins with the bytes ff fe 00 01"),
    "orbax": (orbax, "is an Orbax checkpoint, .* restore it with Flax, .*flax.serialization.to_bytes"),
    "folder": (folder, r"is not a Hugging Face folder \(.*\); it holds config.json: pass"),
    "zip": (archive, "is a zip archive without weights"),
    "code": (
        lambda path: torch.save({"model": Code()}, path),
        "asks to run posix.mkdir, .* so it was not loaded",
    ),
    "pickle": (
        lambda path: path.write_bytes(pickle.dumps(Code())),
        "asks to run|is damaged, or not a PyTorch file",
    ),
    "list": (lambda path: torch.save([torch.ones(2)], path), "holds a list and no tensors by name"),
    "numbers": (lambda path: torch.save({"epoch": 3}, path), r"holds no tensors by name \(it holds epoch\)"),
    "names": (
        lambda path: save_file({"a": torch.ones(1), "b": torch.ones(1)}, path),
        r"holds tensors of an unknown model \(a, b, ...\): pass",
    ),
    "ours": (
        lambda path: save_file({"a": torch.ones(1)}, path, {"vivit": "{}"}),
        "was written by vivit already: use it as it is",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_cannot_be_imported_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = REFUSED[case]
    make(tmp_path / "weights")
    with pytest.raises(WeightsError, match=message) as error:
        import_weights(tmp_path / "weights")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "weights") in str(error.value)
    assert not (tmp_path / "ran").exists()


def whole_files(folder: Path) -> dict[str, Path]:
    state = {"blocks.0.attn.qkv.weight": torch.ones(200)}
    save_file(state, folder / "a.safetensors")
    torch.save(state, folder / "a.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    np.savez(folder / "a.npz", allow_pickle=False, **{"embedding/kernel": np.ones(200)})
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "legacy.pth", "a.npz"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, name: str, part: float) -> None:
    path = whole_files(tmp_path)[name]
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(WeightsError, match=r"damaged.*: fetch the file again"):
        import_weights(path)


def test_a_scenic_file_that_is_cut_short_is_refused(tmp_path: Path, shared: Shared) -> None:
    whole = shared(FE).read_bytes()
    for part in (2, 500, len(whole) // 2, len(whole) - 1):
        (tmp_path / "checkpoint").write_bytes(whole[:part])
        with pytest.raises(WeightsError, match=r"is cut short: .*Fetch the file again"):
            import_weights(tmp_path / "checkpoint")


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damage_is_an_error_of_ours_or_leaves_a_whole_model(
    tmp_path_factory: pytest.TempPathFactory, shared: Shared, data: st.DataObject
) -> None:
    """A damaged value cannot be told from another; a damaged name, shape or length must not end in a traceback."""
    whole = shared(FE).read_bytes()
    # Structure is a small part of the file: the damage is done near the names in it.
    names = [0, *(match.start() for match in re.finditer(b"kernel", whole))]
    at = data.draw(st.sampled_from(names), label="near") + data.draw(st.integers(-20, 60), label="offset")
    damaged = bytearray(whole)
    damaged[max(0, at)] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    with contextlib.suppress(WeightsError):
        assert shapes(import_weights(path)) == shapes(import_weights(shared(FE)))


def shapes(checkpoint: Checkpoint) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
