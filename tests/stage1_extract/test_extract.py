import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_files import files_of
from PIL import Image

from vivit.pipeline.datasets import read_dataset
from vivit.pipeline.errors import CacheError, DataError, StaleCacheError, StorageError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.video import read_frames
from vivit.pipeline.views import ViewSpec, views_of
from vivit.stage1_extract.blocks import BlockReport, Seconds, Work, encode_clip
from vivit.stage1_extract.clip_reader import CropSettings, CropStream, crop_clips, jobs_of
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.encoder import SpatialEncoder
from vivit.stage1_extract.extract import extract
from vivit.stage1_extract.tally import Tally

VIEWS = ViewSpec(num_frames=4, stride=3, resize=40, crop_size=32, train_views=2, test_clips=2, test_crops=1)


def config_for(root: Path, cache: Path, **changes: object) -> ExtractConfig:
    config = ExtractConfig(
        cache=cache, data_root=root, backbone="vit_ti16", weights="random", views=VIEWS, device="cpu", batch_size=6,
        block_size=3, decode_threads=2,
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(video_folder: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that was extracted without disturbance."""
    cache = tmp_path_factory.mktemp("caches") / "plain.zarr"
    extract(config_for(video_folder, cache), manifest)
    return cache


def test_features_are_the_encoders_vectors_of_the_views_frames(
    video_folder: Path, manifest: Manifest, finished: Path
) -> None:
    cache = FeatureCache.open(finished)
    encoder = SpatialEncoder("vit_ti16", weights="random", crop_size=32, device="cpu", batch_size=6)
    for split in ("train", "validation"):
        clip = manifest.of_split(split)[1]
        frames = read_frames(video_folder / clip.video, np.arange(count_of(cache, split, 1)) / 25)
        crops = []
        for view in views_of(VIEWS, split=split, seed=0, clip_id=clip.clip_id):
            box = view.box(*frames.shape[1:3])
            chosen = view.frames(np.arange(len(frames)) / 25)
            crops.append(np.stack([box.crop(Image.fromarray(frames[i]), 32, "bicubic") for i in chosen]))
        wanted = encode_clip(encoder, split, np.stack(crops)).numpy().astype(np.float16)
        np.testing.assert_array_equal(cache.read(split, [1])[0], wanted)


def count_of(cache: FeatureCache, split: str, row: int) -> int:
    record = cache.records(split)[row]
    assert record is not None
    return record.num_frames


def test_a_short_clip_is_recorded_as_short(finished: Path) -> None:
    records = [r for r in FeatureCache.open(finished).records("train") if r is not None]
    short = [r for r in records if r.outcome == "short"]
    assert [(r.clip_id, r.num_frames) for r in short] == [("train/b/clip3", 5)]
    assert all(r.outcome == "ok" for r in records if r not in short)


@pytest.mark.parametrize("changes", [{"decode_threads": 1}, {"decode_threads": 5, "decode_memory_mb": 0}])
def test_the_bytes_do_not_depend_on_threads_or_memory(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path, changes: dict[str, int]
) -> None:
    extract(config_for(video_folder, tmp_path / "c.zarr", **changes), manifest)
    assert files_of(tmp_path / "c.zarr") == files_of(finished)


def test_a_finished_cache_is_left_alone(video_folder: Path, manifest: Manifest, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*/c/**/*")}
    summary = extract(config_for(video_folder, finished), manifest)
    assert (summary.blocks_done, summary.blocks_kept) == (0, 5)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*/c/**/*")} == before


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"views": replace(VIEWS, stride=2)}, {"batch_size": 4}, {"precision": "bfloat16"}],
)
def test_a_cache_with_other_settings_is_refused_and_left_alone(
    video_folder: Path, manifest: Manifest, finished: Path, changes: dict[str, object]
) -> None:
    before = files_of(finished)
    with pytest.raises(StaleCacheError, match="asked for"):
        extract(config_for(video_folder, finished, **changes), manifest)
    assert files_of(finished) == before


def test_broken_clips_change_nothing_for_their_neighbours(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"<html>not found</html>")
    broken = [
        Clip(clip_id="0-html", split="train", video=str(bad)),
        Clip(clip_id="0-missing", split="train", video="train/a/aaa.mp4"),
    ]
    mixed = Manifest("folder", [*manifest.clips, *broken], heads=manifest.heads)
    summary = extract(config_for(video_folder, tmp_path / "c.zarr"), mixed)
    assert sorted((r.clip_id, r.outcome) for _, r in summary.failures) == [
        ("0-html", "not_a_video"),
        ("0-missing", "missing"),
    ]
    cache, plain = FeatureCache.open(tmp_path / "c.zarr"), FeatureCache.open(finished)
    rows = {clip.clip_id: row for row, clip in enumerate(mixed.of_split("train"))}
    good = [rows[clip.clip_id] for clip in manifest.of_split("train")]
    np.testing.assert_array_equal(cache.read("train", good), plain.read("train"))
    assert not cache.read("train", [rows["0-html"], rows["0-missing"]]).any()
    assert sorted(cache.usable_rows("train").tolist()) == sorted(good)


def test_failed_clips_can_be_tried_again_and_the_others_keep_their_features(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path
) -> None:
    root = tmp_path / "videos"
    for clip in manifest.clips[1:]:
        (root / clip.video).parent.mkdir(parents=True, exist_ok=True)
        (root / clip.video).symlink_to(video_folder / clip.video)
    first = extract(config_for(root, tmp_path / "c.zarr"), manifest)
    assert first.outcomes["missing"] == 1
    for clip in manifest.clips[1:]:
        (root / clip.video).unlink()  # what has features is not needed again
    (root / manifest.clips[0].video).symlink_to(video_folder / manifest.clips[0].video)
    assert extract(config_for(root, tmp_path / "c.zarr"), manifest).blocks_done == 0
    again = extract(config_for(root, tmp_path / "c.zarr", retry_failed=True), manifest)
    assert (again.blocks_done, again.outcomes["missing"]) == (1, 0)
    assert files_of(tmp_path / "c.zarr") == files_of(finished)


def test_new_labels_are_taken_over_without_new_features(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "c.zarr"
    shutil.copytree(finished, cache)
    relabelled = Manifest(
        "folder", [replace(c, labels={"action": 0}) for c in manifest.clips], heads=manifest.heads
    )
    summary = extract(config_for(video_folder, cache), relabelled)
    assert summary.blocks_done == 0
    assert set(FeatureCache.open(cache).manifest.labels("train")["action"].tolist()) == {0}
    assert files_of(cache) == files_of(finished)


def test_with_a_target_rate_short_is_told_by_its_ticks(video_folder: Path, manifest: Manifest) -> None:
    clip = manifest.of_split("train")[0]
    for fps, outcome in ((None, "ok"), (5.0, "short")):
        settings = CropSettings(views=replace(VIEWS, fps=fps), seed=0, interpolation="bicubic")
        (item,) = crop_clips(video_folder / clip.video, [clip], settings)
        assert item.result.outcome == outcome


def test_finished_clips_do_not_wait_in_memory_for_their_job(video_folder: Path, manifest: Manifest) -> None:
    video = manifest.of_split("train")[0].video
    clips = [
        Clip(clip_id=str(i), split="train", video=video, start_sec=i / 25, end_sec=(i + 4) / 25)
        for i in range(8)
    ]
    settings = CropSettings(views=VIEWS, seed=0, interpolation="bicubic")
    alive = []
    for item in crop_clips(video_folder / video, clips, settings):
        alive.append(weakref.ref(item.crops))
        del item
        assert sum(reference() is not None for reference in alive) <= 1


def test_a_run_stops_at_the_failures_it_may_have_and_keeps_what_it_did(
    video_folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    gone = Clip(clip_id="z", split="validation", video="val/zzz.mp4")
    mixed = Manifest("folder", [*manifest.clips, gone], heads=manifest.heads)
    with pytest.raises(DataError, match=r"more than 0 clips have no features .*z, missing.*--max-failures"):
        extract(config_for(video_folder, tmp_path / "c.zarr", max_failures=0), mixed)
    assert FeatureCache.open(tmp_path / "c.zarr", allow_partial=True).missing_blocks("train") == []


def test_a_clip_that_fails_in_several_views_is_one_failure() -> None:
    tally = Tally(failed={("train", 4)}, max_failures=2)
    worker = tally.worker("w")
    records = [ClipRecord(clip_id="e", outcome="missing"), ClipRecord(clip_id="f", outcome="missing")]
    for views in (range(1), range(1, 3)):
        tally.block(worker, BlockReport(Work("train", 2, (4, 5), views), records, Seconds(), 0))
    assert tally.failed == 2
    with pytest.raises(DataError, match="more than 2 clips"):
        tally.block(worker, BlockReport(Work("test", 0, (4,), range(1)), records[:1], Seconds(), 0))


def test_a_wrong_data_root_is_refused_before_anything_is_written(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 11 videos is below .*looked for .*--data-root"):
        extract(config_for(tmp_path, tmp_path / "c.zarr"), manifest)
    assert not (tmp_path / "c.zarr").exists()


def test_a_run_without_any_readable_clip_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    rows = Manifest("d", [Clip(clip_id="a", split="test", video="a.mp4")])
    with pytest.raises(
        DataError, match=r"no clip could be read: all 1 failed, the first is a \(test\): empty_file"
    ):
        extract(config_for(tmp_path, tmp_path / "c.zarr"), rows)


def test_values_beyond_float16_are_an_outcome_not_a_crash(
    video_folder: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = SpatialEncoder.encode
    calls = iter(range(100))

    def too_large(self: SpatialEncoder, crops: np.ndarray) -> torch.Tensor:
        return encode(self, crops) * (1e6 if next(calls) == 2 else 1.0)  # the second clip, in its first view

    monkeypatch.setattr(SpatialEncoder, "encode", too_large)
    summary = extract(config_for(video_folder, tmp_path / "c.zarr"), manifest)
    ((split, record),) = summary.failures
    assert (split, record.clip_id, record.outcome) == (
        "train",
        manifest.of_split("train")[1].clip_id,
        "not_finite",
    )
    assert 1 not in FeatureCache.open(summary.cache).usable_rows("train")


def test_clips_of_one_video_share_a_job_up_to_a_fixed_number() -> None:
    clips = [
        Clip(clip_id=str(i), split="train", video="a" if i < 20 else str(i), start_sec=i) for i in range(22)
    ]
    assert [len(job) for job in jobs_of(clips)] == [8, 8, 4, 1, 1]


def test_segments_of_one_video_equal_each_segment_alone(video_folder: Path, manifest: Manifest) -> None:
    video = manifest.of_split("train")[0].video
    clips = [
        Clip(clip_id=str(i), split="train", video=video, start_sec=start, end_sec=end)
        for i, (start, end) in enumerate([(0.0, 0.4), (0.1, 0.3), (0.2, None), (0.2, 0.7)])
    ]
    settings = CropSettings(views=VIEWS, seed=0, interpolation="bicubic")
    together = list(crop_clips(video_folder / video, clips, settings))
    assert [item.clip.clip_id for item in together] == ["0", "1", "2", "3"]
    for item in together:
        (alone,) = crop_clips(video_folder / video, [item.clip], settings)
        assert item.result == alone.result
        np.testing.assert_array_equal(item.crops, alone.crops)


def test_leaving_the_stream_early_stops_its_threads(video_folder: Path, manifest: Manifest) -> None:
    import threading

    settings = CropSettings(views=VIEWS, seed=0, interpolation="bicubic")
    before = threading.active_count()
    with CropStream(video_folder, settings, threads=3, budget_bytes=0) as stream:
        next(stream.read([manifest.of_split("train")]))
    assert threading.active_count() == before


def run_cli(root: Path, workdir: Path) -> "subprocess.Popen[str]":
    command = [
        sys.executable, "-m", "vivit", "extract", "--dataset", "folder", "--data-root", str(root), "--workdir",
        str(workdir), "--cache", "c", "--backbone", "vit_ti16", "--weights", "random", "--num-frames", "4", "--stride",
        "3", "--resize", "40", "--crop-size", "32", "--train-views", "2", "--test-clips", "2", "--test-crops", "1",
        "--batch-size", "6", "--block-size", "1", "--device", "cpu",
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_blocks(cache: Path, count: int, process: "subprocess.Popen[str]") -> None:
    while len(list(cache.glob("ledger/*/*.json"))) < count and process.poll() is None:
        time.sleep(0.001)


@pytest.fixture(scope="module")
def one_clip_blocks(video_folder: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("caches") / "ones.zarr"
    extract(config_for(video_folder, cache, block_size=1), manifest)
    return cache


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drops_the_block_in_work_and_the_same_command_goes_on(
    video_folder: Path, one_clip_blocks: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = run_cli(video_folder, tmp_path)
    wait_for_blocks(tmp_path / "caches/c.zarr", 2, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Run the same command again to go on" in errors
    assert "Traceback" not in errors
    again = run_cli(video_folder, tmp_path)
    again.communicate(timeout=120)
    assert again.returncode == 0
    assert files_of(tmp_path / "caches/c.zarr") == files_of(one_clip_blocks)


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from vivit.pipeline.datasets import read_dataset
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.extract import extract

root, folder, kills_wanted = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
views = ViewSpec(num_frames=4, stride=3, resize=40, crop_size=32, train_views=2, test_clips=2, test_crops=1)

def start(cache):
    child = os.fork()
    if child:
        return child
    try:
        extract(ExtractConfig(cache=cache, data_root=root, backbone="vit_ti16", weights="random", views=views,
                              device="cpu", batch_size=6, block_size=1), read_dataset("folder", root)[0])
    finally:
        os._exit(0)

began, child = time.perf_counter(), start(folder / "timed.zarr")
while not list((folder / "timed.zarr").glob("ledger/*/*.json")):
    time.sleep(0.001)
loading = time.perf_counter() - began
os.waitpid(child, 0)
whole = time.perf_counter() - began
cache, draw, kills = folder / "killed.zarr", random.Random(0), 0
while kills < kills_wanted:
    child = start(cache)
    time.sleep(draw.uniform(0.9 * loading, whole))  # most of a run this short is loading
    os.kill(child, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    entries = sorted(cache.glob("ledger/*/*.json"))
    print(len(entries))
    if len(entries) == 11:  # nothing is left to disturb: forget most blocks
        for entry in draw.sample(entries, 8):
            entry.unlink()
"""


@pytest.mark.faults
def test_sigkill_at_random_moments_loses_at_most_the_block_in_work(
    video_folder: Path, manifest: Manifest, one_clip_blocks: Path, tmp_path: Path
) -> None:
    """Twelve kills. A process that has torch loaded forks the victims: starting one from nothing costs seconds."""
    killer = [sys.executable, "-c", KILLER, str(video_folder), str(tmp_path), "12"]
    done = subprocess.run(killer, capture_output=True, text=True, timeout=200, check=True)
    committed = [int(line) for line in done.stdout.split()]
    assert len(committed) >= 12
    assert len(set(committed)) > 3, f"the kills hit too few stages of the work: {committed}"
    cache = tmp_path / "killed.zarr"
    summary = extract(config_for(video_folder, cache, block_size=1), manifest)
    assert summary.outcomes.total() == len(manifest)
    assert files_of(cache) == files_of(one_clip_blocks)
    assert FeatureCache.open(cache).missing() == ""


@pytest.mark.faults
def test_two_runs_at_once_on_one_cache_are_refused(
    video_folder: Path, manifest: Manifest, finished: Path
) -> None:
    with (
        FeatureCache.open(finished).lock(),
        pytest.raises(CacheError, match="being written by another process"),
    ):
        extract(config_for(video_folder, finished), manifest)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs Linux and root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.faults
def test_a_disk_that_fills_up_costs_nothing_written_and_the_same_command_goes_on(
    video_folder: Path, manifest: Manifest, one_clip_blocks: Path, small_disk: Path
) -> None:
    config = config_for(video_folder, small_disk / "c.zarr", block_size=1)
    with pytest.raises(StorageError, match=r"the disk is full at .*run the same command again"):
        extract(config, manifest)
    done = len(list(config.cache.glob("ledger/*/*.json")))
    assert 0 < done < len(manifest)
    subprocess.run(["mount", "-o", "remount,size=8M", str(small_disk)], check=True)
    summary = extract(config, manifest)
    assert summary.blocks_kept >= done - 1
    assert files_of(config.cache) == files_of(one_clip_blocks)


PART = """
import sys
from pathlib import Path
from vivit.pipeline.datasets import read_dataset
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.extract import extract

views = ViewSpec(num_frames=4, stride=3, resize=40, crop_size=32, train_views=2, test_clips=2, test_crops=1)
root = Path(sys.argv[1])
summary = extract(ExtractConfig(cache=Path(sys.argv[2]), data_root=root, backbone="vit_ti16", weights="random", views=views,
    device="cpu", batch_size=6, block_size=1, part=(int(sys.argv[3]), 3)), read_dataset("folder", root)[0])
print(summary.blocks_done, bool(summary.missing))
"""


@pytest.mark.faults
def test_parts_at_the_same_time_write_what_one_process_writes(
    video_folder: Path, one_clip_blocks: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "parts.zarr"
    parts = [
        subprocess.Popen(
            [sys.executable, "-c", PART, str(video_folder), str(cache), str(part)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in (1, 2, 3)
    ]
    outputs = [part.communicate(timeout=200)[0].split() for part in parts]
    assert [part.returncode for part in parts] == [0, 0, 0]
    assert sorted(int(done) for done, _ in outputs) == [3, 4, 4]
    assert files_of(cache) == files_of(one_clip_blocks)
    assert FeatureCache.open(cache).missing() == ""


def test_a_part_does_its_own_blocks_and_says_what_is_left(
    video_folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    config = config_for(video_folder, tmp_path / "c.zarr", block_size=1, part=(2, 4))
    summary = extract(config, manifest)
    assert (summary.blocks_done, summary.blocks_kept) == (3, 0)
    assert "train lacks 5 of 7 blocks" in summary.missing
    assert extract(config, manifest).blocks_kept == 3
    assert extract(replace(config, part=None), manifest).missing == ""


@pytest.mark.parametrize(
    ("held", "asked"),
    [
        pytest.param(None, (1, 2), id="part of a whole run"),
        pytest.param((1, 2), None, id="whole run beside a part"),
        pytest.param((1, 2), (1, 2), id="same part"),
        pytest.param((1, 2), (2, 3), id="parts of another number"),
    ],
)
def test_writers_that_could_meet_are_refused(finished: Path, held: Any, asked: Any) -> None:
    cache = FeatureCache.open(finished)
    with (
        cache.lock(held),
        pytest.raises(CacheError, match="being written by another process"),
        cache.lock(asked),
    ):
        pass
    with cache.lock((1, 2)), cache.lock((2, 2)):
        pass


def test_all_odd_files_get_their_outcome_and_leave_the_good_ones_alone(
    shared: Callable[[str], Path], tmp_path: Path
) -> None:
    """The real clips and the broken ones together, against the real clips alone."""
    spec = ViewSpec(
        num_frames=32, stride=2, resize=40, crop_size=32, train_views=1, test_clips=1, test_crops=1
    )
    videos, odd = shared("videos"), shared("bad_videos")
    both = Manifest("both", [*clips_in(videos), *clips_in(odd)])
    config = config_for(videos.parent, tmp_path / "both.zarr", views=spec, block_size=16, batch_size=32)
    summary = extract(config, both)
    check_outcomes(
        odd,
        {
            record.clip_id: record.outcome
            for record in FeatureCache.open(summary.cache).records("test")
            if record
        },
    )
    alone = extract(replace(config, cache=tmp_path / "good.zarr"), Manifest("good", clips_in(videos)))
    assert alone.failures == []
    together, good = FeatureCache.open(summary.cache), FeatureCache.open(alone.cache)
    rows = {clip.clip_id: row for row, clip in enumerate(both.of_split("test"))}
    chosen = [rows[clip.clip_id] for clip in good.manifest.of_split("test")]
    np.testing.assert_array_equal(together.read("test", chosen), good.read("test"))


def clips_in(folder: Path) -> list[Clip]:
    manifest, _ = read_dataset("folder", folder)
    return [
        Clip(clip_id=f"{folder.name}/{c.clip_id}", split="test", video=f"{folder.name}/{c.video}")
        for c in manifest.clips
    ]


def check_outcomes(folder: Path, outcomes: dict[str, str]) -> None:
    import json

    wanted = {
        ("partial", "truncated"): {"partial"},
        ("partial", "corrupt"): {"corrupt"},
        ("ok", ""): {"ok", "short"},
    }
    for video in json.loads((folder / "expected.json").read_text())["videos"]:
        policy = video["policy"]
        name = f"bad_videos/{Path(video['file']).with_suffix('')}"
        found = outcomes.get(name) or outcomes[f"bad_videos/{video['file']}"]
        assert found in wanted.get((policy["status"], policy["reason"]), {policy["reason"]}), video["file"]
