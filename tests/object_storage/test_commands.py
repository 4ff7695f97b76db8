"""The commands with URLs, against the same commands with paths."""

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from faulty_proxy import FaultyProxy

from vivit import cli
from vivit.pipeline.backbones import load_backbone
from vivit.pipeline.datasets import read_dataset
from vivit.pipeline.errors import CacheError, WeightsError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.local_copy import local_file
from vivit.pipeline.manifest import Manifest
from vivit.pipeline.storage import Location, Url
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.extract import extract
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.evaluate import EvaluateConfig, evaluate
from vivit.stage2_temporal.run_folder import cache_of
from vivit.stage2_temporal.train import train

VIEWS = ViewSpec(num_frames=4, stride=3, resize=40, crop_size=32, train_views=2, test_clips=2, test_crops=1)
OPTIONS = [
    "--backbone", "vit_ti16", "--weights", "random", "--num-frames", "4", "--stride", "3", "--resize", "40",
    "--crop-size", "32", "--train-views", "2", "--test-clips", "2", "--test-crops", "1", "--device", "cpu",
    "--block-size", "2", "--batch-size", "6", "--decode-threads", "1", "--torch-threads", "1",
]  # fmt: skip


def extract_to(cache: Location, videos: Path) -> None:
    config = ExtractConfig(
        cache=cache, data_root=videos, backbone="vit_ti16", weights="random", views=VIEWS, device="cpu", batch_size=6,
        block_size=2, decode_threads=1, torch_threads=1,
    )  # fmt: skip
    extract(config, read_dataset("folder", videos)[0])


def train_on(cache: Location, run: Path, **options: Any) -> dict[str, Any]:
    """The tensors that a short training on the cache ends with."""
    train(TrainConfig(cache=cache, run=run, epochs=2, batch_size=4, depth=1, device="cpu", **options))
    return safetensors.torch.load_file(run / "model.safetensors")


def objects_of(cache: Location) -> dict[str, Any]:
    """Every file of a cache but locks; of the ledger what does not differ from run to run."""
    names = (
        cache.sizes_below()
        if isinstance(cache, Url)
        else [p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file()]
    )
    contents = {name: (cache / name).read_bytes() for name in names if not name.startswith(".")}
    return {name: _lasting(data) if "ledger/" in name else data for name, data in contents.items()}


def _lasting(entry: bytes) -> dict[str, Any]:
    return {key: value for key, value in json.loads(entry).items() if key != "about"}


