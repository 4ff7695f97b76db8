import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from vivit.pipeline.cache_settings import Backbone, CacheSettings
from vivit.pipeline.errors import CacheError, ConfigError, IncompleteCacheError, StaleCacheError, StorageError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.views import ViewSpec
from vivit.pipeline.workspace import partial_of

BACKBONE = Backbone(name="tiny", weights="random:0", weights_sha256="00", embed_dim=6)
VIEWS = ViewSpec(num_frames=3, train_views=2, test_clips=2, test_crops=1)


def make_manifest() -> Manifest:
    clips = [
        Clip(clip_id=f"c{i:02d}", split="train" if i < 10 else "validation", video=f"{i:02d}.mp4")
        for i in range(15)
    ]
    return Manifest("toy", clips)


def make_settings(**changes: object) -> CacheSettings:
    settings = CacheSettings(
        dataset="toy", manifest_sha256=make_manifest().sha256, backbone=BACKBONE, views=VIEWS, block_size=4
    )
    return replace(settings, **changes)  # type: ignore[arg-type]


def records_of(cache: FeatureCache, split: str, block: int, outcome: str = "ok") -> list[ClipRecord]:
    start, stop = cache.rows(split, block)
    return [
        ClipRecord(clip_id=c.clip_id, outcome=outcome) for c in cache.manifest.of_split(split)[start:stop]
    ]


def fill(cache: FeatureCache, *, leave_out: tuple[tuple[str, int], ...] = ()) -> dict[str, np.ndarray]:
    """Commit random features; row 1 of each split is all zeros, as of a failed clip."""
    rng = np.random.default_rng(0)
    features = {split: rng.normal(size=cache.shape(split)).astype(np.float16) for split in cache.splits}
    for split, values in features.items():
        values[1] = 0
        for block in range(cache.num_blocks(split)):
            if (split, block) not in leave_out:
                cache.commit(
                    split, block, values[slice(*cache.rows(split, block))], records_of(cache, split, block)
                )
    return features


@pytest.fixture(params=["none", "zstd"])
def filled(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[FeatureCache, dict[str, np.ndarray]]:
    cache = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings(codec=request.param))
    features = fill(cache)
    return FeatureCache.open(tmp_path / "toy.zarr"), features


def test_what_is_read_is_what_was_committed(filled: tuple[FeatureCache, dict[str, np.ndarray]]) -> None:
    cache, features = filled
    for split in cache.splits:
        np.testing.assert_array_equal(cache.read(split), features[split])


def test_plain_zarr_gives_the_same_numbers_as_our_reader(
    filled: tuple[FeatureCache, dict[str, np.ndarray]],
) -> None:
    cache, _ = filled
    group = zarr.open_group(cache.path, mode="r")
    for split in cache.splits:
        np.testing.assert_array_equal(group[f"{split}/features"][:], cache.read(split))


@pytest.mark.parametrize("rows", [[9, 0, 3, 3, 8], [4, 5, 6, 7], [2], []])
@pytest.mark.parametrize("views", [[0], [1, 0]])
def test_any_rows_and_views_can_be_read(
    filled: tuple[FeatureCache, dict[str, np.ndarray]], rows: list[int], views: list[int]
) -> None:
    cache, features = filled
    wanted = features["train"][np.array(rows, int)][:, views]
    np.testing.assert_array_equal(cache.read("train", rows, views), wanted)


def test_rows_and_views_that_are_not_there_are_refused(
    filled: tuple[FeatureCache, dict[str, np.ndarray]],
) -> None:
    cache, _ = filled
    with pytest.raises(IndexError, match=r"rows 3\.\.10 .* has 10 clips"):
        cache.read("train", [3, 10])
    with pytest.raises(IndexError, match=r"views \[2\] .* has 2 views"):
        cache.read("train", [3], [2])
    with pytest.raises(CacheError, match="no split 'test': it has train, validation"):
        cache.read("test")


def test_one_shard_is_one_block_of_one_view(tmp_path: Path) -> None:
    cache = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings())
    fill(cache)
    shards = sorted(p.relative_to(cache.path).as_posix() for p in (cache.path / "train").rglob("c/*/*/*/*"))
    assert shards == [f"train/features/c/{block}/{view}/0/0" for block in range(3) for view in range(2)]


def test_the_same_features_make_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        cache = FeatureCache.create(tmp_path / f"{name}.zarr", make_manifest(), make_settings())
        fill(cache)
        files = sorted(p for p in cache.path.rglob("*") if p.is_file())
        digests.append([(p.relative_to(cache.path).as_posix(), p.read_bytes()) for p in files])
    assert digests[0] == digests[1]


def test_leftovers_of_a_killed_run_neither_reach_the_new_bytes_nor_stay(tmp_path: Path) -> None:
    def files(cache: FeatureCache) -> set[str]:
        return {path.relative_to(cache.path).as_posix() for path in cache.path.rglob("*") if path.is_file()}

    whole = FeatureCache.create(tmp_path / "a.zarr", make_manifest(), make_settings())
    fill(whole)
    other = FeatureCache.create(tmp_path / "b.zarr", make_manifest(), make_settings())
    shard = other.path / "train/features/c/2/1/0/0"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"half a shard")
    shard.with_name("0.4f2a.partial").write_bytes(b"what zarr had begun")
    (other.path / "ledger/train").mkdir(parents=True)
    (other.path / "ledger/train/.000002.json.77.partial").write_bytes(b"half an entry")
    fill(other)
    assert files(other) == files(whole)
    assert shard.read_bytes() == (whole.path / "train/features/c/2/1/0/0").read_bytes()


