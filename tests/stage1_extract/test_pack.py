"""Packed tars: their bytes, what goes on after an interruption, and features that equal those of the loose files."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vivit.pipeline.datasets import read_dataset
from vivit.pipeline.errors import ConfigError, DataError, InterruptedRunError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.storage import Location, Url
from vivit.pipeline.tar_index import TarIndex, index_path, read_member, tar_index
from vivit.pipeline.video import probe, read_frames
from vivit.pipeline.video_location import video_at
from vivit.pipeline.video_source import Stopped
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract import shard_packer
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.extract import extract
from vivit.stage1_extract.pack import PackConfig, PackSummary, pack
from vivit.stage1_extract.pack_samples import keys_of
from vivit.stage1_extract.resized_video import write_resized

VIEWS = ViewSpec(num_frames=4, stride=3, resize=40, crop_size=32, train_views=2, test_clips=2, test_crops=1)


def pack_folder(
    root: Location, out: Location, manifest: Manifest | None = None, **options: Any
) -> PackSummary:
    manifest = manifest or read_dataset("folder", root)[0]
    return pack(PackConfig(data_root=root, out=out, **({"max_count": 3} | options)), manifest)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")
    }


def features(cache: Path, root: Location, manifest: Manifest) -> dict[str, tuple[str, bytes]]:
    """Outcome and features of each clip."""
    config = ExtractConfig(
        cache=cache, data_root=root, backbone="vit_ti16", weights="random", views=VIEWS, device="cpu", batch_size=6,
        block_size=3, decode_threads=2,
    )  # fmt: skip
    extract(config, manifest)
    done = FeatureCache.open(cache)
    found = {}
    for split in manifest.splits:
        for row, record in enumerate(done.records(split)):
            assert record is not None
            found[record.clip_id] = (record.outcome, done.read(split, [row]).tobytes())
    return found


@pytest.fixture(scope="module")
def packed(video_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    pack_folder(video_folder, out)
    return out


@pytest.fixture
def videos(video_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(video_folder, tmp_path / "videos"))


def test_shards_hold_the_videos_as_they_are(video_folder: Path, packed: Path) -> None:
    loose, manifest = read_dataset("folder", video_folder)[0], Manifest.read(packed / "manifest.parquet")
    assert [path.name for path in sorted(packed.glob("*.tar"))] == [
        "train-000000.tar", "train-000001.tar", "train-000002.tar", "validation-000000.tar", "validation-000001.tar",
    ]  # fmt: skip
    assert (manifest.dataset, manifest.heads) == (loose.dataset, loose.heads)
    for before, after in zip(loose.clips, manifest.clips, strict=True):
        assert replace(after, video=before.video) == before
        tar, _, member = after.video.partition("::")
        assert read_member(packed / tar, member) == (video_folder / before.video).read_bytes()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the library leaves its files open
def test_shards_open_with_the_webdataset_library(video_folder: Path, packed: Path) -> None:
    import webdataset

    tars = sorted(map(str, packed.glob("train-*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode())
    assert [sample["__key__"] for sample in samples] == [
        f"train_{'ab'[n % 2]}_clip{n}" for n in (0, 2, 4, 6, 1, 3, 5)
    ]
    for sample in samples:
        (clip,) = sample["json"]["clips"]
        assert sample["mp4"] == (video_folder / sample["json"]["video"]).read_bytes()
        assert clip["clip_id"] == sample["json"]["video"].removesuffix(".mp4")
        assert clip["labels"]["action"] == {"id": sample["cls"], "name": "ab"[sample["cls"]]}


def test_features_from_tars_equal_those_from_loose_files(
    video_folder: Path, packed: Path, tmp_path: Path
) -> None:
    loose = features(tmp_path / "loose.zarr", video_folder, read_dataset("folder", video_folder)[0])
    manifest = Manifest.read(packed / "manifest.parquet")
    assert features(tmp_path / "packed.zarr", packed, manifest) == loose
    foreign = Url("memory", "packed", "foreign")  # without indexes
    for path in packed.glob("*.tar"):
        (foreign / path.name).write_bytes(path.read_bytes())
    assert features(tmp_path / "foreign.zarr", foreign, read_dataset("webdataset", foreign)[0]) == loose


def test_packed_tars_are_a_data_set_of_tars_too(video_folder: Path, packed: Path) -> None:
    ours, found = Manifest.read(packed / "manifest.parquet"), read_dataset("webdataset", packed)[0]
    assert found.heads == ours.heads
    assert [replace(clip, source={}) for clip in ours.clips] == found.clips


def test_the_same_command_again_keeps_what_is_there(video_folder: Path, packed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in packed.glob("*.tar*")}
    summary = pack_folder(video_folder, packed)
    assert (summary.shards, summary.shards_kept) == ({"train": 3, "validation": 2}, 5)
    assert {path: path.stat().st_mtime_ns for path in packed.glob("*.tar*")} == before


@pytest.mark.parametrize("damage", ["cut", "header", "no tar", "no index and no tar"])
def test_a_damaged_shard_is_packed_again(
    video_folder: Path, packed: Path, tmp_path: Path, damage: str
) -> None:
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    tar = out / "train-000001.tar"
    if damage == "cut":
        tar.write_bytes(tar.read_bytes()[:5000])
    elif damage == "header":
        data = bytearray(tar.read_bytes())
        data[:8] = b"overwrit"
        tar.write_bytes(data)
    else:
        tar.unlink()
        if damage == "no index and no tar":
            index_path(tar).unlink()
    assert pack_folder(video_folder, out).shards_kept == 4
    assert files_of(out) == files_of(packed)


def test_an_interrupted_pack_goes_on_to_the_same_bytes(
    video_folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = shard_packer._pieces
    count = iter(range(100))

    def interrupted(file: Any) -> Any:
        if next(count) == 5:
            raise KeyboardInterrupt
        return pieces(file)

    monkeypatch.setattr(shard_packer, "_pieces", interrupted)
    with pytest.raises(InterruptedRunError, match="same command again"):
        pack_folder(video_folder, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".lock", "train-000000.tar", "train-000000.tar.index.json",
    ]  # fmt: skip
    leftover = tmp_path / "out/.partial/train-000001.tar"  # as of a process that was killed
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    assert pack_folder(video_folder, tmp_path / "out").shards_kept == 1
    assert not leftover.parent.exists()
    assert files_of(tmp_path / "out") == files_of(packed)


@pytest.mark.faults
def test_a_killed_pack_goes_on_to_the_same_bytes(video_folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "vivit", "pack", "--dataset", "folder", "--data-root", video_folder, "--out", tmp_path / "out",
        "--max-count", "2", "--resize", "32", "--workdir", tmp_path / "work",
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "out").glob("*.tar")) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)  # 0: it was faster
    kept = len(list((tmp_path / "out").glob("*.tar")))
    assert kept > 0
    pack_folder(video_folder, tmp_path / "whole", max_count=2, resize=32)
    assert pack_folder(video_folder, tmp_path / "out", max_count=2, resize=32).shards_kept == kept
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_folder_with_other_shards_is_refused(video_folder: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"train-000000.tar was not packed from these clips with these options"
    ):
        pack_folder(video_folder, packed, max_count=4)
    (tmp_path / "train-000000.tar").write_bytes(b"somebody's")
    with pytest.raises(DataError, match="choose another --out"):
        pack_folder(video_folder, tmp_path)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"somebody's"


def test_videos_that_cannot_be_read_are_listed_and_the_others_packed(
    videos: Path, shared: Callable[[str], Path], tmp_path: Path
) -> None:
    manifest = read_dataset("folder", videos)[0]
    (videos / "train/a/clip0.mp4").unlink()
    (videos / "train/a/clip2.mp4").write_text("no video")
    (videos / "train/b/clip3.mp4").write_bytes(shared("bad_videos/faststart_cut60.mp4").read_bytes())
    summary = pack_folder(videos, tmp_path / "out", manifest)
    assert [(video.video, video.num_clips, video.outcome) for video in summary.failed] == [
        ("train/a/clip0.mp4", 1, "missing"),
        ("train/a/clip2.mp4", 1, "not_a_video"),
    ]
    assert (summary.num_videos, summary.num_clips) == (9, 9)
    packed = Manifest.read(tmp_path / "out/manifest.parquet")
    outcomes = {
        clip: found[0] for clip, found in features(tmp_path / "c.zarr", tmp_path / "out", packed).items()
    }
    assert outcomes["train/a/clip0"] == outcomes["train/a/clip2"] == "missing"
    assert outcomes["train/b/clip3"] == "partial"  # damage that a decoder copes with is packed as it is
    assert list(outcomes.values()).count("ok") == 8


def test_a_video_that_comes_back_ends_in_the_same_bytes(videos: Path, packed: Path, tmp_path: Path) -> None:
    manifest = read_dataset("folder", videos)[0]
    video = videos / "val/a/clip8.mp4"
    data = video.read_bytes()
    video.unlink()
    assert len(pack_folder(videos, tmp_path / "out", manifest).failed) == 1
    assert not (tmp_path / "out/validation-000001.tar").exists()
    video.write_bytes(data)
    assert pack_folder(videos, tmp_path / "out", manifest).shards_kept == 3
    assert files_of(tmp_path / "out") == files_of(packed)


def test_shards_behind_the_last_one_are_removed(videos: Path, packed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    manifest = read_dataset("folder", videos)[0]
    (videos / "val/a/clip8.mp4").unlink()
    (out / "validation-000000.tar").unlink()
    assert pack_folder(videos, out, manifest).shards["validation"] == 1
    assert sorted(path.name for path in out.glob("val*")) == [
        "validation-000000.tar",
        "validation-000000.tar.index.json",
    ]


def test_nothing_to_pack_is_an_error(videos: Path, tmp_path: Path) -> None:
    manifest = Manifest("mine", [Clip(clip_id="a", split="train", video="gone.mp4")])
    with pytest.raises(
        DataError, match=r"none of the 1 videos can be packed, the first is gone.mp4: no such file"
    ):
        pack_folder(videos, tmp_path / "out", manifest)


def test_a_video_that_clips_share_is_stored_once(video_folder: Path, tmp_path: Path) -> None:
    clips = [
        Clip(clip_id=f"c{n}", split="train", video="train/a/clip0.mp4", start_sec=n / 10, end_sec=n / 10 + 0.3, labels={"x": n},
             source={"narration": f"cut {n}"})
        for n in range(3)
    ]  # fmt: skip
    manifest = Manifest("mine", clips, heads={"x": ["one", "two", "three"]})
    summary = pack_folder(video_folder, tmp_path / "out", manifest)
    assert (summary.num_videos, summary.num_clips) == (1, 3)
    tar = tmp_path / "out/train-000000.tar"
    assert list(tar_index(tar).members) == ["train_a_clip0.json", "train_a_clip0.mp4"]
    about = json.loads(read_member(tar, "train_a_clip0.json"))
    assert [clip["clip_id"] for clip in about["clips"]] == ["c0", "c1", "c2"]
    assert about["clips"][1]["labels"] == {"x": {"id": 1, "name": "two"}}
    assert about["clips"][2]["source"] == {"narration": "cut 2"}
    packed = Manifest.read(tmp_path / "out/manifest.parquet")
    loose = features(tmp_path / "a.zarr", video_folder, manifest)
    assert features(tmp_path / "b.zarr", tmp_path / "out", packed) == loose


def test_keys_have_no_dots_and_are_unique() -> None:
    keys = keys_of(["a/b.c", "a_b_c", "x" * 200, "动作", "", "plain-1_2", "__meta__", "A/b.c"])
    assert len({key.lower() for key in keys}) == len(keys)
    assert all(
        key.isascii() and "." not in key and "/" not in key and not key.startswith("_") for key in keys
    )
    assert max(map(len, keys)) <= 80
    assert keys[5] == "plain-1_2"


def test_shards_do_not_exceed_their_size(
    video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_dataset("folder", video_folder)[0]
    sizes = [(video_folder / clip.video).stat().st_size for clip in manifest.clips]
    monkeypatch.setattr(shard_packer, "_MIB", 1)
    limit = max(sizes) + min(sizes) + 8 * 1024
    pack_folder(video_folder, tmp_path, manifest, max_count=None, shard_size_mb=limit)
    tars = list(tmp_path.glob("*.tar"))
    assert 2 < len(tars) < 11
    assert max(tar.stat().st_size for tar in tars) <= limit
    one_each = pack_folder(video_folder, tmp_path / "tiny", manifest, max_count=None, shard_size_mb=1)
    assert sum(one_each.shards.values()) == 11


def test_a_store_gets_the_same_shards(video_folder: Path, packed: Path) -> None:
    out = Url("memory", "packed", "written")
    pack_folder(video_folder, out)
    wanted = files_of(packed)
    assert {name: (out / name).read_bytes() for name in out.sizes_below()} == wanted
    assert pack_folder(video_folder, out).shards_kept == 5


def test_resized_videos_show_the_same_frames_at_the_same_times(video_folder: Path, tmp_path: Path) -> None:
    manifest = read_dataset("folder", video_folder)[0]
    for name, threads in (("a", 1), ("b", 3)):
        summary = pack_folder(video_folder, tmp_path / name, manifest, resize=32, threads=threads)
        assert not summary.failed
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    for before, after in zip(
        manifest.clips, Manifest.read(tmp_path / "a/manifest.parquet").clips, strict=True
    ):
        old, new = video_folder / before.video, video_at(tmp_path / "a", after.video)
        about, smaller = probe(old), probe(new)
        assert (smaller.height, smaller.width) == (32, 42)
        assert (smaller.num_frames, smaller.frame_rate) == (about.num_frames, about.frame_rate)
        assert smaller.duration_sec == pytest.approx(about.duration_sec, abs=1e-6)
    times = np.arange(about.num_frames) / 25
    large, small = read_frames(old, times).astype(float), read_frames(new, times).astype(float)
    np.testing.assert_allclose(small.mean(axis=(1, 2)), large.mean(axis=(1, 2)), atol=4)  # colours stay
    moved = [np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3)) for frames in (large, small)]
    assert moved[1].min() > 0.2 * moved[0].min()  # no frame stands still


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vfr.mp4", None),
        ("rotate90.mp4", None),
        ("odd_175x131_vp9_yuv420p.webm", None),
        ("edit_list_trim.mp4", None),
        ("negative_start.mkv", None),
        ("res_change_h264.ts", "kept"),
        ("faststart_cut60.mp4", "kept"),
        ("tiny_16x16.mp4", "kept"),
    ],
)
def test_odd_videos_are_resized_or_kept(
    shared: Callable[[str], Path], tmp_path: Path, name: str, size: str | None
) -> None:
    video = shared(f"bad_videos/{name}")
    manifest = Manifest("mine", [Clip(clip_id="a", split="test", video=video.name)])
    assert not pack_folder(video.parent, tmp_path, manifest, resize=64).failed
    ((member, _),) = [
        item for item in tar_index(tmp_path / "test-000000.tar").members.items() if "json" not in item[0]
    ]
    source = video_at(tmp_path, f"test-000000.tar::{member}")
    if size == "kept":
        assert read_member(tmp_path / "test-000000.tar", member) == video.read_bytes()
        return
    about, smaller = probe(video), probe(source)
    assert member == "a.mp4"
    assert min(smaller.height, smaller.width) == 64
    assert smaller.num_frames == about.num_frames
    assert (smaller.height > smaller.width) == (about.height > about.width)
    assert smaller.duration_sec == pytest.approx(about.duration_sec, abs=0.05)


def test_encoding_stops_when_told(video_folder: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        write_resized(video_folder / "train/a/clip0.mp4", 32, tmp_path / "x.mp4", stop)


@pytest.mark.parametrize("options", [{"resize": 33}, {"resize": 8}, {"max_count": 0}, {"shard_size_mb": 0}])
def test_options_that_cannot_work_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        PackConfig(data_root=Path("a"), out=Path("b"), **options)


def test_an_index_says_what_is_in_its_shard(packed: Path) -> None:
    tar = packed / "train-000000.tar"
    index = TarIndex.from_json(index_path(tar).read_bytes())
    assert all(member.sha256 for member in index.content.members)
    assert index.size_bytes == tar.stat().st_size
    assert tar_index(tar).is_stored


def test_every_clip_of_a_mixed_tar_has_an_outcome(shared: Callable[[str], Path], tmp_path: Path) -> None:
    root = tmp_path / "tars"
    root.mkdir()
    for name in ("mixed", "truncated", "path_traversal"):
        (root / f"{name}-test.tar").write_bytes(shared(f"bad_videos/wds_{name}.tar").read_bytes())
    found = features(tmp_path / "c.zarr", root, read_dataset("webdataset", root)[0])
    assert {clip: outcome for clip, (outcome, _) in found.items()} == {
        "mixed-test/000000": "ok",
        "mixed-test/000001": "ok",
        "000002": "unreadable_container",
        "000004": "ok",
        "000005": "empty_file",
        "sub/dir/000009": "ok",
        "truncated-test/000000": "ok",
        "path_traversal-test/000000": "ok",
        "path_traversal-test/000001": "ok",
    }
    assert found["truncated-test/000000"] == found["mixed-test/000000"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.zarr", "tars"]
    assert len(list(root.iterdir())) == 3
