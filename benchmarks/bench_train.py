"""A stage-2 step with its data loader against the same step on one batch that is ready in memory, alternating."""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from bench_cache import CLASSES, make_cache
from measure import machine, print_table, spread

from vivit.pipeline.device import resolve_device, resolve_precision
from vivit.pipeline.feature_cache import FeatureCache
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.learner import Learner
from vivit.stage2_temporal.model import TemporalModel
from vivit.stage2_temporal.training_data import load_training_data


def bench(cache: FeatureCache, budget: int | None, options: argparse.Namespace) -> list[str]:
    """One row of the table; `budget` bytes of features stay in memory (None: all)."""
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    config = TrainConfig(
        cache=cache.path, run=cache.path.parent / "run", memory_budget_bytes=budget, mixup=0.2
    )
    data = load_training_data(cache, config, device)
    dim = cache.shape("train")[3]
    model = TemporalModel(config.temporal_model(dim=dim, time=16, heads={"action": CLASSES}))
    learner = Learner(
        config, model, device=device, precision=precision, steps_per_epoch=data.batches.steps_per_epoch
    )
    ready = next(iter(data.batches.epoch(0)))
    loaded, alone, ratios = [], [], []
    for number in range(options.rounds + 1):
        seconds_alone = _timed(
            device, lambda: [learner.step(ready, step) for step in range(data.batches.steps_per_epoch)]
        )
        batches = data.batches.epoch(number)
        seconds = _timed(device, lambda batches=batches: [learner.step(b, s) for s, b in enumerate(batches)])  # type: ignore[misc]
        if number:  # the first round warms up
            alone.append(1e3 * seconds_alone / data.batches.steps_per_epoch)
            loaded.append(1e3 * seconds / data.batches.steps_per_epoch)
            ratios.append(seconds_alone / seconds)
    place = "memory" if budget is None else "disk"
    return [str(dim), precision, place, spread(alone, 1), spread(loaded, 1), spread(ratios, 3)]


def _timed(device: torch.device, work: object) -> float:
    started = time.perf_counter()
    work()  # type: ignore[operator]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[192, 384, 1024])
    parser.add_argument("--clips", type=int, default=640)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dim in options.dims:
            cache, _ = make_cache(Path(folder) / f"{dim}.zarr", options.clips, options.views, "none", dim)
            rows += [bench(cache, budget, options) for budget in (None, 0)]
    print(machine())
    print_table(
        ["dim", "precision", "features in", "ready batch, ms/step", "with loader, ms/step", "ratio"], rows
    )


if __name__ == "__main__":
    main()
