"""Augmented features: what they are of, and that nothing but the settings decides their bytes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_files import files_of

from vivit.end_to_end.config import PretrainConfig
from vivit.end_to_end.pretrain import pretrain
from vivit.end_to_end.video_batches import VideoBatches
from vivit.pipeline.checkpoint import views_for_spatial
from vivit.pipeline.errors import InterruptedRunError, StaleCacheError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.manifest import Manifest
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.augment import Augmenter
from vivit.stage1_extract.clip_reader import CropSettings, CropStream
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.encoder import Normalise, SpatialEncoder
from vivit.stage1_extract.extract import extract, extract_all
from vivit.stage1_extract.inline_engine import run_inline
from vivit.stage1_extract.verify import VerifyConfig, verify

VIEWS = ViewSpec(
    num_frames=4, stride=3, resize=40, crop_size=32, train_views=3, test_clips=2, test_crops=1,
    augment="reference-randaugment-n3-m2",
)  # fmt: skip
CPU = torch.device("cpu")


def config_for(root: Path, cache: Path, **changes: Any) -> ExtractConfig:
    config = ExtractConfig(
        cache=cache, data_root=root, backbone="vit_ti16", weights="random", views=VIEWS, device="cpu", batch_size=6,
        block_size=3, decode_threads=2,
    )  # fmt: skip
    return replace(config, **changes)


@pytest.fixture(scope="module")
def finished(video_folder: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("caches") / "plain.zarr"
    extract(config_for(video_folder, cache), manifest)
    return cache


def test_features_are_of_the_augmented_crops_and_test_views_are_left_alone(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path
) -> None:
    plain = extract(
        config_for(video_folder, tmp_path / "none.zarr", views=replace(VIEWS, augment="none")), manifest
    )
    augmented, none = FeatureCache.open(finished), FeatureCache.open(plain.cache)
    assert augmented.settings.views.augment == VIEWS.augment
    np.testing.assert_array_equal(augmented.read("validation"), none.read("validation"))
    changed = (augmented.read("train") != none.read("train")).any((2, 3))
    assert changed.mean() > 0.7
    encoder = SpatialEncoder("vit_ti16", weights="random", crop_size=32, device="cpu", batch_size=6)
    augmenter = Augmenter.of(VIEWS, seed=0, device=CPU)
    assert augmenter is not None
    settings = CropSettings(views=VIEWS, seed=0, interpolation="bicubic")
    with CropStream(video_folder, settings, threads=1, budget_bytes=1 << 20) as stream:
        for row, item in enumerate(stream.read([manifest.of_split("train")[:2]])):
            assert item.crops is not None
            views = augmenter.clip(item.crops, clip_id=item.clip.clip_id)
            wanted = torch.cat([encoder.encode(view[None].numpy()) for view in views]).numpy()
            np.testing.assert_array_equal(augmented.read("train", [row])[0], wanted.astype(np.float16))


def test_the_bytes_do_not_depend_on_threads_or_memory(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path
) -> None:
    extract(config_for(video_folder, tmp_path / "c.zarr", decode_threads=5, decode_memory_mb=0), manifest)
    assert files_of(tmp_path / "c.zarr") == files_of(finished)


def test_an_interrupted_run_ends_with_the_same_bytes(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(extractor: Any, todo: Any, tally: Any) -> None:
        run_inline(extractor, todo[:2], tally)
        raise KeyboardInterrupt

    config = config_for(video_folder, tmp_path / "c.zarr")
    with monkeypatch.context() as patch:
        patch.setattr("vivit.stage1_extract.extract.run_inline", interrupted)
        with pytest.raises(InterruptedRunError):
            extract(config, manifest)
    assert extract(config, manifest).blocks_kept == 2
    assert files_of(config.cache) == files_of(finished)


def test_appended_views_are_those_of_a_cache_made_at_once(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path
) -> None:
    config = config_for(video_folder, tmp_path / "c.zarr", views=replace(VIEWS, train_views=1))
    extract(config, manifest)
    extract(replace(config, more_views=2), manifest)
    assert files_of(config.cache) == files_of(finished)
    report = verify(
        VerifyConfig(cache=config.cache, data_root=video_folder, sample=5, device="cpu", is_shown=False)
    )
    assert (report.is_whole, sum(made.is_equal for made in report.sample)) == (True, 5)


def test_encoders_in_one_pass_see_what_each_would_see_alone(
    video_folder: Path, manifest: Manifest, finished: Path, tmp_path: Path
) -> None:
    first = config_for(
        video_folder, tmp_path / "a.zarr", backbone="test_vit", views=replace(VIEWS, crop_size=16)
    )
    second = config_for(video_folder, tmp_path / "b.zarr")
    extract_all([first, second], manifest)
    assert files_of(second.cache) == files_of(finished)


def test_a_cache_with_another_augmentation_is_refused(
    video_folder: Path, manifest: Manifest, finished: Path
) -> None:
    other = config_for(video_folder, finished, views=replace(VIEWS, augment="none"))
    message = "views.augment: none asked for, reference-randaugment-n3-m2 in the cache"
    with pytest.raises(StaleCacheError, match=message):
        extract(other, manifest)


def test_a_training_on_videos_sees_the_pixels_that_the_cache_was_made_of(
    video_folder: Path, manifest: Manifest
) -> None:
    clips = manifest.of_split("train")
    settings = CropSettings(views=VIEWS, seed=4, interpolation="bicubic")
    batches = VideoBatches(
        clips, manifest.labels("train"), video_folder, settings,
        batch_size=len(clips), normalise=Normalise((0.5,) * 3, (0.5,) * 3, CPU), device=CPU, threads=2,
        budget_bytes=1 << 24,
    )  # fmt: skip
    augmenter = Augmenter.of(VIEWS, seed=4, device=CPU)
    assert augmenter is not None
    with CropStream(video_folder, settings, threads=1, budget_bytes=1 << 24) as stream:
        items = {item.clip.clip_id: item for item in stream.read([clips])}
    for epoch in range(2):
        (batch,) = batches.epoch(epoch)
        seen = {view.numpy().tobytes() for view in batch.pixels}
        of_cache = {
            list(augmenter.clip(item.crops, clip_id=clip_id))[epoch].numpy().tobytes()
            for clip_id, item in items.items()
            if item.crops is not None
        }
        assert seen == of_cache
        assert len(seen) == len(clips)


def test_a_warm_up_passes_its_augmentation_on_to_extraction(
    video_folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    manifest.write(tmp_path / "clips.parquet")
    config = PretrainConfig(
        manifest=tmp_path / "clips.parquet", data_root=video_folder, run=tmp_path / "run", backbone="test_vit",
        weights="random", views=VIEWS, epochs=1, batch_size=4, depth=1, device="cpu",
    )  # fmt: skip
    pretrain(config)
    assert views_for_spatial(tmp_path / "run")["augment"] == VIEWS.augment
    plain = replace(config, run=tmp_path / "plain", views=replace(VIEWS, augment="none"))
    pretrain(plain)
    assert views_for_spatial(tmp_path / "plain")["augment"] == "none"