def test_a_block_without_ledger_entry_is_missing(tmp_path: Path) -> None:
    cache = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings())
    fill(cache, leave_out=(("train", 1),))
    with pytest.raises(
        IncompleteCacheError, match=r"train lacks 1 of 3 blocks \(4 of 10 clips\).*--allow-partial"
    ):
        FeatureCache.open(cache.path)
    partial = FeatureCache.open(cache.path, allow_partial=True)
    assert partial.missing_blocks("train") == [1]
    assert partial.usable_rows("train").tolist() == [0, 1, 2, 3, 8, 9]
    assert [r is None for r in partial.records("train")] == [False] * 4 + [True] * 4 + [False] * 2
    with pytest.raises(IncompleteCacheError, match=r"blocks \[1\]"):
        partial.read("train", [5])


@pytest.mark.parametrize("damage", ["delete", "truncate", "ledger"])
def test_a_damaged_block_counts_as_missing(tmp_path: Path, damage: str) -> None:
    cache = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings())
    fill(cache)
    shard, ledger = cache.path / "train/features/c/1/0/0/0", cache.path / "ledger/train/000001.json"
    if damage == "delete":
        shard.unlink()
    elif damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-5])
    else:
        ledger.write_text(ledger.read_text()[:40])
    assert FeatureCache.open(cache.path, allow_partial=True).missing_blocks("train") == [1]


def test_a_damaged_index_is_noticed_by_the_reader(tmp_path: Path) -> None:
    cache = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings())
    fill(cache)
    shard = cache.path / "train/features/c/1/0/0/0"
    data = bytearray(shard.read_bytes())
    data[-10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheError, match="checksum of its index is wrong"):
        cache.read("train", [5])


def test_a_block_counts_as_missing_while_it_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings())
    fill(cache)

    def killed(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureCache, "_write_shards", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.commit("train", 1, np.zeros((4, 2, 3, 6), np.float16), records_of(cache, "train", 1))
    assert FeatureCache.open(cache.path, allow_partial=True).missing_blocks("train") == [1]


def test_a_manifest_of_other_clips_is_refused(tmp_path: Path) -> None:
    cache = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings())
    other = Manifest("toy", [replace(clip, clip_id=f"x{clip.clip_id}") for clip in cache.manifest.clips])
    other.write(cache.path / "manifest.parquet")
    with pytest.raises(CacheError, match="does not hold the clips that the cache was made of"):
        FeatureCache.open(cache.path, allow_partial=True)


def test_a_folder_with_other_things_in_it_is_not_made_a_cache(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(CacheError, match="exists and is not a feature cache"):
        FeatureCache.create(tmp_path / "mine", make_manifest(), make_settings())
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_renamed_weights_and_data_sets_are_the_same_cache(tmp_path: Path) -> None:
    path = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings()).path
    renamed = make_settings(dataset="copy", backbone=replace(BACKBONE, weights="file:other-name.pth"))
    assert FeatureCache.create_or_open(path, make_manifest(), renamed).path == path


def test_failed_clips_are_not_usable(tmp_path: Path) -> None:
    cache = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings())
    fill(cache)
    records = records_of(cache, "train", 0)
    records[2] = replace(records[2], outcome="missing", message="no such file")
    cache.commit("train", 0, np.zeros((4, 2, 3, 6), np.float16), records)
    again = FeatureCache.open(cache.path)
    assert again.usable_rows("train").tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert again.records("train")[2] == records[2]


def test_other_settings_are_refused_with_the_differences(tmp_path: Path) -> None:
    path = tmp_path / "toy.zarr"
    FeatureCache.create(path, make_manifest(), make_settings())
    asked = make_settings(views=replace(VIEWS, num_frames=8), backbone=replace(BACKBONE, weights_sha256="11"))
    with pytest.raises(StaleCacheError) as caught:
        FeatureCache.create_or_open(path, make_manifest(), asked)
    text = str(caught.value)
    assert "views.num_frames: 8 asked for, 3 in the cache" in text
    assert "backbone.weights_sha256: 11 asked for, 00 in the cache" in text
    assert "stride" not in text
    assert "--cache" in text


def test_settings_come_back_equal_from_disk(tmp_path: Path) -> None:
    settings = make_settings(codec="zstd")
    path = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), settings).path
    opened = FeatureCache.open(path, allow_partial=True)
    assert opened.settings == settings
    assert opened.manifest.clips == make_manifest().clips


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    cache = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings())
    other = FeatureCache.open(cache.path, allow_partial=True)
    holder = f"being written by another process .process {os.getpid()}"
    with cache.lock(), pytest.raises(CacheError, match=holder), other.lock():
        pass
    with cache.lock():
        pass


