"""The Ray engine against `--workers 0`: one Ray session for the module, and real deaths of real processes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from cache_files import files_of

from vivit.pipeline.errors import BlockError, CacheError, ConfigError, StorageError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract import ray_decode, ray_engine
from vivit.stage1_extract.blocks import BlockExtractor, torch_threads
from vivit.stage1_extract.clip_reader import ClipCrops, CropSettings, crop_clips
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.extract import extract, extract_on_ray
from vivit.stage1_extract.ray_session import Placement, ray_session
from vivit.stage1_extract.ray_worker import Mark, Worker

ray = pytest.importorskip("ray", reason="needs ray: pip install 'vivit[ray]'")

VIEWS = ViewSpec(
    num_frames=4, stride=3, resize=40, crop_size=32, train_views=2, test_clips=2, test_crops=1,
    augment="reference-randaugment-n3-m2",
)  # fmt: skip


def config_for(root: Path, cache: Path, **changes: object) -> ExtractConfig:
    config = ExtractConfig(
        cache=cache, data_root=root, backbone="vit_ti16", weights="random", views=VIEWS, device="cpu", batch_size=6,
        block_size=2, decode_threads=1, torch_threads=1, workers=1,
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


def records_of(cache: Path) -> list[Any]:
    opened = FeatureCache.open(cache)
    return [record for split in opened.splits for record in opened.records(split)]


@pytest.fixture(scope="module")
def finished(video_folder: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    cache = tmp_path_factory.mktemp("caches") / "plain.zarr"
    extract(config_for(video_folder, cache, workers=0), manifest)
    return cache


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    """Ray with two cores; the runs of the module use it and leave it."""
    os.environ.setdefault("RAY_AUTH_TOKEN", "vivit-tests")
    ray.init(
        address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False,
        object_store_memory=100 << 20,
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.mark.usefixtures("session")
def test_two_workers_write_what_one_process_writes(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path
) -> None:
    summary = extract(config_for(video_folder, tmp_path / "c.zarr", workers=2), manifest)
    assert (summary.blocks_done, summary.blocks_kept, summary.missing) == (6, 0, "")
    assert files_of(summary.cache) == files_of(finished)
    assert records_of(summary.cache) == records_of(finished)
    assert not list(summary.cache.glob(".run*"))
    assert set(summary.limits) == {"decode", "encode", "write"}


@pytest.mark.faults
@pytest.mark.usefixtures("session")
def test_a_killed_worker_is_replaced_and_a_failing_block_is_tried_three_times_and_named(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path
) -> None:
    """Both in one run, since a worker takes seconds to start."""
    cache, killed, tried = tmp_path / "c.zarr", tmp_path / "killed", tmp_path / "tried"

    class Disturbed(BlockExtractor):
        def commit(self, computed: Any) -> None:
            if len(list(cache.glob("ledger/*/*.json"))) == 2 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            super().commit(computed)

        def compute(self, work: Any, *args: Any, **options: Any) -> Any:
            if (work.split, work.block) == ("validation", 1):
                with tried.open("a") as file:
                    file.write("x")
                raise ValueError("no such luck\nnor here")
            return super().compute(work, *args, **options)

    with pytest.raises(
        BlockError,
        match=r"1 of 6 blocks failed 3 times .*: validation block 1 \(ValueError: no such luck\)\. .*again",
    ):
        extract_on_ray([config_for(video_folder, cache)], manifest, extractor=Disturbed)
    assert killed.exists()
    assert 3 <= len(tried.read_text()) <= 4  # the killed worker may have begun it too
    left = FeatureCache.open(cache, allow_partial=True)
    assert (left.missing_blocks("train"), left.missing_blocks("validation")) == ([], [1])
    extract(config_for(video_folder, cache, workers=0), manifest)
    assert files_of(cache) == files_of(finished)


@pytest.mark.faults
@pytest.mark.usefixtures("session")
def test_a_clip_that_kills_its_process_is_found_and_its_neighbours_have_features(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path
) -> None:
    killer = manifest.of_split("train")[1].clip_id

    class Deadly(BlockExtractor):
        def compute(self, work: Any, *args: Any, **options: Any) -> Any:
            if any(clip.clip_id == killer for clip in self.clips(work)):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().compute(work, *args, **options)

    (summary,) = extract_on_ray([config_for(video_folder, tmp_path / "c.zarr")], manifest, extractor=Deadly)
    assert [(r.clip_id, r.outcome) for _, r in summary.failures] == [(killer, "crashed")]
    assert "also when it read nothing else" in summary.failures[0][1].message
    cache, plain = FeatureCache.open(summary.cache), FeatureCache.open(finished)
    good = cache.usable_rows("train")
    assert sorted(set(range(7)) - set(good.tolist())) == [1]
    np.testing.assert_array_equal(cache.read("train", good), plain.read("train", good))
    assert not cache.read("train", [1]).any()
    np.testing.assert_array_equal(cache.read("validation"), plain.read("validation"))
    again = config_for(video_folder, summary.cache, retry_failed=True)
    assert extract(again, manifest).failures == []
    assert files_of(summary.cache) == files_of(finished)


def decode_processes() -> list[int]:
    """Processes of this test's Ray that decode at this moment."""
    return [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if process.name().startswith("ray::decode")
    ]


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.usefixtures("session")
def test_decode_processes_make_the_same_bytes_also_when_some_are_killed(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path
) -> None:
    killed: list[int] = []
    is_over = threading.Event()

    def kill() -> None:
        """Fewer than the deaths that are held against a clip."""
        while len(killed) < 2 and not is_over.is_set():
            for process in set(decode_processes()) - set(killed):
                os.kill(process, signal.SIGKILL)
                killed.append(process)
                is_over.wait(0.5)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        config = config_for(video_folder, tmp_path / "c.zarr", decode_workers=1)
        summary = extract(config, manifest)
    finally:
        is_over.set()
        killer.join()
    assert killed
    assert summary.failures == []
    assert files_of(summary.cache) == files_of(finished)


