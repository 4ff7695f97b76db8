import os
from pathlib import Path

import pytest

from vivit.pipeline.errors import CacheError, CheckpointError
from vivit.pipeline.workspace import Workspace


def _write(path: Path, at: int) -> None:
    """A file that was written `at` seconds after the epoch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    os.utime(path, (at, at))


def test_the_newest_run_is_the_one_written_to_last(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    _write(work.runs / "resumed" / "config.json", 1)
    _write(work.runs / "made-later" / "config.json", 2)
    assert work.newest_run().name == "made-later"
    _write(work.runs / "resumed" / "last" / "state.safetensors", 3)
    assert work.newest_run().name == "resumed"
    _write(work.runs / "just-made" / "config.json", 4)
    _write(work.runs / "no-run" / "last" / "state.safetensors", 5)
    assert work.newest_run().name == "just-made"


def test_a_folder_that_a_killed_process_left_is_not_the_newest(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    _write(work.caches / ".toy.zarr.123.partial" / "zarr.json", 2)
    with pytest.raises(CacheError, match=r"no feature cache in .*: run `vivit extract` first"):
        work.newest_cache()
    _write(work.caches / "toy.zarr" / "zarr.json", 1)
    assert work.newest_cache().name == "toy.zarr"


def test_a_workspace_without_runs_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no run in .*: run `vivit train-temporal` first, or pass --run"
    ):
        Workspace(tmp_path).newest_run()