def extract_command(cache: Location, videos: Path, workdir: Path, *options: str) -> list[str]:
    """`vivit extract` as `extract_to` does it."""
    return [
        sys.executable, "-m", "vivit", "extract", "--dataset", "folder", "--data-root", str(videos),
        "--cache", str(cache), "--workdir", str(workdir), *OPTIONS, *options,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def local(video_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the videos that was made in a folder."""
    cache = tmp_path_factory.mktemp("caches") / "plain.zarr"
    extract_to(cache, video_folder)
    return cache


@pytest.fixture
def vivit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """`vivit(*args)` as on the command line: (exit code, all that it printed)."""

    def run(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vivit", *map(str, args)])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            cli.main()
        except SystemExit as stopped:
            return int(stopped.code or 0), "".join(capsys.readouterr())
        finally:
            signal.signal(signal.SIGTERM, handler)
        return 0, "".join(capsys.readouterr())

    monkeypatch.setenv("VIVIT_WORKDIR", str(tmp_path / "work"))
    return run


@pytest.mark.faults
def test_extraction_training_and_evaluation_through_failures_equal_those_of_a_folder(
    proxy: FaultyProxy,
    bucket: Url,
    local: Path,
    video_folder: Path,
    tmp_path: Path,
    secrets: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    proxy.rate = 0.1
    cache = bucket / "caches/toy.zarr"
    extract_to(cache, video_folder)
    there, here = train_on(cache, tmp_path / "there"), train_on(local, tmp_path / "here")
    assert cache_of(tmp_path / "there") == cache
    scores = [
        evaluate(EvaluateConfig(run=tmp_path / name, cache=path, device="cpu")).scores
        for name, path in (("there", cache), ("here", local))
    ]
    proxy.rate = 0
    assert proxy.faults.total() > 10
    assert objects_of(cache) == objects_of(local)
    assert there.keys() == here.keys()
    assert all(there[name].equal(here[name]) for name in here)
    assert scores[0] == scores[1]
    assert "trying again" in caplog.text
    written = {name: (bucket / name).read_bytes() for name in bucket.sizes_below()}
    written |= {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert len(written) > 20
    for secret in secrets:
        assert secret not in caplog.text
        assert [name for name, data in written.items() if secret.encode() in data] == []


def test_features_that_do_not_fit_in_memory_are_read_as_they_are_needed(
    bucket: Url, local: Path, tmp_path: Path
) -> None:
    cache = bucket / "toy.zarr"
    for path in (p for p in local.rglob("*") if p.is_file()):  # a copied cache is a cache
        (cache / path.relative_to(local).as_posix()).write_bytes(path.read_bytes())
    streamed = train_on(cache, tmp_path / "streamed", memory_budget_bytes=0)
    resident = train_on(local, tmp_path / "resident")
    assert all(streamed[name].equal(resident[name]) for name in resident)


@pytest.mark.slow
@pytest.mark.faults
def test_a_killed_extraction_leaves_a_lease_that_holds_nothing_and_the_same_command_ends_it(
    proxy: FaultyProxy, bucket: Url, local: Path, video_folder: Path, tmp_path: Path
) -> None:
    cache = bucket / "toy.zarr"
    command = extract_command(cache, video_folder, tmp_path, "--workers", "0")
    proxy.only, proxy.kinds, proxy.rate = "/validation/features/c/0", ["stall"], 1.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not proxy.faults.total():  # all of train is committed, and the first block of validation hangs
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    proxy.rate = 0
    assert ".lock" in cache.names()
    left = FeatureCache.open(cache, allow_partial=True)
    assert (left.missing_blocks("train"), left.missing_blocks("validation")) == ([], [0, 1])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert objects_of(cache) == objects_of(local)
    assert not [name for name in cache.names() if name.startswith(".")]


@pytest.mark.slow
@pytest.mark.faults
def test_two_parts_at_once_and_ray_workers_write_what_one_process_writes_to_a_folder(
    proxy: FaultyProxy, bucket: Url, local: Path, video_folder: Path, tmp_path: Path
) -> None:
    proxy.rate, proxy.kinds = 0.05, ["refuse", "lose", "cut", "reset"]
    command = extract_command(bucket / "parts.zarr", video_folder, tmp_path, "--workers", "0", "--part")
    parts = [subprocess.Popen([*command, part], stderr=subprocess.PIPE, text=True) for part in ("1/2", "2/2")]
    for part in parts:
        _, errors = part.communicate()
        assert part.returncode == 0, errors
    assert objects_of(bucket / "parts.zarr") == objects_of(local)
    pytest.importorskip("ray", reason="needs ray: pip install 'vivit[ray]'")
    command = extract_command(bucket / "ray.zarr", video_folder, tmp_path, "--workers", "2")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert objects_of(bucket / "ray.zarr") == objects_of(local)


def test_the_commands_take_urls(
    bucket: Url,
    video_folder: Path,
    local: Path,
    vivit: Callable[..., tuple[int, str]],
    secrets: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weights = bucket / "weights/tiny.safetensors"
    random = load_backbone("vit_ti16", weights="random", crop_size=32)
    weights.write_bytes(safetensors.torch.save(random.model.state_dict()))
    manifest = bucket / "clips.parquet"
    read_dataset("folder", video_folder)[0].write(manifest)
    cache = bucket / "toy.zarr"
    code, printed = vivit(
        "extract",
        "--manifest",
        manifest,
        "--data-root",
        video_folder,
        "--cache",
        cache,
        *OPTIONS,
        "--weights",
        weights,
    )
    assert (code, f"{cache}: 11 clips" in printed) == (0, True), printed
    ours, theirs = FeatureCache.open(cache), FeatureCache.open(local)
    for split in ours.splits:
        np.testing.assert_array_equal(ours.read(split), theirs.read(split))
    code, more = vivit(
        "train-temporal", "--cache", cache, "--epochs", 1, "--depth", 1, "--device", "cpu", "--run", "x"
    )
    assert code == 0, more
    code, rest = vivit("evaluate", "--run", "x", "--device", "cpu")
    assert (code, f"cache of the run: {cache}" in rest) == (0, True), rest
    video = next(video_folder.rglob("*.mp4"))
    code, last = vivit("predict", video, "--run", "x", "--device", "cpu")
    assert (code, "probability" in last) == (0, True), last
    assert FeatureCache.open(cache).made_with["weights_file"] == str(weights)
    assert not any(secret in printed + more + rest + last for secret in secrets)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("train-temporal", "--cache", "ftp://user:hush@host/x"), "ftp:// is not a kind of storage"),
        (("train-temporal", "--cache", "s3://AKIAX:hush@bucket/x"), "must not hold a user"),
        (
            ("evaluate", "--run", "s3://bucket/run"),
            "s3://bucket/run is a URL, and a run must be on this machine",
        ),
        (("train-temporal", "--workdir", "s3://bucket/work"), "work folder must be on this machine"),
        (("extract", "--manifest", "s3://bucket/m.csv?X-Amz-Signature=hush"), "must not hold"),
    ],
)
def test_urls_that_cannot_work_are_wrong_usage(
    vivit: Callable[..., tuple[int, str]], args: tuple[str, ...], message: str
) -> None:
    code, printed = vivit(*args)
    assert code == 2
    assert message in printed
    assert "hush" not in printed


@pytest.mark.parametrize("name", ["clips.parquet", "clips.csv"])
def test_a_manifest_is_read_from_a_url(bucket: Url, video_folder: Path, name: str) -> None:
    made = read_dataset("folder", video_folder)[0]
    if name.endswith(".csv"):
        rows = [f"{clip.clip_id},{clip.split},{clip.video}" for clip in made.clips]
        (bucket / name).write_text("\n".join(["clip_id,split,video", *rows]))
    else:
        made.write(bucket / name)
    assert Manifest.read(bucket / name).sha256 == made.sha256


def test_weights_are_fetched_once_and_known_by_their_url(
    proxy: FaultyProxy, bucket: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = bucket / "weights/tiny.safetensors"
    random = load_backbone("vit_ti16", weights="random", crop_size=32)
    url.write_bytes(safetensors.torch.save(random.model.state_dict()))
    proxy.kinds, proxy.rate = ["refuse", "cut"], 0.2
    loaded = load_backbone("vit_ti16", weights=str(url), crop_size=32)
    proxy.rate = 0
    assert all(
        value.equal(random.model.state_dict()[name]) for name, value in loaded.model.state_dict().items()
    )
    assert (loaded.source, loaded.file) == ("file:tiny.safetensors", url)
    proxy.requests.clear()
    first = local_file(str(url))
    assert all(line.startswith("HEAD") for line in proxy.requests)
    url.write_bytes(b"others")
    assert local_file(str(url)).read_bytes() == b"others"
    assert first.read_bytes() != b"others"
    with pytest.raises(WeightsError, match=r"there is no object .*nothing.pth: correct the URL"):
        local_file(f"{bucket}/nothing.pth")


def test_a_cache_that_is_gone_is_one_clear_error(bucket: Url, vivit: Callable[..., tuple[int, str]]) -> None:
    with pytest.raises(CacheError, match=r"is not a feature cache: it has no zarr.json"):
        FeatureCache.open(bucket / "gone.zarr")
    code, printed = vivit("train-temporal", "--cache", "s3://no-such-bucket/x.zarr")
    assert (code, printed.count("\n")) == (1, 1)
    assert "error: there is no bucket s3://no-such-bucket: make it first, or correct the URL" in printed
