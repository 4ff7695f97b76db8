"""Several encoders in one pass: each cache is what a run of its own would write."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vivit.pipeline.errors import ConfigError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.manifest import Manifest
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract import clip_reader
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.extract import extract, extract_all

VIEWS = ViewSpec(num_frames=4, stride=3, resize=40, crop_size=32, train_views=2, test_clips=2, test_crops=1)


def config_for(root: Path, cache: Path, **changes: Any) -> ExtractConfig:
    config = ExtractConfig(
        cache=cache, data_root=root, backbone="vit_ti16", weights="random", views=VIEWS, device="cpu", batch_size=6,
        block_size=3,
    )  # fmt: skip
    return replace(config, **changes)


def shards_of(cache: Path) -> dict[str, bytes]:
    return {
        p.relative_to(cache).as_posix(): p.read_bytes()
        for p in cache.glob("*/features/c/**/*")
        if p.is_file()
    }


def test_each_cache_is_what_its_own_run_would_write_and_videos_are_opened_once(
    video_folder: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"views": replace(VIEWS, crop_size=48, resize=60)},
        {"backbone": "resnet18", "precision": "float32"},
    ]
    alone = [config_for(video_folder, tmp_path / f"alone{i}.zarr", **c) for i, c in enumerate(changes)]
    for config in alone:
        extract(config, manifest)
    opened: list[str] = []
    read = clip_reader.read_clips

    def counted(source: Path, *args: Any, **options: Any) -> Any:
        opened.append(source.name)
        return read(source, *args, **options)

    monkeypatch.setattr(clip_reader, "read_clips", counted)
    together = [replace(config, cache=tmp_path / f"c{i}.zarr") for i, config in enumerate(alone)]
    summaries = extract_all(together, manifest)
    assert sorted(opened) == sorted(Path(clip.video).name for clip in manifest.clips)
    for one, summary in zip(alone, summaries, strict=True):
        assert summary.missing == ""
        assert shards_of(summary.cache) == shards_of(one.cache)
        mine, theirs = FeatureCache.open(summary.cache), FeatureCache.open(one.cache)
        assert mine.records("train") == theirs.records("train")
        assert mine.settings == theirs.settings
    assert summaries[0].crops == sum(extracted_crops(config) for config in alone)


def extracted_crops(config: ExtractConfig) -> int:
    cache = FeatureCache.open(config.cache)
    return sum(
        len(cache.usable_rows(split)) * cache.shape(split)[1] * config.views.num_frames
        for split in cache.splits
    )


def test_a_cache_that_is_further_gets_only_what_it_lacks(
    video_folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    first = config_for(video_folder, tmp_path / "a.zarr")
    extract(first, manifest)
    before = {path: path.stat().st_mtime_ns for path in first.cache.glob("ledger/*/*")}
    dropped = first.cache / "ledger/train/000001.json"
    dropped.unlink()
    second = replace(first, cache=tmp_path / "b.zarr", views=replace(VIEWS, crop_size=16, resize=40))
    summaries = extract_all([first, second], manifest)
    assert [(s.blocks_done, s.blocks_kept) for s in summaries] == [(1, 4), (5, 0)]
    after = {path: path.stat().st_mtime_ns for path in first.cache.glob("ledger/*/*")}
    assert [path for path in after if after[path] != before[path]] == [dropped]


def test_encoders_that_cannot_share_their_clips_are_refused(
    video_folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    first = config_for(video_folder, tmp_path / "a.zarr")
    with pytest.raises(ConfigError, match="vit_s16 has other views than vit_ti16"):
        extract_all(
            [
                first,
                config_for(
                    video_folder, tmp_path / "b.zarr", backbone="vit_s16", views=replace(VIEWS, stride=1)
                ),
            ],
            manifest,
        )
    with pytest.raises(ConfigError, match="the same backbone is given twice"):
        extract_all([first, first], manifest)
