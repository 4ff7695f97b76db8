"""A training step of the whole model against one on cached features, of the same clips: time, memory, break-even.

The break-even is the number of epochs after which extracting once and training on the cache took less time than training
end to end, with one stored view per clip (epochs * views for more), decoding left out on both sides.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine, print_table

from vivit.end_to_end.factorised_encoder import FactorisedEncoder
from vivit.end_to_end.video_batches import VideoBatch
from vivit.pipeline.backbones import load_backbone
from vivit.pipeline.device import resolve_device, resolve_precision
from vivit.stage1_extract.encoder import Normalise, SpatialEncoder
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.learner import Learner
from vivit.stage2_temporal.loader import Batch
from vivit.stage2_temporal.model import ModelConfig, TemporalModel

CLASSES = 174
WAYS = ("end to end", "spatial frozen, live", "stage 2", "extract")


def measure(way: str, options: argparse.Namespace) -> tuple[float, float]:
    """Median seconds for the clips of one batch, and the memory that they take beyond the model [MiB]."""
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    work = _work(way, options, device, precision)
    work()
    before = _memory(device, reset=True)
    seconds = []
    for _ in range(options.rounds):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), _memory(device) - before


def _work(way: str, options: argparse.Namespace, device: torch.device, precision: str) -> Callable[[], Any]:
    size, frames, clips = options.crop_size, options.frames, options.clips
    draw = np.random.default_rng(0)
    crops = draw.integers(0, 256, (clips, frames, size, size, 3), np.uint8)
    if way == "extract":
        encoder = SpatialEncoder(
            options.backbone, weights="random", crop_size=size, device=options.device, precision=precision
        )
        return lambda: [encoder.encode(crop[None]) for crop in crops]
    loaded = load_backbone(options.backbone, weights="random", crop_size=size)
    dim = int(getattr(loaded.model, "num_features"))  # noqa: B009
    config = ModelConfig(dim=dim, time=frames, heads={"action": CLASSES})
    labels = {"action": torch.from_numpy(draw.integers(0, CLASSES, clips)).to(device)}
    batch: Any
    if way == "stage 2":
        model: Any = TemporalModel(config)
        batch = Batch(torch.randn(clips, frames, dim, device=device).half(), labels)
    else:
        model = FactorisedEncoder(loaded.model, 1, config)
        if way != "end to end":
            model.freeze("spatial")
        pixels = torch.from_numpy(crops).to(device)
        batch = VideoBatch(pixels, labels, Normalise(loaded.config.mean, loaded.config.std, device))
    settings = TrainConfig(cache=Path(), run=Path(), epochs=1000)
    learner = Learner(settings, model, device=device, precision=precision, steps_per_epoch=1)
    return lambda: learner.step(batch, 100)


def _memory(device: torch.device, *, reset: bool = False) -> float:
    """Memory held now (after a reset), or the most since then [MiB]."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="vit_s16")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--clips", type=int, default=2, help="clips per step")
    parser.add_argument("--crop-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(*measure(options.way, options))
        return
    found = {}
    for way in WAYS:  # each in a process of its own, so that one leaves no memory to the other
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = tuple(float(value) for value in done.stdout.split())
    whole = found["end to end"][0]
    rows = [[way, f"{s:.3f}", f"{s / whole:.4f}", f"{mib:.0f}"] for way, (s, mib) in found.items()]
    print(machine())
    print_table(
        [f"{options.backbone}, {options.clips} x {options.frames} frames", "seconds", "of end to end", "MiB"],
        rows,
    )
    epochs = found["extract"][0] / (whole - found["stage 2"][0])
    print(f"break-even after {epochs:.2f} epochs for each stored view")


if __name__ == "__main__":
    main()
