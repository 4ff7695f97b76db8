"""Small real inputs that many tests share, and the one place that decides what is skipped."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# As the command line does; read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# In child processes too, since bits may depend on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import av
import numpy as np
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """A function that gives a path in `../shared`, and skips the test where that is not there."""

    def path(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"test input ../shared/{name} is not there")
        return SHARED / name

    return path


@pytest.fixture(scope="session", autouse=True)
def _tar_indexes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indexes of tars go to a folder of the tests, in child processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIVIT_TAR_INDEXES", str(tmp_path_factory.mktemp("tar-indexes")))
        yield


def write_video(path: Path, *, num_frames: int = 24, size: tuple[int, int] = (48, 64), seed: int = 0) -> Path:
    """An H.264 mp4 at 25 frames/s of noise that moves to the right; size is (height, width) in pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size
    texture = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    picture = texture.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, index, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<split>/<class>/<video>: 2 classes, 7 training and 4 validation clips, one of them too short for a view."""
    root = tmp_path_factory.mktemp("videos")
    for index in range(11):
        split = "train" if index < 7 else "val"
        frames = 5 if index == 3 else 20 + index
        write_video(root / split / "ab"[index % 2] / f"clip{index}.mp4", num_frames=frames, seed=index)
    return root
