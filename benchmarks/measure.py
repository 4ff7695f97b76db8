"""What every benchmark needs: the machine in one line, medians, a table, and videos to work on."""

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch


def machine() -> str:
    """Processor, cores, threads, GPU and library versions."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"{torch.get_num_threads()} torch threads, {gpu}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"PyAV {av.__version__}; commit {_commit()}; command: {' '.join(['python', *sys.argv])}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median (lowest .. highest)`."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table, to be pasted into docs/performance.md."""
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def write_video(path: Path, *, num_frames: int, size: tuple[int, int], fps: int = 30, seed: int = 0) -> Path:
    """An H.264 mp4 with a keyframe every 250 frames of a textured picture that drifts; size: (height, width)."""
    height, width = size
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    picture = small.repeat(8, axis=0).repeat(8, axis=1)
    noise = draw.integers(0, 12, (4, *picture.shape), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=fps, options={"preset": "veryfast", "g": "250", "threads": "2"}
        )
        stream.height, stream.width, stream.pix_fmt = picture.shape[0], picture.shape[1], "yuv420p"
        for index in range(num_frames):
            shown = np.roll(picture, (index // 2, index), axis=(0, 1)) // 2 + noise[index % 4]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode())
    return path
