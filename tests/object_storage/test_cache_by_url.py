"""A feature cache in a bucket against the same one in a folder."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr
from faulty_proxy import FaultyProxy

from vivit.pipeline.cache_settings import Backbone, CacheSettings
from vivit.pipeline.errors import CacheError, IncompleteCacheError, StaleCacheError, StorageError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.storage import Location, Url
from vivit.pipeline.views import ViewSpec

CLIPS = {"train": 10, "validation": 5}


def make_manifest() -> Manifest:
    clips = [
        Clip(clip_id=f"{split}-{i:02d}", split=split, video=f"{split}/{i:02d}.mp4", labels={"label": i % 2})
        for split, count in CLIPS.items()
        for i in range(count)
    ]
    return Manifest("toy", clips, heads={"label": ["a", "b"]})


def make_settings(codec: str = "none", block_size: int = 4) -> CacheSettings:
    return CacheSettings(
        dataset="toy",
        manifest_sha256=make_manifest().sha256,
        backbone=Backbone(name="tiny", weights="random:0", weights_sha256="00", embed_dim=6),
        views=ViewSpec(num_frames=3, train_views=2, test_clips=2, test_crops=1),
        block_size=block_size,
        codec=codec,
    )


def features_of(cache: FeatureCache, split: str) -> np.ndarray:
    values = np.random.default_rng(len(split)).normal(size=cache.shape(split)).astype(np.float16)
    values[1] = 0
    return values


def commit(cache: FeatureCache, split: str, block: int) -> None:
    start, stop = cache.rows(split, block)
    clips = cache.manifest.of_split(split)[start:stop]
    records = [ClipRecord(clip_id=clip.clip_id, outcome="ok") for clip in clips]
    cache.commit(split, block, features_of(cache, split)[start:stop], records)


def fill(path: Location, settings: CacheSettings | None = None) -> FeatureCache:
    """The cache at a path, made if need be, with what is missing of it committed."""
    cache = FeatureCache.create_or_open(path, make_manifest(), settings or make_settings())
    with cache.lock():
        for split in cache.splits:
            for block in cache.missing_blocks(split):
                commit(cache, split, block)
    return cache


def contents(path: Location) -> dict[str, bytes]:
    """Every file or object of a cache but for locks."""
    if isinstance(path, Url):
        return {name: (path / name).read_bytes() for name in path.sizes_below() if not name.startswith(".")}
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_objects_hold_the_bytes_that_files_do(bucket: Url, tmp_path: Path, codec: str) -> None:
    there, here = bucket / "caches/toy.zarr", tmp_path / "toy.zarr"
    fill(there, make_settings(codec))
    fill(here, make_settings(codec))
    assert contents(there) == contents(here)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_what_is_read_is_what_was_committed(bucket: Url, codec: str) -> None:
    fill(bucket / "toy.zarr", make_settings(codec))
    cache = FeatureCache.open(bucket / "toy.zarr")
    for split in cache.splits:
        np.testing.assert_array_equal(cache.read(split), features_of(cache, split))
    wanted = features_of(cache, "train")
    for rows, views in (([9, 0, 3, 3, 8], [1, 0]), ([2], [0]), ([], [1]), ([7, 4, 5, 6], [1])):
        again = FeatureCache.open(bucket / "toy.zarr")  # without indexes from before
        np.testing.assert_array_equal(again.read("train", rows, views), wanted[np.array(rows, int)][:, views])


def test_plain_zarr_reads_it(bucket: Url, s3_environment: str) -> None:
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

    cache = fill(bucket / "toy.zarr")
    store = S3Store(bucket.bucket, prefix="toy.zarr", client_options={"allow_http": True})
    array = zarr.open_group(ObjectStore(store, read_only=True), mode="r")["train/features"]
    np.testing.assert_array_equal(array[:], features_of(cache, "train"))


def test_many_rows_of_a_shard_are_one_request_and_few_do_not_fetch_it_all(
    bucket: Url, proxy: FaultyProxy
) -> None:
    fill(bucket / "toy.zarr", make_settings(block_size=10))
    cache = FeatureCache.open(bucket / "toy.zarr")
    proxy.requests.clear()
    cache.read("train", range(10), [0])
    assert proxy.requests == [f"GET /{bucket.bucket}/toy.zarr/train/features/c/0/0/0/0"]
    cache.read("train", [3, 5], [1])
    assert len(proxy.requests) == 3  # the index, and the two rows with what lies between them
    cache.read("train", [7], [1])
    assert len(proxy.requests) == 4


def test_opening_takes_one_listing_per_split_and_one_request_per_entry(
    bucket: Url, proxy: FaultyProxy
) -> None:
    fill(bucket / "toy.zarr")
    proxy.requests.clear()
    FeatureCache.open(bucket / "toy.zarr")
    entries = [line for line in proxy.requests if "/ledger/" in line]
    others = [
        line
        for line in proxy.requests
        if "/features/" in line and line.startswith(("HEAD", "GET /" + bucket.bucket + "/"))
    ]
    assert (len(entries), others) == (5, [])
    assert len(proxy.requests) < 5 + 10


def test_the_ledger_entry_is_put_last_and_deleted_before_a_block_is_written_anew(
    bucket: Url, proxy: FaultyProxy
) -> None:
    cache = fill(bucket / "toy.zarr")
    proxy.requests.clear()
    commit(cache, "train", 1)
    method_and_name = [(line.split()[0], line.partition("toy.zarr/")[2]) for line in proxy.requests]
    assert method_and_name[0] == ("DELETE", "ledger/train/000001.json")
    assert method_and_name[-1] == ("PUT", "ledger/train/000001.json")
    shards = [("PUT", f"train/features/c/1/{view}/0/0") for view in range(2)]
    assert sorted(method_and_name[1:-1]) == shards


def test_the_group_is_put_last(bucket: Url, proxy: FaultyProxy) -> None:
    FeatureCache.create(bucket / "toy.zarr", make_manifest(), make_settings())
    puts = [line.partition("toy.zarr/")[2] for line in proxy.requests if line.startswith("PUT")]
    assert puts[-1] == "zarr.json"
    assert "manifest.parquet" in puts
    with pytest.raises(IncompleteCacheError, match="train lacks 3 of 3 blocks"):
        FeatureCache.open(bucket / "toy.zarr")


def test_processes_that_make_the_same_cache_at_once_share_it(bucket: Url) -> None:
    found: list[FeatureCache] = []

    def make() -> None:
        found.append(FeatureCache.create_or_open(bucket / "toy.zarr", make_manifest(), make_settings()))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert (bucket / "toy.zarr").names() == ["manifest.parquet", "zarr.json"]


def test_other_settings_and_other_objects_are_refused(bucket: Url) -> None:
    fill(bucket / "toy.zarr")
    with pytest.raises(StaleCacheError, match="codec: zstd asked for, none in the cache"):
        FeatureCache.create_or_open(bucket / "toy.zarr", make_manifest(), make_settings("zstd"))
    (bucket / "mine/notes.txt").write_text("notes")
    with pytest.raises(CacheError, match="exists and is not a feature cache"):
        FeatureCache.create(bucket / "mine", make_manifest(), make_settings())
    with pytest.raises(CacheError, match=r"nothing.zarr is not a feature cache: it has no zarr.json"):
        FeatureCache.open(bucket / "nothing.zarr")


def test_new_labels_are_taken_over(bucket: Url) -> None:
    cache = fill(bucket / "toy.zarr")
    other = Manifest("toy", make_manifest().clips, heads={"label": ["x", "y"]})
    assert cache.take_labels_of(other)
    assert FeatureCache.open(bucket / "toy.zarr").manifest.heads == {"label": ["x", "y"]}


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["truncated", "gone", "entry"])
def test_a_damaged_object_makes_its_block_missing_and_the_next_run_repairs_it(
    bucket: Url, tmp_path: Path, damage: str
) -> None:
    path = bucket / "toy.zarr"
    fill(path)
    shard, entry = path / "train/features/c/1/0/0/0", path / "ledger/train/000001.json"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif damage == "gone":
        shard.unlink()
    else:
        entry.write_bytes(entry.read_bytes()[:40])
    assert FeatureCache.open(path, allow_partial=True).missing_blocks("train") == [1]
    fill(path)
    fill(tmp_path / "toy.zarr")
    assert contents(path) == contents(tmp_path / "toy.zarr")


@pytest.mark.faults
def test_an_object_that_was_cut_short_behind_the_ledgers_back_is_noticed_by_the_reader(bucket: Url) -> None:
    cache = fill(bucket / "toy.zarr")
    shard = cache.path / "train/features/c/1/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-5])
    for rows in ([4], [4, 5, 6, 7]):
        with pytest.raises(CacheError, match="checksum of its index is wrong"):
            FeatureCache.open(cache.path, allow_partial=True).read("train", rows)
    shard.unlink()
    with pytest.raises(CacheError, match=r"cannot be read \(no such object\): run `vivit extract` again"):
        cache.read("train", [4])


@pytest.mark.faults
def test_a_cache_written_through_failures_equals_the_local_one(
    proxy: FaultyProxy, bucket: Url, tmp_path: Path
) -> None:
    proxy.rate = 0.1
    path = bucket / "toy.zarr"
    fill(path, make_settings(block_size=2))
    for split, count in CLIPS.items():
        cache = FeatureCache.open(path)
        np.testing.assert_array_equal(cache.read(split), features_of(cache, split))
        np.testing.assert_array_equal(cache.read(split, [count - 1])[0], features_of(cache, split)[-1])
    proxy.rate = 0
    fill(tmp_path / "toy.zarr", make_settings(block_size=2))
    assert contents(path) == contents(tmp_path / "toy.zarr")
    assert proxy.faults.total() > 5


@pytest.mark.faults
def test_a_store_that_goes_away_is_one_error_and_the_next_run_goes_on(
    proxy: FaultyProxy, bucket: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bucket / "toy.zarr"
    monkeypatch.setenv("VIVIT_STORAGE_TRIES", "2")
    proxy.only, proxy.kinds, proxy.rate = "/train/features/c/1/", ["refuse"], 1.0
    with pytest.raises(
        StorageError, match=r"cannot write .*c/1/.* \(HTTP 503, SlowDown\).* run the same command again"
    ):
        fill(path)
    assert FeatureCache.open(path, allow_partial=True).missing_blocks("train") == [1, 2]
    proxy.rate = 0
    fill(path)
    fill(tmp_path / "toy.zarr")
    assert contents(path) == contents(tmp_path / "toy.zarr")


@pytest.mark.faults
def test_two_writers_at_once_are_one_too_many(bucket: Url) -> None:
    cache = fill(bucket / "toy.zarr")
    other = FeatureCache.open(bucket / "toy.zarr")
    with cache.lock():
        with (
            pytest.raises(CacheError, match=rf"being written by another process \(process {os.getpid()}"),
            other.lock(),
        ):
            pass
        with pytest.raises(CacheError, match="being written"), other.lock((1, 2)):
            pass
    with cache.lock((1, 2)), other.lock((2, 2)):
        pass
