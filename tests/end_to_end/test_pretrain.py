"""The warm-up on real videos, and that its halves do through a cache what they do together."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pa_parquet
import pytest
import safetensors.torch
import torch

from vivit.end_to_end.config import PretrainConfig
from vivit.end_to_end.evaluate_videos import VideoEvaluateConfig, evaluate_videos
from vivit.end_to_end.predict import predict
from vivit.end_to_end.predictor import load_predictor
from vivit.end_to_end.pretrain import default_run_name, pretrain
from vivit.pipeline.checkpoint import Checkpoint, SpatialConfig
from vivit.pipeline.datasets import read_dataset
from vivit.pipeline.errors import CheckpointError, ConfigError, InterruptedRunError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.spatial_vit import create_spatial_vit
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.encoder import SpatialEncoder
from vivit.stage1_extract.extract import extract
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.evaluate import EvaluateConfig, evaluate
from vivit.stage2_temporal.train import train

VIEWS = ViewSpec(num_frames=4, stride=3, resize=40, crop_size=32, test_clips=2, test_crops=3)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def manifest_file(video_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("manifest") / "clips.parquet"
    read_dataset("folder", video_folder)[0].write(path)
    return path


@pytest.fixture
def config(video_folder: Path, manifest_file: Path, tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        manifest=manifest_file, data_root=video_folder, run=tmp_path / "run", backbone="test_vit", weights="random",
        views=VIEWS, epochs=3, batch_size=4, depth=1, drop_path=0.2, mixup=0.3, learning_rate=1e-3, device="cpu",
        decode_threads=2,
    )  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(Checkpoint.read(run).tensors)


def assert_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_training_learns_and_can_be_repeated(config: PretrainConfig, tmp_path: Path) -> None:
    result = pretrain(replace(config, epochs=20, drop_path=0.0, mixup=0.0, label_smoothing=0.0))
    losses = [epoch["loss"] for epoch in result.history]
    assert losses[-1] < 0.7 * losses[0]
    assert (result.steps, result.num_clips, result.left_out) == (40, 7, {})
    assert all(np.isfinite(epoch["top1/action"]) for epoch in result.history)
    pretrain(config_for(config, tmp_path / "a"))
    pretrain(config_for(config, tmp_path / "b"))
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def config_for(config: PretrainConfig, run: Path, **changes: Any) -> PretrainConfig:
    return replace(config, run=run, **changes)


def test_an_interrupted_training_ends_with_the_same_weights(config: PretrainConfig, tmp_path: Path) -> None:
    pretrain(config_for(config, tmp_path / "whole"))
    stopped = 0

    def interrupt(metrics: Mapping[str, Any]) -> None:
        nonlocal stopped
        stopped += 1
        if stopped == 1:
            os.kill(os.getpid(), signal.SIGINT)

    parts = config_for(config, tmp_path / "parts")
    with pytest.raises(InterruptedRunError, match="run the same command again to go on"):
        pretrain(parts, interrupt)
    result = pretrain(parts)
    assert result.resumed_from in (2, 3)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_other_settings_are_refused_and_named(config: PretrainConfig) -> None:
    pretrain(replace(config, epochs=1))
    with pytest.raises(CheckpointError, match=r"training\.epochs: 1 in the run, 2 asked for"):
        pretrain(replace(config, epochs=2))
    assert default_run_name(config, "x") != default_run_name(replace(config, seed=1), "x")
    moved = replace(config, manifest=config.manifest, decode_threads=1, checkpoint_gradients=True)
    assert default_run_name(config, "x") == default_run_name(moved, "x")


def test_parts_of_a_batch_make_the_same_step(config: PretrainConfig, tmp_path: Path) -> None:
    plain = replace(config, drop_path=0.0, epochs=1)
    pretrain(config_for(plain, tmp_path / "whole"))
    pretrain(config_for(plain, tmp_path / "parts", accumulate=3))
    pretrain(config_for(plain, tmp_path / "again", checkpoint_gradients=True))
    for other in ("parts", "again"):
        for name, tensor in weights(tmp_path / "whole").items():
            torch.testing.assert_close(weights(tmp_path / other)[name], tensor, rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("half", ["spatial", "temporal"])
def test_a_frozen_half_keeps_its_weights(config: PretrainConfig, tmp_path: Path, half: str) -> None:
    result = pretrain(replace(config, freeze=half, adapter="bottleneck"))
    pretrain(config_for(config, tmp_path / "untouched", learning_rate=1e-30, adapter="bottleneck"))
    before, after = weights(tmp_path / "untouched"), weights(config.run)
    changed = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"adapter", "heads", "spatial", "temporal"} - {half}
    frozen = sum(tensor.numel() for name, tensor in after.items() if name.startswith(half))
    assert result.trained_parameters == sum(tensor.numel() for tensor in after.values()) - frozen


@pytest.mark.parametrize("model", ["joint", "factorised-self-attention", "factorised-dot-product"])
def test_the_baselines_train_and_are_evaluated(
    config: PretrainConfig, manifest_file: Path, video_folder: Path, model: str
) -> None:
    result = pretrain(replace(config, model=model, tubelet=2, epochs=2, depth=None))
    assert len(result.history) == 2
    evaluation = evaluate_videos(
        VideoEvaluateConfig(run=config.run, data_root=video_folder, device="cpu", views={"test_crops": 1}),
        Manifest.read(manifest_file),
    )
    assert (evaluation.num_views, evaluation.coverage.num_evaluated) == (2, 4)
    with pytest.raises(CheckpointError, match="has no temporal half that could look at features"):
        evaluate(EvaluateConfig(run=config.run, cache=extracted(config, tubelet_source=None)))


def extracted(config: PretrainConfig, *, tubelet_source: Path | None, num_frames: int = 4) -> Path:
    cache = config.run.with_name(f"{config.run.name}-{num_frames}.zarr")
    extract(
        ExtractConfig(
            cache=cache, data_root=config.data_root, views=replace(VIEWS, num_frames=num_frames),
            backbone=str(tubelet_source or "test_vit"), weights="pretrained" if tubelet_source else "random",
            device="cpu", block_size=4,
        ),
        Manifest.read(config.manifest),
    )  # fmt: skip
    return cache


@pytest.mark.parametrize("tubelet", [1, 2])
def test_the_cache_equals_the_live_model(
    config: PretrainConfig, video_folder: Path, manifest_file: Path, tubelet: int
) -> None:
    """Spatial half into a cache, temporal half on the cache: the logits of both halves together, but for float16."""
    pretrain(replace(config, tubelet=tubelet))
    with_large_logits(config.run)
    cache = extracted(config, tubelet_source=config.run)
    assert FeatureCache.open(cache).shape("validation")[2] == 4 // tubelet
    logits = {}
    for way in ("live", "cached"):
        if way == "live":
            live = VideoEvaluateConfig(run=config.run, data_root=video_folder, device="cpu")
            evaluate_videos(live, Manifest.read(manifest_file))
        else:
            evaluate(EvaluateConfig(run=config.run, cache=cache, device="cpu"))
        logits[way] = read_logits(config.run / "evaluation" / "validation.parquet")
    assert np.ptp(logits["live"]) > 1
    np.testing.assert_allclose(logits["cached"], logits["live"], rtol=0, atol=2e-3)


def with_large_logits(run: Path) -> None:
    """Give the heads random weights: those that were hardly trained are close to zero, and hide every difference."""
    stored = Checkpoint.read(run)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(value.shape, generator=generator) if name.startswith("heads") else value
        for name, value in stored.tensors.items()
    }
    replace(stored, tensors=tensors).write(run / "model.safetensors")


def read_logits(path: Path) -> np.ndarray:
    return np.stack(pa_parquet.read_table(path)["logits/action"].to_numpy())


def test_features_of_another_spatial_half_are_refused(config: PretrainConfig) -> None:
    pretrain(replace(config, epochs=1))
    with pytest.raises(CheckpointError, match="was not made with the spatial half"):
        evaluate(EvaluateConfig(run=config.run, cache=extracted(config, tubelet_source=None)))


def test_the_whole_method(
    config: PretrainConfig, video_folder: Path, manifest_file: Path, tmp_path: Path
) -> None:
    """Warm-up on 4 frames, extraction at 8, temporal training from the warm-up, evaluation on cache and videos."""
    pretrain(config)
    with_large_logits(config.run)
    cache = extracted(config, tubelet_source=config.run, num_frames=8)
    run = tmp_path / "stage2"
    train(
        TrainConfig(
            cache=cache,
            run=run,
            init=str(config.run),
            epochs=2,
            batch_size=4,
            device="cpu",
            learning_rate=1e-4,
        )
    )
    on_cache = evaluate(EvaluateConfig(run=run, cache=cache, device="cpu"))
    cached = read_logits(run / "evaluation" / "validation.parquet")
    on_videos = evaluate_videos(
        VideoEvaluateConfig(run=run, data_root=video_folder, device="cpu"), Manifest.read(manifest_file)
    )
    live = read_logits(run / "evaluation" / "validation.parquet")
    assert on_videos.coverage == on_cache.coverage
    assert np.ptp(live) > 1
    np.testing.assert_allclose(cached, live, rtol=0, atol=2e-3)
    with pytest.raises(ConfigError, match="looks at crops of 32 pixels, not 64: pass --crop-size 32"):
        extract(
            ExtractConfig(
                cache=tmp_path / "x.zarr", data_root=video_folder, backbone=str(config.run),
                views=replace(VIEWS, resize=80, crop_size=64),
            ),
            Manifest.read(manifest_file),
        )  # fmt: skip


def test_a_joint_head_goes_with_the_model_file(
    config: PretrainConfig, video_folder: Path, manifest_file: Path, tmp_path: Path
) -> None:
    """Trained with both halves, evaluated on videos and on a cache, predicted with, and trained on from."""

    def with_pairs(clip: Clip, row: int) -> Clip:
        return replace(clip, labels={"verb": clip.labels["action"], "noun": row % 3})

    clips = [with_pairs(clip, row) for row, clip in enumerate(Manifest.read(manifest_file).clips)]
    manifest = Manifest("pairs", clips, heads={"verb": ["cut", "peel"], "noun": ["leek", "lime", "egg"]})
    manifest.write(tmp_path / "pairs.parquet")
    config = replace(config, manifest=tmp_path / "pairs.parquet", joint_head=True, epochs=2)
    result = pretrain(config)
    with_large_logits(config.run)
    seen = sorted({c.labels["verb"] * 3 + c.labels["noun"] for c in manifest.of_split("train")})
    assert Checkpoint.read(config.run).rest["pairs"] == seen
    on_videos = evaluate_videos(
        VideoEvaluateConfig(run=config.run, data_root=video_folder, device="cpu"), manifest
    )
    assert list(on_videos.scores) == ["verb", "noun", "action", "joint", "fused"]
    assert set(result.best) >= {"top1/verb", "top1/noun", "top1/action", "top1/joint"}
    cache = extracted(config, tubelet_source=config.run)
    on_cache = evaluate(EvaluateConfig(run=config.run, cache=cache, device="cpu"))
    assert {head: score.top1 for head, score in on_cache.scores.items()} == {
        head: score.top1 for head, score in on_videos.scores.items()
    }
    (found,) = predict(load_predictor(config.run), [video_folder / "val/b/clip7.mp4"], top=9, device="cpu")
    names = [f"{verb} {noun}" for verb in ("cut", "peel") for noun in ("leek", "lime", "egg")]
    assert {guess.name for guess in found.guesses["joint"]} == {names[pair] for pair in seen}
    run = tmp_path / "stage2"
    train(TrainConfig(cache=cache, run=run, init=str(config.run), joint_head=True, epochs=1, device="cpu"))
    origins = json.loads((run / "initialisation.json").read_text())
    assert origins["heads.joint.weight"].endswith("model.safetensors: heads.joint.weight")


def test_a_joint_head_needs_the_two_halves(config: PretrainConfig) -> None:
    with pytest.raises(ConfigError, match="joint_head True needs the two halves of --model fe"):
        replace(config, model="joint", joint_head=True, depth=None)


def test_a_prediction_names_the_classes(config: PretrainConfig, video_folder: Path, tmp_path: Path) -> None:
    pretrain(replace(config, epochs=1))
    predictor = load_predictor(config.run, test_crops=1)
    video = video_folder / "val" / "b" / "clip7.mp4"
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    good, bad = predict(predictor, [video, broken], top=2, device="cpu")
    assert {guess.name for guess in good.guesses["action"]} == {"a", "b"}
    assert sum(guess.probability for guess in good.guesses["action"]) == pytest.approx(1)
    assert (bad.record.outcome, dict(bad.guesses)) == ("not_a_video", {})


def test_a_clip_that_cannot_be_read_is_left_out(
    config: PretrainConfig, video_folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "videos"
    for path in video_folder.rglob("*.mp4"):
        target = root / path.relative_to(video_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (root / "train" / "a" / "broken.mp4").write_bytes(b"no video at all")
    (root / "val" / "a" / "broken.mp4").write_bytes(b"no video at all")
    clips = tmp_path / "broken.parquet"
    read_dataset("folder", root)[0].write(clips)
    result = pretrain(replace(config, manifest=clips, data_root=root, epochs=2))
    assert result.left_out == {"not_a_video": 2}  # once in each epoch
    assert result.num_clips == 8


def test_weights_of_a_vit_at_another_size_are_resized_as_in_the_reference(
    config: PretrainConfig, tmp_path: Path
) -> None:
    import timm

    vit = timm.create_model("test_vit", num_classes=0, img_size=32)
    safetensors.torch.save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    pretrain(replace(config, weights=str(tmp_path / "vit.safetensors"), epochs=1, learning_rate=1e-30))
    assert torch.equal(weights(config.run)["spatial.pos_embed"], vit.state_dict()["pos_embed"])


PROCESSES = """
import sys
from pathlib import Path
from vivit.end_to_end.config import PretrainConfig
from vivit.end_to_end.pretrain import pretrain
from vivit.pipeline.spatial_vit import create_spatial_vit
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.encoder import SpatialEncoder

