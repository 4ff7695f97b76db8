"""Each benchmark runs, at a size where it says nothing about speed."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = {
    "bench_augment.py": [
        "--backbones",
        "vit_ti16",
        "--frames",
        "4",
        "--crop-size",
        "32",
        "--draws",
        "2",
        "--rounds",
        "1",
        "--device",
        "cpu",
    ],
    "bench_extract.py": [
        "--backbones",
        "vit_ti16",
        "--precisions",
        "float32",
        "--clips",
        "1",
        "--rounds",
        "1",
        "--crop-size",
        "32",
    ],
    "bench_memory.py": ["--seconds", "1", "3"],
    "bench_cache.py": ["--clips", "70", "--views", "1", "--rounds", "1"],
    "bench_pretrain.py": [
        "--backbone",
        "test_vit",
        "--crop-size",
        "32",
        "--clips",
        "4",
        "--rounds",
        "1",
        "--device",
        "cpu",
    ],
    "bench_ray.py": ["--parts", "decode", "--decode-clips", "2", "--videos", "1", "--rounds", "1"],
    "bench_step.py": [
        "--backbone",
        "test_vit",
        "--crop-size",
        "32",
        "--frames",
        "4",
        "--rounds",
        "1",
        "--device",
        "cpu",
    ],
    "bench_train.py": ["--dims", "64", "--clips", "70", "--rounds", "1", "--device", "cpu"],
}


SLOW = ("bench_memory.py", "bench_ray.py", "bench_step.py")
"""Half a minute each, even so small."""


def test_every_benchmark_is_run_here() -> None:
    assert {path.name for path in FOLDER.glob("bench_*.py")} == set(SMALL)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SMALL]
)
def test_the_benchmark_prints_its_table(name: str) -> None:
    command = [sys.executable, str(FOLDER / name), *SMALL[name]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "commit" in done.stdout
    assert done.stdout.count("| ") >= 4
