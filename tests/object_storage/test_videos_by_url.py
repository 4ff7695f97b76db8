"""Videos and tars in an S3 store: the same features as from files, with requests that fail, and few requests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import FaultyProxy

from vivit.pipeline.datasets import read_dataset
from vivit.pipeline.errors import StorageError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.manifest import Manifest
from vivit.pipeline.storage import Location, Url
from vivit.pipeline.tar_index import tar_index
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.extract import extract
from vivit.stage1_extract.pack import PackConfig, pack

VIEWS = ViewSpec(num_frames=4, stride=3, resize=40, crop_size=32, train_views=1, test_clips=1, test_crops=1)


def features(cache: Path, root: Location, manifest: Manifest) -> dict[str, Any]:
    """Outcome and features of each clip."""
    config = ExtractConfig(
        cache=cache, data_root=root, backbone="vit_ti16", weights="random", views=VIEWS, device="cpu", batch_size=6,
        block_size=4, decode_threads=2,
    )  # fmt: skip
    extract(config, manifest)
    done = FeatureCache.open(cache)
    return {
        record.clip_id: (record.outcome, done.read(split, [row]).tobytes())
        for split in manifest.splits
        for row, record in enumerate(done.records(split))
        if record is not None
    }


@pytest.fixture(scope="module")
def manifest(video_folder: Path) -> Manifest:
    return read_dataset("folder", video_folder)[0]


@pytest.fixture(scope="module")
def loose(video_folder: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Features of the files."""
    return features(tmp_path_factory.mktemp("caches") / "loose.zarr", video_folder, manifest)


def upload(folder: Path, target: Url, pattern: str) -> None:
    for path in folder.rglob(pattern):
        (target / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())


def test_videos_and_tars_in_a_bucket_give_the_features_of_the_files(
    bucket: Url, video_folder: Path, manifest: Manifest, loose: dict[str, Any], tmp_path: Path
) -> None:
    upload(video_folder, bucket / "videos", "*.mp4")
    summary = pack(PackConfig(data_root=bucket / "videos", out=bucket / "tars", max_count=4), manifest)
    assert (summary.num_videos, summary.failed) == (11, [])
    packed = Manifest.read(bucket / "tars/manifest.parquet")
    assert features(tmp_path / "packed.zarr", bucket / "tars", packed) == loose
    again = pack(PackConfig(data_root=bucket / "videos", out=bucket / "tars", max_count=4), manifest)
    assert again.shards_kept == sum(again.shards.values()) == 3


@pytest.mark.faults
def test_requests_that_fail_for_a_while_change_nothing(
    proxy: FaultyProxy,
    bucket: Url,
    video_folder: Path,
    manifest: Manifest,
    loose: dict[str, Any],
    tmp_path: Path,
) -> None:
    upload(video_folder, bucket / "videos", "*.mp4")
    proxy.rate, proxy.kinds = 0.2, ["refuse", "reset", "cut"]
    assert features(tmp_path / "videos.zarr", bucket / "videos", manifest) == loose
    assert sum(proxy.faults.values()) > 3


@pytest.mark.faults
def test_a_store_that_goes_away_is_no_bad_clip(
    proxy: FaultyProxy,
    bucket: Url,
    video_folder: Path,
    manifest: Manifest,
    loose: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload(video_folder, bucket, "*.mp4")
    monkeypatch.setenv("VIVIT_STORAGE_TRIES", "2")
    proxy.rate, proxy.kinds, proxy.only = 1.0, ["cut"], "clip6.mp4"
    with pytest.raises(StorageError, match=r"cannot read .*clip6.mp4 after 2 tries .*same command again"):
        features(tmp_path / "c.zarr", bucket, manifest)
    recorded = [r for r in FeatureCache.open(tmp_path / "c.zarr", allow_partial=True).records("train") if r]
    assert all(record.usable for record in recorded)
    assert not any("clip6" in record.clip_id for record in recorded)
    proxy.rate = 0.0
    assert features(tmp_path / "c.zarr", bucket, manifest) == loose


def test_a_tar_is_indexed_and_read_with_few_requests(
    proxy: FaultyProxy, bucket: Url, shared: Callable[[str], Path]
) -> None:
    (bucket / "tars/x.tar").write_bytes(shared("bad_videos/wds_good.tar").read_bytes())
    proxy.requests.clear()
    assert len(tar_index(bucket / "tars/x.tar").members) == 6
    asked = [request.split()[0] for request in proxy.requests if "index.json" not in request]
    assert sorted(asked) == ["GET", "HEAD"]
    proxy.requests.clear()
    manifest, _ = read_dataset("webdataset", bucket / "tars")
    assert len(manifest) == 2
    assert manifest.missing_videos(bucket / "tars") == []
    assert len(proxy.requests) == 1 + 4  # a listing, and the .cls and .json of each sample