def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    cache = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings())
    code = (
        "import os, sys; from pathlib import Path; from vivit.pipeline.feature_cache import FeatureCache\n"
        "with FeatureCache.open(Path(sys.argv[1]), allow_partial=True).lock(): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(cache.path)], check=False).returncode == -9
    with cache.lock():
        pass


@pytest.mark.parametrize(
    "content", [None, "{}", "not json", '{"attributes": {"vivit": {"format_version": 99, "settings": {}}}}']
)
def test_what_is_no_cache_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(CacheError, match=r"not a feature cache|does not describe|format version 99"):
        FeatureCache.open(tmp_path)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((3, 2, 3, 6), np.float16), "expected float16"),
        (np.zeros((4, 2, 3, 6), np.float32), "expected float16"),
        (np.full((4, 2, 3, 6), np.inf, np.float16), "not finite"),
    ],
)
def test_a_block_of_another_shape_or_with_infinities_is_not_written(
    tmp_path: Path, features: np.ndarray, message: str
) -> None:
    cache = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings())
    with pytest.raises(ValueError, match=message):
        cache.commit("train", 0, features, records_of(cache, "train", 0))
    assert cache.missing_blocks("train") == [0, 1, 2]


def test_the_ledger_holds_checksums_and_outcomes(tmp_path: Path) -> None:
    import hashlib

    cache = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings())
    fill(cache)
    entry = json.loads((cache.path / "ledger/train/000002.json").read_text())
    assert entry["rows"] == [8, 10]
    assert [clip["clip_id"] for clip in entry["clips"]] == ["c08", "c09"]
    for name, shard in entry["shards"].items():
        data = (cache.path / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])


def test_a_full_disk_is_one_sentence_and_costs_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings())
    features = fill(cache, leave_out=(("train", 2),))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="the disk is full"):
            cache.commit("train", 2, features["train"][8:], records_of(cache, "train", 2))
    again = FeatureCache.open(cache.path, allow_partial=True)
    assert again.missing_blocks("train") == [2]
    np.testing.assert_array_equal(again.read("train", range(8)), features["train"][:8])


@pytest.mark.parametrize(
    "values", [{"block_size": 0}, {"codec": "lz4"}, {"backbone": replace(BACKBONE, tubelet=4)}]
)
def test_bad_settings_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        make_settings(**values)


@pytest.mark.parametrize("steps", ["4", [4, 2], [3, 5], [0, 2], [True, "2"]])
def test_a_damaged_record_of_appended_views_is_one_error(tmp_path: Path, steps: object) -> None:
    cache = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings())
    file = tmp_path / "toy.zarr/zarr.json"
    about = json.loads(file.read_bytes())
    about["attributes"]["vivit"]["train_views"] = steps
    file.write_text(json.dumps(about))
    with pytest.raises(CacheError, match=r"train_views .* are not growing numbers with 2 among them"):
        FeatureCache.open(cache.path, allow_partial=True)


def test_an_entry_that_is_withdrawn_while_the_ledger_is_read_is_missing(tmp_path: Path) -> None:
    cache = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings())
    fill(cache)
    entry = cache.path / "ledger" / "train" / "000001.json"
    entry.unlink()
    entry.symlink_to("gone")  # is listed, and not there when it is opened
    assert FeatureCache.open(cache.path, allow_partial=True).missing_blocks("train") == [1]


def test_an_entry_of_other_rows_moves_no_record(tmp_path: Path) -> None:
    cache = FeatureCache.create(tmp_path / "toy.zarr", make_manifest(), make_settings())
    fill(cache)
    ledger = cache.path / "ledger" / "train"
    (ledger / "000001.json").write_bytes((ledger / "000002.json").read_bytes())
    found = FeatureCache.open(cache.path).records("train")
    assert [record and record.clip_id for record in found] == [
        *(f"c{row:02d}" for row in range(4)), *4 * [None], "c08", "c09"
    ]  # fmt: skip


def test_a_part_that_is_behind_takes_no_views_back(tmp_path: Path) -> None:
    path = tmp_path / "toy.zarr"
    fill(FeatureCache.create(path, make_manifest(), make_settings()))

    def append(total: int) -> FeatureCache:
        FeatureCache.open(path).append_views(total)
        cache = FeatureCache.open(path)
        views = range(total - 1, total)
        for block in range(cache.num_blocks("train")):
            start, stop = cache.rows("train", block)
            features = np.ones((stop - start, 1, *cache.shape("train")[2:]), np.float16)
            cache.commit("train", block, features, records_of(cache, "train", block), views=views)
        return FeatureCache.open(path)

    behind = append(3)
    assert FeatureCache.open(path).publish_views()
    assert append(4).publish_views()
    assert behind.publish_views()  # what it would publish is published
    assert FeatureCache.open(path).shape("train")[1] == 4
    behind.append_views(4)
    assert [views.stop for views in FeatureCache.open(path).view_ranges("train")] == [2, 3, 4]


def test_writers_of_one_file_in_containers_do_not_share_what_is_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert partial_of(tmp_path / "a") != partial_of(tmp_path / "a")
