import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pa_parquet
import pytest
import zarr
from cache_files import files_of

from vivit.pipeline.cache_check import check_cache
from vivit.pipeline.errors import CacheError, StaleCacheError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.manifest import Manifest
from vivit.pipeline.outcomes_table import write_outcomes
from vivit.pipeline.storage import Location, Url, location
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.blocks import missing_work
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.extract import ExtractSummary, _complete_outcomes, extract
from vivit.stage1_extract.inline_engine import run_inline

VIEWS = ViewSpec(num_frames=4, stride=3, resize=40, crop_size=32, train_views=1, test_clips=2, test_crops=1)


def config_for(root: Path, cache: Location, **changes: object) -> ExtractConfig:
    config = ExtractConfig(
        cache=cache, data_root=root, backbone="vit_ti16", weights="random", views=VIEWS, device="cpu", batch_size=6,
        block_size=3, decode_threads=2,
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


def outcomes_of(cache: Path) -> list[str]:
    """The outcome of each clip in each view."""
    opened = FeatureCache.open(cache)
    return [
        f"{split} {view} {record.clip_id} {record.outcome} {record.message}"
        for split in opened.splits
        for views in opened.view_ranges(split)
        for view in views
        for record in opened.records(split, views)
        if record is not None
    ]


@pytest.fixture(scope="module")
def at_once(video_folder: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that had its 4 training views from the start."""
    cache = tmp_path_factory.mktemp("caches") / "four.zarr"
    extract(config_for(video_folder, cache, views=replace(VIEWS, train_views=4)), manifest)
    return cache


@pytest.fixture(scope="module")
def one_view(video_folder: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("caches") / "one.zarr"
    extract(config_for(video_folder, cache), manifest)
    return cache


@pytest.fixture
def cache(one_view: Path, tmp_path: Path) -> Path:
    shutil.copytree(one_view, tmp_path / "c.zarr")
    return tmp_path / "c.zarr"


def appended(
    root: Path, cache: Location, manifest: Manifest, more: int = 3, **changes: object
) -> ExtractSummary:
    return extract(config_for(root, cache, more_views=more, **changes), manifest)


def stop_after(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """Let the run be interrupted when it has committed some blocks."""

    def interrupted(extractor, todo, tally):  # type: ignore[no-untyped-def]
        run_inline(extractor, todo[:blocks], tally)
        raise KeyboardInterrupt

    monkeypatch.setattr("vivit.stage1_extract.extract.run_inline", interrupted)


def test_appended_views_are_those_of_a_cache_made_at_once(
    video_folder: Path, manifest: Manifest, at_once: Path, cache: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache.glob("*/features/c/*/*/0/0")}
    summary = appended(video_folder, cache, manifest)
    assert (summary.blocks_done, summary.blocks_kept, summary.failures) == (3, 5, [])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert files_of(cache) == files_of(at_once)
    assert outcomes_of(cache) == outcomes_of(at_once)
    grown, wanted = FeatureCache.open(cache), FeatureCache.open(at_once)
    assert (grown.settings, grown.identity, grown.size_bytes()) == (
        wanted.settings,
        wanted.identity,
        wanted.size_bytes(),
    )
    np.testing.assert_array_equal(grown.read("train"), wanted.read("train"))
    assert zarr.open_array(cache / "train/features", mode="r").shape == (7, 4, 4, 192)
    assert sorted(path.name for path in (cache / "ledger/train").iterdir()) == [
        f"00000{block}{views}.json" for block in range(3) for views in (".1-3", "")
    ]
    assert check_cache(grown, is_shown=False).is_whole


def test_views_can_be_appended_in_steps(
    video_folder: Path, manifest: Manifest, at_once: Path, cache: Path
) -> None:
    appended(video_folder, cache, manifest, more=1)
    appended(video_folder, cache, manifest, more=3)
    assert files_of(cache) == files_of(at_once)
    assert FeatureCache.open(cache).view_ranges("train") == [range(1), range(1, 2), range(2, 4)]


def test_the_same_command_again_appends_nothing(
    video_folder: Path, manifest: Manifest, at_once: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "vivit")
    appended(video_folder, cache, manifest)
    assert appended(video_folder, cache, manifest).blocks_done == 0
    assert "at least the 1 + 3 asked for: none are added (--views +4 would append one more)" in caplog.text
    for views in (VIEWS, replace(VIEWS, train_views=4)):
        assert extract(config_for(video_folder, cache, views=views), manifest).blocks_done == 0
    assert files_of(cache) == files_of(at_once)


@pytest.mark.parametrize("again", [3, 0], ids=["the same command", "without --views"])
def test_an_interrupted_run_goes_on_and_no_reader_sees_half_of_it(
    video_folder: Path,
    manifest: Manifest,
    at_once: Path,
    one_view: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    again: int,
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Exception, match="interrupted"):
            appended(video_folder, cache, manifest)
    half, before = FeatureCache.open(cache), FeatureCache.open(one_view)
    assert half.unpublished_views == range(1, 4)
    assert (half.shape("train"), half.identity) == (before.shape("train"), before.identity)
    np.testing.assert_array_equal(half.read("train"), before.read("train"))
    assert half.usable_views("train").tolist() == [1] * 7
    assert zarr.open_array(cache / "train/features", mode="r").shape == (7, 1, 4, 192)
    check = check_cache(half, is_shown=False)
    assert (check.findings, check.missing) == ([], "train lacks appended views of 1 of 3 blocks")
    assert appended(video_folder, cache, manifest, more=again).blocks_done == 1
    assert files_of(cache) == files_of(at_once)


def test_more_views_wait_for_those_that_are_unfinished(
    video_folder: Path, manifest: Manifest, at_once: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Exception, match="interrupted"):
            appended(video_folder, cache, manifest, more=2)
    assert appended(video_folder, cache, manifest, more=3).blocks_done == 2 + 3
    assert files_of(cache) == files_of(at_once)


def test_a_run_that_died_before_it_published_is_published_by_the_next(
    video_folder: Path, manifest: Manifest, at_once: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "publish_views", lambda _cache: False)
        appended(video_folder, cache, manifest)
    assert FeatureCache.open(cache).shape("train")[1] == 1
    extract(config_for(video_folder, cache), manifest)
    assert FeatureCache.open(cache).shape("train")[1] == 4
    assert files_of(cache) == files_of(at_once)


def test_parts_append_their_share_and_the_last_one_publishes(
    video_folder: Path, manifest: Manifest, at_once: Path, cache: Path
) -> None:
    first = appended(video_folder, cache, manifest, part=(1, 2))
    assert "train lacks the appended views 1 to 3 of 1 of 3 blocks" in first.missing
    assert FeatureCache.open(cache).shape("train")[1] == 1
    assert appended(video_folder, cache, manifest, part=(2, 2)).missing == ""
    assert files_of(cache) == files_of(at_once)


def test_a_part_has_the_same_blocks_before_and_after_views_are_appended(
    video_folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    def share(cache: FeatureCache) -> set[tuple[str, int]]:
        return {(w.split, w.block) for w in missing_work([cache], part=(2, 3), retry_failed=False)}

    settings = config_for(video_folder, tmp_path / "c.zarr")
    from vivit.stage1_extract.blocks import create_encoder

    cache = FeatureCache.create(
        settings.cache,
        manifest,
        settings.settings("folder", manifest.sha256, create_encoder(settings).backbone),
    )
    before = share(cache)
    cache.append_views(4)
    assert share(FeatureCache.open(cache.path, allow_partial=True)) == before


def test_a_clip_without_features_is_not_read_again(
    video_folder: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "videos"
    shutil.copytree(video_folder, root)
    rows = manifest.of_split("train")
    (root / rows[1].video).unlink()
    for clip in rows[3:6]:  # all of a block
        (root / clip.video).unlink()
    both = [tmp_path / "steps.zarr", tmp_path / "four.zarr"]
    extract(config_for(root, both[0]), manifest)
    extract(config_for(root, both[1], views=replace(VIEWS, train_views=4)), manifest)
    shutil.copy(video_folder / rows[1].video, root / rows[1].video)
    summary = appended(root, both[0], manifest)
    assert [record.outcome for _, record in summary.failures if record.outcome != "short"] == ["missing"] * 4
    assert files_of(both[0]) == files_of(both[1])
    assert outcomes_of(both[0]) == outcomes_of(both[1])
    assert FeatureCache.open(both[0]).usable_views("train").tolist() == [4, 0, 4, 0, 0, 0, 4]
    assert check_cache(FeatureCache.open(both[0]), is_shown=False).is_whole


def test_a_clip_that_fails_later_keeps_its_old_views_and_can_be_tried_again(
    video_folder: Path, manifest: Manifest, at_once: Path, cache: Path, tmp_path: Path
) -> None:
    root = tmp_path / "videos"
    shutil.copytree(video_folder, root)
    gone = manifest.of_split("train")[1]
    (root / gone.video).unlink()
    summary = appended(root, cache, manifest)
    ((split, record),) = [f for f in summary.failures if f[1].outcome != "short"]
    assert (split, record.clip_id, record.outcome) == ("train", gone.clip_id, "missing")
    assert record.message.startswith("in views 1 to 3: ")
    grown = FeatureCache.open(cache)
    assert grown.shape("train")[1] == 4
    assert grown.usable_rows("train").tolist() == list(range(7))
    assert grown.usable_views("train").tolist() == [4, 1, 4, 4, 4, 4, 4]
    assert not grown.read("train", [1], [1, 2, 3]).any()
    assert check_cache(grown, is_shown=False).is_whole
    (root / gone.video).symlink_to(video_folder / gone.video)
    again = extract(config_for(root, cache, retry_failed=True), manifest)
    assert again.blocks_done == 1
    assert files_of(cache) == files_of(at_once)


def test_a_retry_fills_old_and_new_views(
    video_folder: Path, manifest: Manifest, at_once: Path, tmp_path: Path
) -> None:
    root, cache = tmp_path / "videos", tmp_path / "c.zarr"
    shutil.copytree(video_folder, root)
    gone = manifest.of_split("train")[1]
    (root / gone.video).unlink()
    extract(config_for(root, cache), manifest)
    appended(root, cache, manifest)
    (root / gone.video).symlink_to(video_folder / gone.video)
    extract(config_for(root, cache, retry_failed=True), manifest)
    assert files_of(cache) == files_of(at_once)
    assert FeatureCache.open(cache).usable_views("train").tolist() == [4] * 7


def test_a_retry_and_new_views_in_one_run(
    video_folder: Path, manifest: Manifest, at_once: Path, tmp_path: Path
) -> None:
    root, cache = tmp_path / "videos", tmp_path / "c.zarr"
    shutil.copytree(video_folder, root)
    gone = manifest.of_split("train")[1]
    (root / gone.video).unlink()
    extract(config_for(root, cache), manifest)
    (root / gone.video).symlink_to(video_folder / gone.video)
    appended(root, cache, manifest, retry_failed=True)
    assert files_of(cache) == files_of(at_once)


def test_damage_in_appended_views_is_repaired_alone(
    video_folder: Path, manifest: Manifest, at_once: Path, cache: Path
) -> None:
    appended(video_folder, cache, manifest)
    shard = cache / "train/features/c/1/2/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    (finding,) = check_cache(FeatureCache.open(cache, allow_partial=True), is_shown=False).findings
    assert finding.ledger is not None
    assert (finding.block, finding.view, finding.ledger) == (1, 2, "ledger/train/000001.1-3.json")
    FeatureCache.open(cache, allow_partial=True).withdraw(finding.ledger)
    assert (
        FeatureCache.open(cache, allow_partial=True).missing() == "train lacks 1 of 3 blocks (3 of 7 clips)"
    )
    assert extract(config_for(video_folder, cache), manifest).blocks_done == 1
    assert files_of(cache) == files_of(at_once)


def test_what_cannot_be_appended_is_one_error(
    video_folder: Path, manifest: Manifest, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(CacheError, match=r"does not exist, and --views \+3 .*--train-views 4 makes one"):
        appended(video_folder, tmp_path / "none.zarr", manifest)
    with pytest.raises(
        StaleCacheError,
        match=r"train_views: 3 asked for, 1 in the cache \(to .* --train-views 1 --views \+2\)",
    ):
        extract(config_for(video_folder, cache, views=replace(VIEWS, train_views=3)), manifest)
    with pytest.raises(StaleCacheError, match="seed: 1 asked for"):
        appended(video_folder, cache, manifest, seed=1)
    tests_only = Manifest("v", manifest.of_split("validation"), heads=manifest.heads)
    extract(config_for(video_folder, tmp_path / "v.zarr"), tests_only)
    with pytest.raises(CacheError, match="has no training clips"):
        appended(video_folder, tmp_path / "v.zarr", tests_only)


def test_views_are_appended_in_an_object_store(video_folder: Path, manifest: Manifest, at_once: Path) -> None:
    url = location("memory://views/c.zarr")
    assert isinstance(url, Url)
    extract(config_for(video_folder, url), manifest)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Exception, match="interrupted"):
            appended(video_folder, url, manifest)
    assert FeatureCache.open(url).shape("train")[1] == 1
    appended(video_folder, url, manifest)
    stored = {name: (url / name).read_bytes() for name in url.sizes_below() if "/features/" in name}
    assert stored == files_of(at_once)
    assert check_cache(FeatureCache.open(url), is_shown=False).is_whole


@pytest.mark.slow
def test_ray_workers_append_the_same_bytes(
    video_folder: Path, manifest: Manifest, at_once: Path, cache: Path
) -> None:
    pytest.importorskip("ray")
    from vivit.stage1_extract.extract import extract_on_ray

    config = config_for(video_folder, cache, more_views=3, workers=1, torch_threads=2)
    (summary,) = extract_on_ray([config], manifest)
    assert summary.blocks_done == 3
    assert files_of(cache) == files_of(at_once)


CHILD = """
import os, sys
from pathlib import Path
from vivit.pipeline.datasets import read_dataset
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.extract import _complete_outcomes, extract

root, cache, views, at = Path(sys.argv[1]), Path(sys.argv[2]), ViewSpec.from_dict(eval(sys.argv[3])), sys.argv[4]
name, _, number = at.partition(":")
original, calls = getattr(FeatureCache, name), []

def killed(*args, **kwargs):
    calls.append(1)
    if len(calls) == int(number):
        os.kill(os.getpid(), 9)
    return original(*args, **kwargs)

setattr(FeatureCache, name, killed)
extract(
    ExtractConfig(cache=cache, data_root=root, backbone="vit_ti16", weights="random", views=views, device="cpu",
                  batch_size=6, block_size=3, decode_threads=2, more_views=3),
    read_dataset("folder", root)[0],
)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "at",
    [
        "append_views:1",
        "_write_shards:2",
        "commit:3",
        "publish_views:1",
        "_write_documents:1",
        "_write_documents:2",
    ],
)
def test_a_killed_run_goes_on_with_the_same_command(
    video_folder: Path, manifest: Manifest, at_once: Path, cache: Path, at: str
) -> None:
    arguments = [video_folder, cache, VIEWS.to_dict(), at]
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert FeatureCache.open(cache).shape("train")[1] == 1
    appended(video_folder, cache, manifest)
    assert files_of(cache) == files_of(at_once)
    assert check_cache(FeatureCache.open(cache), is_shown=False).leftovers == []


def test_the_table_of_outcomes_is_that_of_the_part_that_ends_last(cache: Path) -> None:
    """Also where an older table is written after it."""
    entry = cache / "ledger" / "train" / "000000.json"
    data = entry.read_bytes()
    entry.unlink()
    behind = FeatureCache.open(cache, allow_partial=True)
    entry.write_bytes(data)
    table = write_outcomes(behind)
    assert pa_parquet.read_table(table)["outcome"].null_count == 3
    _complete_outcomes(behind)
    assert pa_parquet.read_table(table)["outcome"].null_count == 0