pretrain(PretrainConfig(
    manifest=Path(sys.argv[1]), data_root=Path(sys.argv[2]), run=Path(sys.argv[3]), backbone="test_vit",
    weights="random", views=ViewSpec(num_frames=4, stride=3, resize=40, crop_size=32), epochs=2, batch_size=4, depth=1,
    device="cpu", decode_threads=1, learning_rate=1e-3,
))
"""


def test_two_processes_learn_what_one_learns(config: PretrainConfig, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(PROCESSES)
    for count, run in ((1, "one"), (2, "two")):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        arguments = [str(script), str(config.manifest), str(config.data_root), str(tmp_path / run)]
        done = subprocess.run(
            command + arguments, capture_output=True, text=True, timeout=200, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-3, msg=name)
    assert not all(torch.equal(two[name], tensor) for name, tensor in one.items())


def test_extraction_says_which_frames_an_untrained_inflation_never_sees(
    config: PretrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    pretrain(replace(config, tubelet=2, epochs=1, freeze="spatial"))
    extracted(config, tubelet_source=config.run)
    assert "does not look at frame 0 of each 2" in caplog.text
    caplog.clear()
    other = replace(config, tubelet=2, validation_split=None, run=config.run.with_name("trained"))
    pretrain(other)
    extracted(other, tubelet_source=other.run)
    assert "does not look at" not in caplog.text


def test_a_validation_split_without_labels_keeps_the_last_epoch(
    config: PretrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = Manifest.read(config.manifest)
    clips = [replace(c, labels={}) if c.split == "validation" else c for c in known.clips]
    Manifest(known.dataset, clips, heads=known.heads).write(tmp_path / "m.parquet")
    result = pretrain(replace(config, manifest=tmp_path / "m.parquet", epochs=2))
    assert result.best["epoch"] == 2
    assert "has no labelled clips: the last epoch is kept" in caplog.text


def test_a_start_that_does_not_fit_leaves_no_run_behind(config: PretrainConfig) -> None:
    with pytest.raises(CheckpointError, match="20"):
        pretrain(replace(config, init="spatial", depth=20))
    assert not (config.run / "config.json").exists()
    pretrain(replace(config, epochs=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"backbone": "resnet10t"}, "as a Vision Transformer", id="no ViT"),
        pytest.param({"views": replace(VIEWS, resize=48, crop_size=40)}, "use 32 or 48", id="crop size"),
        pytest.param(
            {"model": "joint", "backbone": "test_vit2", "depth": None},
            "choose a plain vit_",
            id="other parts",
        ),
    ],
)
def test_a_backbone_that_does_not_fit_is_one_error(
    config: PretrainConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pretrain(replace(config, **changes))
    assert not (config.run / "config.json").exists()


def test_a_model_file_on_features_of_other_views_is_refused(config: PretrainConfig) -> None:
    pretrain(replace(config, epochs=1))
    cache = config.run.with_name("other.zarr")
    extract(
        ExtractConfig(
            cache=cache, data_root=config.data_root, views=replace(VIEWS, stride=1), backbone=str(config.run),
            device="cpu",
        ),
        Manifest.read(config.manifest),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"views\.stride: 3 in the run, 1 in the cache"):
        evaluate(EvaluateConfig(run=config.run, cache=cache, device="cpu"))


def test_a_run_on_a_backbone_that_is_no_vit_predicts_too(
    config: PretrainConfig, video_folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "resnet.zarr"
    extract(
        ExtractConfig(
            cache=cache,
            data_root=video_folder,
            views=VIEWS,
            backbone="resnet10t",
            weights="random",
            device="cpu",
        ),
        Manifest.read(config.manifest),
    )
    train(TrainConfig(cache=cache, run=tmp_path / "stage2", epochs=1, depth=1, device="cpu"))
    (found,) = predict(load_predictor(tmp_path / "stage2"), [video_folder / "val/b/clip7.mp4"], device="cpu")
    assert len(found.guesses["action"]) == 2


def test_encoders_with_equal_tensors_and_other_attention_have_other_caches(tmp_path: Path) -> None:
    settings = []
    for num_heads in (2, 4):
        vit = SpatialConfig(name="test_vit", options={"num_heads": num_heads}, image_size=(32, 32))
        torch.manual_seed(0)
        tensors = {f"spatial.{k}": v for k, v in create_spatial_vit(vit).state_dict().items()}
        path = tmp_path / f"{num_heads}.safetensors"
        Checkpoint(model="image", spatial=vit, source="", tensors=tensors).write(path)
        settings.append(SpatialEncoder(str(path), crop_size=32, device="cpu").backbone)
    assert settings[0].weights_sha256 == settings[1].weights_sha256
    assert settings[0].options != settings[1].options
