"""Small feature caches with chosen features, labels and failures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from vivit.pipeline.cache_settings import Backbone, CacheSettings
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.views import ViewSpec

Split = tuple[npt.NDArray[Any], Mapping[str, Sequence[int]]]
"""Features [clip, view, time, dim], and labels [clip] per head."""
MakeCache = Callable[..., FeatureCache]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_cache(tmp_path: Path) -> MakeCache:
    """`make_cache({"train": (features, {"verb": labels})}, classes={"verb": 3}, failed={"train": [1]})`."""

    def make(
        splits: Mapping[str, Split],
        *,
        classes: Mapping[str, int],
        failed: Mapping[str, Sequence[int]] | None = None,
        skipped: Mapping[str, Sequence[int]] | None = None,
        name: str = "toy.zarr",
        weights_sha256: str = "0" * 64,
        block_size: int = 8,
        num_frames: int | None = None,
    ) -> FeatureCache:
        heads = {head: [f"{head} {i}" for i in range(count)] for head, count in classes.items()}
        manifest = Manifest("toy", _clips(splits), heads=heads)
        settings = _settings(splits, manifest, weights_sha256, block_size, num_frames)
        cache = FeatureCache.create(tmp_path / name, manifest, settings)
        for split, (features, _) in splits.items():
            for block in range(cache.num_blocks(split)):
                if block not in (skipped or {}).get(split, ()):
                    _commit(cache, split, block, features, (failed or {}).get(split, ()))
        return cache

    return make


@pytest.fixture
def toy_cache(make_cache: MakeCache) -> FeatureCache:
    """21 clips of 2 views to train on, 9 of 3 views to validate on; class is written in the mean of the features."""
    return make_cache(toy_splits(), classes={"label": 3})


def toy_splits(dim: int = 16, time: int = 4) -> dict[str, Split]:
    rng = np.random.default_rng(0)
    splits: dict[str, Split] = {}
    for split, clips, views in (("train", 21, 2), ("validation", 9, 3)):
        labels = [clip % 3 for clip in range(clips)]
        centre = np.eye(3, dim)[labels][:, None, None] * 2
        splits[split] = (
            (centre + rng.normal(size=(clips, views, time, dim))).astype(np.float16),
            {"label": labels},
        )
    return splits


def _clips(splits: Mapping[str, Split]) -> list[Clip]:
    return [
        Clip(
            clip_id=f"{split}-{row}",
            split=split,
            video=f"{row:05d}.mp4",
            labels={head: int(values[row]) for head, values in labels.items()},
        )
        for split, (features, labels) in splits.items()
        for row in range(len(features))
    ]


def _settings(
    splits: Mapping[str, Split],
    manifest: Manifest,
    weights_sha256: str,
    block_size: int,
    num_frames: int | None,
) -> CacheSettings:
    views = {split: features.shape[1] for split, (features, _) in splits.items()}
    _, _, time, dim = next(iter(splits.values()))[0].shape
    frames = num_frames or time
    test_views = [count for split, count in views.items() if split != "train"]
    return CacheSettings(
        dataset="toy",
        manifest_sha256=manifest.sha256,
        backbone=Backbone(
            name="toy",
            weights="random:0",
            weights_sha256=weights_sha256,
            embed_dim=dim,
            tubelet=frames // time,
        ),
        views=ViewSpec(
            num_frames=frames,
            train_views=views.get("train", 1),
            test_clips=max(test_views, default=1),
            test_crops=1,
        ),
        block_size=block_size,
    )


def _commit(
    cache: FeatureCache, split: str, block: int, features: npt.NDArray[Any], failed: Sequence[int]
) -> None:
    start, stop = cache.rows(split, block)
    values = np.array(features[start:stop], np.float16)
    records = []
    for row in range(start, stop):
        bad = row in failed
        if bad:
            values[row - start] = 0
        outcome = Outcome.MISSING if bad else Outcome.OK
        records.append(ClipRecord(clip_id=f"{split}-{row}", outcome=outcome.value))
    cache.commit(split, block, values, records)
