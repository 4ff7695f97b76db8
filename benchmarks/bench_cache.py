"""The feature cache: writing, reading a split into memory against np.load, and random rows against zarr-python."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr
from measure import machine, print_table, spread

from vivit.pipeline.cache_settings import Backbone, CacheSettings
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.views import ViewSpec

CLASSES = 100


def make_cache(path: Path, clips: int, views: int, codec: str, dim: int = 1024) -> tuple[FeatureCache, float]:
    """A full cache of random tokens [clip, view, 16, dim], and the seconds that its commits took."""
    rows = [
        Clip(clip_id=f"{i:06d}", split="train", video=f"{i:06d}.mp4", labels={"action": i % CLASSES})
        for i in range(clips)
    ]
    manifest = Manifest("bench", rows, heads={"action": [str(i) for i in range(CLASSES)]})
    settings = CacheSettings(
        dataset="bench", manifest_sha256=manifest.sha256, codec=codec, views=ViewSpec(num_frames=16, train_views=views),
        backbone=Backbone(name="vit_l16", weights="none", weights_sha256="", embed_dim=dim),
    )  # fmt: skip
    cache = FeatureCache.create(path, manifest, settings)
    draw, seconds = np.random.default_rng(0), 0.0
    for block in range(cache.num_blocks("train")):
        start, stop = cache.rows("train", block)
        features = draw.standard_normal((stop - start, views, 16, dim), np.float32).astype(np.float16)
        records = [ClipRecord(clip_id=clip.clip_id, outcome="ok") for clip in manifest.clips[start:stop]]
        began = time.perf_counter()
        cache.commit("train", block, features, records)
        seconds += time.perf_counter() - began
    return cache, seconds


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def bench(codec: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """One row of the table."""
    cache, writing = make_cache(folder / f"{codec}.zarr", options.clips, options.views, codec)
    array = zarr.open_array(cache.path / "train/features", mode="r")
    plain = folder / f"{codec}.npy"
    np.save(plain, cache.read("train"))
    size_mb = plain.stat().st_size / 1e6
    draw = np.random.default_rng(1)
    load, ours, batch, batch_zarr = [], [], [], []
    for _ in range(options.rounds):
        load.append(seconds_of(lambda: np.load(plain)))
        ours.append(seconds_of(lambda: cache.read("train")))
        rows = draw.integers(0, options.clips, 64)
        batch.append(1e3 * seconds_of(lambda rows=rows: cache.read("train", rows, [0])))  # type: ignore[misc]
        batch_zarr.append(1e3 * seconds_of(lambda rows=rows: array.oindex[rows, slice(0, 1)]))  # type: ignore[misc]
    ratio = [a / b for a, b in zip(load, ours, strict=True)]
    return [
        codec, f"{size_mb / writing:.0f}", spread([size_mb / s for s in load], 0), spread([size_mb / s for s in ours], 0),
        spread(ratio), spread(batch), spread(batch_zarr, 0),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=4000)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--codecs", nargs="+", default=["none", "zstd"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [bench(codec, options, Path(folder)) for codec in options.codecs]
    print(machine())
    header = [
        "codec", "write MB/s", "np.load MB/s", "read split MB/s", "ratio to np.load", "64 random rows, ms",
        "the same through zarr-python, ms",
    ]  # fmt: skip
    print_table(header, rows)


if __name__ == "__main__":
    main()