CROPS = CropSettings(views=VIEWS, seed=0, interpolation="bilinear", timeout_sec=2.0)


@pytest.mark.faults
@pytest.mark.usefixtures("session")
@pytest.mark.parametrize("death", ["killed", pytest.param("hangs", marks=pytest.mark.slow)])
def test_a_clip_that_ends_its_decode_process_is_found_among_the_clips_of_its_video(
    video_folder: Path, monkeypatch: pytest.MonkeyPatch, death: str
) -> None:
    """`hangs`: in native code that keeps the interpreter's lock."""
    video = "train/a/clip0.mp4"
    clips = [
        Clip(clip_id=str(i), split="train", video=video, start_sec=i / 5, end_sec=(i + 1) / 5)
        for i in range(3)
    ]

    def deadly(data_root: Any, clips: Any, settings: Any, witness: Any) -> Iterator[ClipCrops]:
        import ctypes

        from vivit.stage1_extract import ray_decode

        def crops(*args: Any, **options: Any) -> Iterator[ClipCrops]:
            for item in crop_clips(*args, **options):
                if item.clip.clip_id == "1" and death == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if item.clip.clip_id == "1":
                    ctypes.PyDLL(None).sleep(1000)
                yield item

        ray_decode.crop_clips = crops
        yield from ray_decode.decode_job(data_root, clips, settings, witness)  # there it is the real one

    monkeypatch.setattr(ray_decode, "decode_job", deadly)
    with ray_decode.RayCropStream(video_folder, [CROPS], processes=1, budget_bytes=0) as stream:
        items = list(stream.read([clips]))
    assert [item.result.outcome for item in items] == ["short", "crashed", "short"]
    assert (
        items[1].result.message
        == "the process that decoded it died, hung or used up the memory, also when it read nothing else"
    )
    for item, alone in zip(items, crop_clips(video_folder / video, clips, CROPS), strict=True):
        if item.crops is not None:
            np.testing.assert_array_equal(item.crops, alone.crops)


@pytest.mark.usefixtures("session")
def test_decoding_ahead_takes_no_cores_from_the_block_that_is_encoded(video_folder: Path) -> None:
    """The processes of the next block have both cores first, and nobody asks for their crops."""
    clips = [
        Clip(clip_id=f"{video}-{i}", split="train", video=video, start_sec=i / 5, end_sec=(i + 1) / 5)
        for video in ("train/a/clip0.mp4", "train/a/clip1.mp4")
        for i in range(3)
    ]
    items: list[ClipCrops] = []
    with (
        ray_decode.RayCropStream(video_folder, [CROPS], processes=2, budget_bytes=0) as ahead,
        ray_decode.RayCropStream(video_folder, [CROPS], processes=2, budget_bytes=0) as now,
    ):
        ahead.read([clips])
        time.sleep(1.0)
        reader = threading.Thread(target=lambda: items.extend(now.read([clips])), daemon=True)
        reader.start()
        reader.join(60.0)
    assert [item.clip for item in items] == clips


