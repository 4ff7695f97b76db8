"""Extraction by Ray workers against `--workers 0`: throughput, memory over many clips, and decoding elsewhere.

Rates leave out how long Ray and the workers take to start: they count from the preflight clip (with `--workers 0`: from
the first block on) to the last block. The kinds of runs alternate round by round; the ratio of each round is quoted.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import ray
from measure import machine, print_table, spread, write_video
from ray._private.internal_api import memory_summary

from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.extract import extract

STORE_BYTES = 512 << 20


def rate_of(log: Path) -> float:
    """Frame crops per second of a run, from its JSON lines."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    at = {event["event"]: datetime.fromisoformat(event["time"]) for event in events}  # the last of each kind
    started = at.get("preflight") or at["begin"]
    crops = sum(event["crops"] for event in events if event["event"] == "block")
    return float(crops / (at["block"] - started).total_seconds())


def run(folder: Path, name: str, manifest: Manifest, **changes: Any) -> float:
    """Crops per second of one extraction into a new cache."""
    log = folder / f"{name}.jsonl"
    config = ExtractConfig(
        cache=folder / f"{name}.zarr", data_root=folder, weights="random", log_json=str(log), **changes
    )
    extract(config, manifest)
    return rate_of(log)


def manifest_of(clips: int, videos: int) -> Manifest:
    """So many training clips of so many videos."""
    return Manifest(
        "bench", [Clip(clip_id=f"{i:06d}", split="train", video=f"{i % videos}.mp4") for i in range(clips)]
    )


def bench_throughput(options: argparse.Namespace, folder: Path) -> None:
    """One worker against this process, both with all cores; two workers of one thread against one of one thread."""
    views = ViewSpec(num_frames=32, stride=2, crop_size=224, resize=256)
    common = {
        "backbone": options.backbone,
        "views": views,
        "device": "cpu",
        "block_size": 2,
        "decode_threads": 1,
    }
    kinds: dict[str, dict[str, Any]] = {
        "this process": {"workers": 0, "torch_threads": options.cores},
        "1 worker": {"workers": 1, "torch_threads": options.cores},
        "1 worker, 1 thread": {"workers": 1, "torch_threads": 1},
        "2 workers, 1 thread each": {"workers": 2, "torch_threads": 1},
    }
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    manifest = manifest_of(options.clips, options.videos)
    for number in range(options.rounds):
        for at, (kind, changes) in enumerate(kinds.items()):
            rates[kind].append(run(folder, f"t{number}-{at}", manifest, **common, **changes))
    one = ratios(rates["1 worker"], rates["this process"])
    two = ratios(rates["2 workers, 1 thread each"], [2 * rate for rate in rates["1 worker, 1 thread"]])
    print_table(["engine", "crops/s"], [[kind, spread(values, 1)] for kind, values in rates.items()])
    print(f"1 worker against this process: {spread(one, 3)}")
    print(f"2 workers of a thread against twice 1: {spread(two, 3)}")


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def bench_decode(options: argparse.Namespace, folder: Path) -> None:
    """Where decoding is the limit: the worker's threads against processes whose crops travel."""
    views = ViewSpec(num_frames=32, stride=2, crop_size=112, resize=128)
    common = {
        "backbone": "vit_ti16",
        "views": views,
        "device": "cpu",
        "block_size": 8,
        "workers": 1,
        "torch_threads": 1,
    }
    kinds: dict[str, dict[str, Any]] = {
        "2 threads of the worker": {"decode_threads": 2},
        "2 decode processes": {"decode_workers": 2},
    }
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    manifest = manifest_of(options.decode_clips, options.videos)
    for number in range(options.rounds):
        for at, (kind, changes) in enumerate(kinds.items()):
            rates[kind].append(run(folder, f"d{number}-{at}", manifest, **common, **changes))
    print_table(["decoding by", "crops/s"], [[kind, spread(values, 1)] for kind, values in rates.items()])
    print(f"processes against threads: {spread(ratios(*reversed(list(rates.values()))), 3)}")
    file = sum((folder / f"{i}.mp4").stat().st_size for i in range(options.videos)) / options.videos
    crops = 32 * views.crop_size**2 * 3
    frames = 32 * 256 * 336 * 3
    print(
        f"what would travel for a clip: the file {file / 1e6:.2f} MB, its crops {crops / 1e6:.2f} MB a view "
        f"(224 pixels: {4 * crops / 1e6:.2f}), its frames in full size {frames / 1e6:.2f} MB"
    )


def bench_memory(options: argparse.Namespace, folder: Path) -> None:
    """Memory of the worker, and what the object store spilled, over many small clips."""
    views = ViewSpec(num_frames=4, stride=1, crop_size=32, resize=40, train_views=1)
    sizes: list[float] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(1.0):
            workers = [
                p for p in psutil.process_iter(["name"]) if (p.info["name"] or "").startswith("ray::Worker")
            ]
            sizes.extend(max((p.memory_info().rss for p in workers), default=0) / 2**20 for _ in (0,))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run(
            folder, "memory", manifest_of(options.memory_clips, options.videos), backbone="vit_ti16", views=views,
            device="cpu", block_size=64, workers=1, torch_threads=1, decode_workers=options.memory_decode_workers,
        )  # fmt: skip
    finally:
        is_over.set()
        watcher.join()
    sizes = [size for size in sizes if size > 300]  # before, it has not loaded the encoder
    quarters = [sizes[len(sizes) * k // 4] for k in (1, 2, 3)] + [sizes[-1]]
    print(
        f"memory of the worker after 1/4, 2/4, 3/4 and all of {options.memory_clips} clips: "
        f"{', '.join(f'{size:.0f}' for size in quarters)} MiB"
    )
    summary = memory_summary(stats_only=True)
    spilled = [line for line in summary.splitlines() if "pill" in line]
    print(f"object store: {'; '.join(spilled) or 'nothing was spilled'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["throughput", "decode", "memory"])
    parser.add_argument("--backbone", default="vit_s16")
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--decode-clips", type=int, default=64)
    parser.add_argument("--memory-clips", type=int, default=2000)
    parser.add_argument("--memory-decode-workers", type=int, default=0)
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_TOKEN", "bench")
    # One session for all runs; more cores than there are, since the encoder and the decoders share them here.
    ray.init(
        address="local", num_cpus=8, num_gpus=0, include_dashboard=False, log_to_driver=False,
        object_store_memory=STORE_BYTES,
    )  # fmt: skip
    print(machine())
    benches = {"throughput": bench_throughput, "decode": bench_decode, "memory": bench_memory}
    with tempfile.TemporaryDirectory() as name:
        for index in range(options.videos):
            write_video(Path(name) / f"{index}.mp4", num_frames=300, size=(256, 336), seed=index)
        for part in options.parts:
            began = time.perf_counter()
            benches[part](options, Path(name))
            print(f"({part}: {time.perf_counter() - began:.0f} s)\n")
    ray.shutdown()


if __name__ == "__main__":
    main()