@pytest.mark.usefixtures("session")
def test_a_node_without_the_videos_is_an_error_and_no_missing_clip(
    video_folder: Path, tmp_path: Path
) -> None:
    clips = [Clip(clip_id="0", split="train", video="train/a/gone.mp4")]
    options: Any = {"processes": 1, "budget_bytes": 0}
    there, unseen = video_folder / "train/a/clip0.mp4", tmp_path / "elsewhere.mp4"
    with ray_decode.RayCropStream(video_folder, [CROPS], witness=there, **options) as stream:
        assert [item.result.outcome for item in stream.read([clips])] == ["missing"]
    with (
        ray_decode.RayCropStream(video_folder, [CROPS], witness=unseen, **options) as stream,
        pytest.raises(StorageError, match=r"elsewhere.mp4 does not exist on .* that all nodes share"),
    ):
        list(stream.read([clips]))


@pytest.mark.faults
@pytest.mark.usefixtures("session")
def test_a_worker_that_fails_every_block_is_replaced_and_uses_up_no_block(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path
) -> None:
    """As after an error of a GPU, which all later calls of the process meet."""
    sick = tmp_path / "sick"

    class Sick(BlockExtractor):
        def commit(self, computed: Any) -> None:
            if not sick.exists():
                sick.write_text(str(os.getpid()))
            if sick.read_text() == str(os.getpid()):
                raise RuntimeError("an illegal memory access was encountered")
            super().commit(computed)

    (summary,) = extract_on_ray([config_for(video_folder, tmp_path / "c.zarr")], manifest, extractor=Sick)
    assert (summary.blocks_done, summary.missing) == (6, "")
    assert {worker["state"] for worker in summary.workers} == {"lost", "ready"}
    assert files_of(tmp_path / "c.zarr") == files_of(finished)


@pytest.mark.usefixtures("session")
def test_a_worker_that_cannot_encode_is_found_before_anything_is_begun(
    video_folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    class Broken(BlockExtractor):
        def compute(self, *args: Any, **options: Any) -> Any:
            raise RuntimeError("no kernel image is available")

    with pytest.raises(
        BlockError,
        match=r"a worker \(.*\) cannot read, decode and encode the first clip: RuntimeError: no kernel",
    ):
        extract_on_ray([config_for(video_folder, tmp_path / "c.zarr")], manifest, extractor=Broken)
    assert not list((tmp_path / "c.zarr").glob("ledger/*/*.json"))


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.usefixtures("session")
def test_a_worker_stuck_in_native_code_is_replaced(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path
) -> None:
    """It keeps the interpreter's lock, so that no Python code of its process can notice."""
    stuck = tmp_path / "stuck"

    class Stuck(BlockExtractor):
        def commit(self, computed: Any) -> None:
            import ctypes

            if not stuck.exists():
                stuck.touch()
                ctypes.PyDLL(None).sleep(1000)
            super().commit(computed)

    config = config_for(video_folder, tmp_path / "c.zarr", clip_timeout_sec=5.0)
    extract_on_ray([config], manifest, extractor=Stuck)
    assert stuck.exists()
    assert files_of(tmp_path / "c.zarr") == files_of(finished)


@pytest.mark.parametrize(
    ("changes", "token", "message"),
    [
        ({}, "another run's", "another folder for a worker on .* that all workers share"),
        ({"precision": "bfloat16"}, "", "would write other features .* backbone.precision: bfloat16 here"),
        ({"backbone": "vit_s16"}, "", "would write other features .* backbone.weights_sha256"),
    ],
)
def test_a_worker_that_sees_other_files_or_weights_does_not_write(
    video_folder: Path, finished: Path, tmp_path: Path, changes: Any, token: str, message: str
) -> None:
    cache = tmp_path / "c.zarr"
    shutil.copytree(finished, cache)
    (cache / ".run").write_text("")
    with torch_threads(1):
        worker = Worker()
        worker.load([config_for(video_folder, cache, **changes)])
        with pytest.raises(CacheError, match=message):
            worker.open(Mark(".run", token, None), BlockExtractor)


def run_cli(root: Path, workdir: Path, *options: str) -> "subprocess.Popen[str]":
    command = [
        sys.executable, "-m", "vivit", "extract", "--dataset", "folder", "--data-root", str(root), "--workdir",
        str(workdir), "--cache", "c", "--backbone", "vit_ti16", "--weights", "random", "--num-frames", "4", "--stride",
        "3", "--resize", "40", "--crop-size", "32", "--train-views", "2", "--test-clips", "2", "--test-crops", "1",
        "--batch-size", "6", "--block-size", "2", "--device", "cpu", "--torch-threads", "1", "--augment", VIEWS.augment,
        *options,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 130),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_driver_leaves_a_cache_that_goes_on(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    cache = tmp_path / "caches/c.zarr"
    process = run_cli(video_folder, tmp_path, "--workers", "1")
    while not list(cache.glob("ledger/*/*.json")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert ("Run the same command again to go on" in errors) == (code == 130)
    assert extract(config_for(video_folder, cache, workers=0), manifest).blocks_kept >= 1
    assert files_of(cache) == files_of(finished)


@pytest.mark.parametrize(
    ("asked", "there", "message"),
    [
        ({"gpus_per_worker": 1}, {"gpus": 0, "cores": 8}, "each worker needs 1 GPU and no GPU is there"),
        ({"device": "cuda"}, {"gpus": 0, "cores": 8}, "needs a GPU for each worker, and there is none"),
        ({"workers": 3}, {"gpus": 2, "cores": 8}, "3 workers with 1 GPU each do not fit on 2 GPUs: .*--workers 2"),
        ({"workers": 5, "gpus_per_worker": 0.4}, {"gpus": 2, "cores": 8}, "5 workers .* --workers 4"),
        ({"device": "cuda:1"}, {"gpus": 2, "cores": 8}, "names one GPU"),
        ({"device": "cpu", "gpus_per_worker": 1}, {"gpus": 2, "cores": 8}, "leave one of the two out"),
        ({}, {"gpus": 0, "cores": 0, "nodes": 0}, "no node of the cluster has a core for a worker"),
        (
            {"gpus_per_worker": 2},
            {"gpus": 4, "cores": 8, "gpus_of_nodes": [1] * 4},
            "each worker needs 2 GPU and 1 GPU is there on a node",
        ),
    ],
)  # fmt: skip
def test_workers_for_which_there_is_no_room_are_refused(asked: Any, there: Any, message: str) -> None:
    config = replace(ExtractConfig(cache=Path("c"), data_root=Path()), **asked)
    with pytest.raises(ConfigError, match=message):
        Placement.of(config, **there)


@pytest.mark.parametrize(
    ("asked", "there", "placement"),
    [
        ({}, {"gpus": 4, "cores": 32}, (4, 1.0, 8)),
        ({"workers": 2}, {"gpus": 4, "cores": 32}, (2, 1.0, 16)),
        ({"gpus_per_worker": 0.5}, {"gpus": 2, "cores": 8}, (4, 0.5, 2)),
        ({"gpus_per_worker": 0.4}, {"gpus": 2, "cores": 8}, (4, 0.4, 2)),
        ({"gpus_per_worker": 2}, {"gpus": 5, "cores": 8}, (2, 2.0, 4)),
        ({"gpus_per_worker": 2}, {"gpus": 6, "cores": 8, "gpus_of_nodes": [0, 3, 3]}, (2, 2.0, 4)),
        ({"workers": 4}, {"gpus": 0, "cores": 6}, (4, 0.0, 1)),
        ({"device": "cpu"}, {"gpus": 2, "cores": 8, "nodes": 2}, (2, 0.0, 4)),
    ],
)
def test_workers_share_what_there_is(asked: Any, there: Any, placement: tuple[int, float, int]) -> None:
    config = replace(ExtractConfig(cache=Path("c"), data_root=Path()), **asked)
    assert Placement.of(config, **there) == Placement(*placement)


def test_an_address_where_nobody_answers_is_refused_at_once(video_folder: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    if ray.is_initialized():
        ray.shutdown()
    config = config_for(video_folder, tmp_path / "c.zarr", address=address)
    with pytest.raises(ConfigError, match=f"no Ray cluster answers at {address}"), ray_session(config):
        pass
    with (
        pytest.raises(ConfigError, match="is not HOST:PORT"),
        ray_session(replace(config, address="ray://head:10001")),
    ):
        pass


def test_a_server_that_is_no_head_node_is_refused_at_once(
    video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ray.is_initialized():
        ray.shutdown()
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as dashboard:
        thread = threading.Thread(target=dashboard.serve_forever)
        thread.start()
        address = f"127.0.0.1:{dashboard.server_port}"
        config = config_for(video_folder, tmp_path / "c.zarr", address=address)
        with pytest.raises(ConfigError, match=f"{address} is not the head .* 8265"), ray_session(config):
            pass
        dashboard.shutdown()
        thread.join()
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    named = replace(config, address="http://head:8265")
    with (
        pytest.raises(ConfigError, match=r"^RAY_ADDRESS 'http://head:8265' is not HOST:PORT"),
        ray_session(named),
    ):
        pass


def test_without_ray_there_is_one_sentence_with_the_remedy(
    video_folder: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'vivit\[ray\]'"):
        extract(config_for(video_folder, tmp_path / "c.zarr"), manifest)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head node that runs no worker, and whatever nodes a test adds."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_cluster_of_two_nodes_writes_what_one_process_writes(
    cluster: Any, video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        cluster.add_node(num_cpus=1, num_gpus=0)
    cluster.wait_for_nodes()
    process = run_cli(video_folder, tmp_path, "--address", cluster.address, "--workers", "2")
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "11 clips" in out
    assert files_of(tmp_path / "caches/c.zarr") == files_of(finished)


@pytest.mark.slow
def test_a_missing_token_is_one_sentence_with_the_remedy(
    cluster: Any, video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    process = run_cli(video_folder, tmp_path, "--address", cluster.address)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "no authentication token was found; where it has tokens, set RAY_AUTH_MODE=token and" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.faults
def test_a_node_that_is_lost_takes_nothing_with_it(
    cluster: Any,
    video_folder: Path,
    manifest: Manifest,
    finished: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The worker on one of two nodes never ends its block, until its node is gone."""
    first, second = (cluster.add_node(num_cpus=1, num_gpus=0) for _ in range(2))
    cluster.wait_for_nodes()
    busy, lost = tmp_path / "busy", second.node_id

    class Stuck(BlockExtractor):
        def compute(self, work: Any, *args: Any, **options: Any) -> Any:
            import ray

            while ray.get_runtime_context().get_node_id() == lost:
                busy.touch()
                time.sleep(0.01)
            while (
                len(work.rows) > 1 and not busy.exists()
            ):  # else one worker does all before the other is ready
                time.sleep(0.01)
            return super().compute(work, *args, **options)

    def remove() -> None:
        while not busy.exists():
            time.sleep(0.01)
        cluster.remove_node(second, allow_graceful=False)

    remover = threading.Thread(target=remove, daemon=True)
    remover.start()
    config = config_for(video_folder, tmp_path / "c.zarr", address=cluster.address, workers=2)
    extract_on_ray([config], manifest, extractor=Stuck)
    assert busy.exists()
    assert "a worker was lost and is replaced" in caplog.text
    assert files_of(tmp_path / "c.zarr") == files_of(finished)
    assert first.node_id != lost


@pytest.mark.slow
@pytest.mark.faults
def test_a_node_that_joins_late_gets_a_worker_and_the_package(
    cluster: Any,
    video_folder: Path,
    manifest: Manifest,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first worker waits for the second, on a node that is added when the first is at work."""
    monkeypatch.setattr(ray_engine, "_GROW_SEC", 0.5)
    cluster.add_node(num_cpus=1, num_gpus=0)
    cluster.wait_for_nodes()

    class Together(BlockExtractor):
        def compute(self, work: Any, *args: Any, **options: Any) -> Any:
            import ray

            import vivit

            place = tmp_path / ray.get_runtime_context().get_node_id()
            place.write_text(str(vivit.__file__))
            while (
                len(work.rows) > 1 and len(list(tmp_path.glob("[0-9a-f]" * 56))) < 2
            ):  # not in the preflight
                time.sleep(0.01)
            return super().compute(work, *args, **options)

    config = config_for(video_folder, tmp_path / "c.zarr", address=cluster.address, workers=None)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(extract_on_ray, [config], manifest, extractor=Together)
        while not list(tmp_path.glob("[0-9a-f]" * 56)) and not run.done():
            time.sleep(0.01)
        cluster.add_node(num_cpus=1, num_gpus=0)
        (summary,) = run.result()
    places = list(tmp_path.glob("[0-9a-f]" * 56))
    assert len(places) == len(summary.workers) == 2
    assert all("runtime_resources" in place.read_text() for place in places)
    assert files_of(tmp_path / "c.zarr") == files_of(finished)


@pytest.mark.slow
@pytest.mark.faults
def test_a_worker_killed_for_its_memory_is_replaced(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's memory monitor does it, told that the machine is full with 2 GB more than are in use."""
    ray.shutdown()
    memory = psutil.virtual_memory()
    share = (memory.total - memory.available + (3 << 30)) / memory.total
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{share:.3f}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    greedy = tmp_path / "greedy"

    class Greedy(BlockExtractor):
        def commit(self, computed: Any) -> None:
            if not greedy.exists():
                greedy.touch()
                held = np.ones(5 << 27)  # 5 GiB
                time.sleep(60 + 0 * held[0])
            super().commit(computed)

    extract_on_ray([config_for(video_folder, tmp_path / "c.zarr")], manifest, extractor=Greedy)
    assert greedy.exists()
    assert files_of(tmp_path / "c.zarr") == files_of(finished)
