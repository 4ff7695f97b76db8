import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vivit.pipeline.errors import ConfigError, InterruptedRunError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.evaluate import EvaluateConfig, evaluate, load_model
from vivit.stage2_temporal.learner import Learner
from vivit.stage2_temporal.loader import Features, TrainingBatches, epoch_order, epoch_starts, epoch_views
from vivit.stage2_temporal.run_folder import RunFolder
from vivit.stage2_temporal.time_sampling import FRAME_SAMPLINGS, TimeSampling, time_sampling
from vivit.stage2_temporal.train import train

CPU = torch.device("cpu")
kinds = st.sampled_from(list(FRAME_SAMPLINGS))
sizes = st.integers(1, 200).flatmap(lambda stored: st.tuples(st.just(stored), st.integers(1, stored)))


@given(size=sizes, kind=kinds)
def test_time_steps_are_inside_the_view_ascending_and_equally_spaced(
    size: tuple[int, int], kind: str
) -> None:
    stored, used = size
    sampling = TimeSampling.of(stored, used, kind)
    times = sampling.indices(np.arange(sampling.num_starts))
    assert times.shape == (sampling.num_starts, used)
    assert times.min() == 0
    assert times.max() == stored - 1
    assert (np.diff(times, axis=1) == sampling.step).all()
    assert sampling.step == (stored // used if kind == "stride" else 1)


@given(size=sizes, kind=kinds)
def test_training_reaches_every_stored_time_step(size: tuple[int, int], kind: str) -> None:
    sampling = TimeSampling.of(*size, kind)
    assert set(sampling.indices(np.arange(sampling.num_starts)).flat) == set(range(size[0]))


@given(size=sizes, kind=kinds)
def test_evaluation_looks_at_the_middle(size: tuple[int, int], kind: str) -> None:
    stored, used = size
    sampling = TimeSampling.of(stored, used, kind)
    times = np.arange(stored)[sampling.of_middle]
    assert times.tolist() == sampling.indices(np.array([sampling.middle]))[0].tolist()
    assert abs((times[0] + times[-1]) / 2 - (stored - 1) / 2) <= 0.5


@given(size=sizes)
def test_a_stride_is_spread_over_the_view(size: tuple[int, int]) -> None:
    stored, used = size
    sampling = TimeSampling.of(stored, used, "stride")
    assert used * sampling.step <= stored < used * (sampling.step + 1)
    assert sampling.is_whole == (used == stored)


def test_examples() -> None:
    def middle(stored: int, used: int, kind: str) -> list[int]:
        return list(range(stored))[TimeSampling.of(stored, used, kind).of_middle]

    assert middle(16, 4, "stride") == [1, 5, 9, 13]
    assert middle(16, 4, "window") == [6, 7, 8, 9]
    assert middle(16, 16, "stride") == middle(16, 16, "window") == list(range(16))


def test_starts_are_uniform_and_depend_on_seed_epoch_and_row_only() -> None:
    rows = np.arange(50)
    some = np.array([3, 7, 41])
    assert (epoch_starts(0, 4, rows, 50, 4)[some] == epoch_starts(0, 4, some, 50, 4)).all()
    drawn = [epoch_starts(seed, epoch, rows, 50, 4) for seed in (0, 1) for epoch in range(100)]
    assert len({starts.tobytes() for starts in drawn}) == 200
    assert np.bincount(np.concatenate(drawn), minlength=4) == pytest.approx(np.full(4, 2500), rel=0.1)


def test_starts_do_not_follow_views_or_order() -> None:
    rows = np.arange(400)
    starts, views = epoch_starts(0, 0, rows, 400, 2), epoch_views(0, 0, rows, 400, 2)
    early = np.argsort(epoch_order(0, 0, rows, 400)) < 200
    for other in (views, early):
        assert np.mean(starts == other) == pytest.approx(0.5, abs=0.1)


# --- on a cache ---


def _numbered_splits(time: int = 8) -> dict[str, Any]:
    """Each feature is the time step, plus 100 times its row."""
    values = np.arange(20)[:, None, None, None] * 100.0 + np.arange(time)[None, None, :, None]
    features = np.broadcast_to(values, (20, 2, time, 4))
    labels = {"label": [row % 2 for row in range(20)]}
    return {"train": (features, labels), "validation": (features[:6], {"label": labels["label"][:6]})}


@pytest.fixture
def numbered(make_cache: Any) -> FeatureCache:
    """Views of 16 frames in 8 time steps."""
    cache: FeatureCache = make_cache(_numbered_splits(), classes={"label": 2}, num_frames=16)
    return cache


def _features(cache: FeatureCache, num_frames: int | None, kind: str, budget: int | None = None) -> Features:
    sampling = time_sampling(cache, num_frames, kind)
    rows = cache.usable_rows("train")
    return Features(cache, "train", rows, device=CPU, budget_bytes=budget, sampling=sampling)


def _batches(features: Features, cache: FeatureCache) -> TrainingBatches:
    labels = cache.manifest.labels("train")
    return TrainingBatches(features, cache.usable_rows("train"), labels, batch_size=6, seed=0, device=CPU)


def _epoch(cache: FeatureCache, features: Features, epoch: int) -> torch.Tensor:
    return torch.cat([batch.tokens for batch in _batches(features, cache).epoch(epoch)])


@pytest.mark.parametrize("kind", FRAME_SAMPLINGS)
@pytest.mark.parametrize("frames", [2, 6, 8, 16, None])
def test_the_same_features_come_from_memory_and_from_disk(
    numbered: FeatureCache, frames: int | None, kind: str
) -> None:
    kept, read = (_features(numbered, frames, kind, budget) for budget in (None, 0))
    assert (kept.residency, read.residency) == ("memory", "disk")
    positions = np.array([5, 2, 19])
    assert torch.equal(kept.first_views(positions, 2), read.first_views(positions, 2))
    for epoch in range(2):
        assert torch.equal(_epoch(numbered, kept, epoch), _epoch(numbered, read, epoch))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FRAME_SAMPLINGS)
@pytest.mark.parametrize("frames", [6, 8, None])
def test_the_same_features_come_from_the_device(
    numbered: FeatureCache, frames: int | None, kind: str
) -> None:
    gpu, rows = torch.device("cuda"), numbered.usable_rows("train")
    kept = Features(numbered, "train", rows, device=gpu, sampling=time_sampling(numbered, frames, kind))
    read = _features(numbered, frames, kind, 0)
    assert kept.residency == "device"
    positions = np.array([5, 2, 19])
    views, starts = np.array([0, 1, 1]), np.zeros(3, np.int64)
    assert torch.equal(kept.one_view(positions, views, starts).cpu(), read.one_view(positions, views, starts))
    assert torch.equal(kept.first_views(positions, 2).cpu(), read.first_views(positions, 2))


@pytest.mark.parametrize("kind", FRAME_SAMPLINGS)
def test_training_gets_the_drawn_time_steps_of_each_clip(numbered: FeatureCache, kind: str) -> None:
    features = _features(numbered, 8, kind)
    rows = numbered.usable_rows("train")
    starts = epoch_starts(0, 3, rows, len(rows), features.sampling.num_starts)
    tokens = _epoch(numbered, features, 3)[..., 0].numpy()
    for clip in tokens:
        row = int(clip[0] // 100)
        assert (clip - row * 100).tolist() == features.sampling.indices(starts[row : row + 1])[0].tolist()
    assert sorted(tokens[:, 0] // 100) == rows.tolist()


def test_evaluation_gets_the_middle_time_steps(numbered: FeatureCache) -> None:
    for kind, expected in (("stride", [0, 2, 4, 6]), ("window", [2, 3, 4, 5])):
        tokens = _features(numbered, 8, kind).first_views(np.array([0, 3]), 2)
        assert tokens.shape == (2, 2, 4, 4)
        assert tokens[1, 1, :, 0].tolist() == [300 + time for time in expected]


@pytest.mark.parametrize(
    ("frames", "kind", "message"),
    [
        (18, "stride", r"num_frames 18 is more than the 16 of a view in .*: pass --num-frames 16 or less"),
        (7, "stride", r"7 is not a multiple of 2, .*: pass --num-frames 6 or 8"),
        (1, "window", r"1 is not a multiple of 2, .*: pass --num-frames 2$"),
        (8, "strid", "unknown frame sampling 'strid': did you mean stride"),
    ],
)
def test_impossible_samplings_are_refused(
    numbered: FeatureCache, frames: int, kind: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        time_sampling(numbered, frames, kind)


# --- training and evaluation ---


def _config(cache: FeatureCache, run: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 8, "depth": 1, "device": "cpu", "ema": 0.9}
    return TrainConfig(cache=cache.path, run=run, **(settings | changes))


@pytest.fixture
def random_cache(make_cache: Any) -> FeatureCache:
    """Views of 32 frames in 16 time steps."""
    rng = np.random.default_rng(0)
    splits = {
        split: (rng.normal(size=(clips, 2, 16, 16)), {"label": [row % 3 for row in range(clips)]})
        for split, clips in (("train", 20), ("validation", 9))
    }
    cache: FeatureCache = make_cache(splits, classes={"label": 3}, num_frames=32)
    return cache


def test_one_cache_serves_several_numbers_of_frames(random_cache: FeatureCache, tmp_path: Path) -> None:
    for frames, times in ((8, 4), (16, 8), (32, 16)):
        run = train(_config(random_cache, tmp_path / f"{frames}", num_frames=frames)).run
        model, _ = load_model(RunFolder(run))
        assert model.config.time == RunFolder(run).read_config()["model"]["time"] == times


def test_all_frames_said_and_unsaid_give_the_same_weights(random_cache: FeatureCache, tmp_path: Path) -> None:
    runs = [train(_config(random_cache, tmp_path / f"{n}", num_frames=n)).run for n in (None, 32)]
    said, unsaid = (RunFolder(run).model_path.read_bytes() for run in runs)
    assert said == unsaid


@pytest.mark.parametrize("kind", FRAME_SAMPLINGS)
def test_training_at_fewer_frames_resumes_exactly_wherever_features_are(
    random_cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def config(name: str, budget: int | None) -> TrainConfig:
        options = {"num_frames": 8, "frame_sampling": kind, "memory_budget_bytes": budget}
        return _config(random_cache, tmp_path / name, **options)

    train(config("whole", None))
    original = Learner.step

    def interrupted(learner: Learner, batch: Any, number: int) -> torch.Tensor:
        if number == 4:
            raise InterruptedRunError("in the second epoch")
        return original(learner, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", interrupted)
        with pytest.raises(InterruptedRunError):
            train(config("parts", 0))
    assert train(config("parts", 0)).resumed_from == 3
    whole, parts = (RunFolder(tmp_path / name) for name in ("whole", "parts"))
    assert whole.model_path.read_bytes() == parts.model_path.read_bytes()
    assert whole.state_path.stat().st_size == parts.state_path.stat().st_size


@pytest.mark.parametrize("kind", FRAME_SAMPLINGS)
def test_evaluation_and_validation_use_the_frames_of_the_run(
    random_cache: FeatureCache, tmp_path: Path, kind: str
) -> None:
    run = train(_config(random_cache, tmp_path / "run", num_frames=8, frame_sampling=kind, ema=None)).run
    found = evaluate(EvaluateConfig(run=run, cache=random_cache.path, device="cpu"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = next(line for line in lines if line["epoch"] == found.epoch)
    assert kept["top1/label"] == found.scores["label"].top1
    model, _ = load_model(RunFolder(run))
    times = TimeSampling.of(16, 4, kind).of_middle
    tokens = torch.from_numpy(random_cache.read("validation")[:, :, times].astype(np.float32))
    with torch.no_grad():
        logits = model.eval()(tokens.flatten(0, 1))["label"].unflatten(0, (9, 2)).mean(1)
    top1 = (logits.argmax(1) == torch.arange(9) % 3).double().mean().item()
    assert found.scores["label"].top1 == pytest.approx(top1)


def test_a_run_from_before_frames_could_be_chosen_is_evaluated_on_all(
    random_cache: FeatureCache, tmp_path: Path
) -> None:
    run = RunFolder(train(_config(random_cache, tmp_path / "run")).run)
    before = evaluate(EvaluateConfig(run=run.path, cache=random_cache.path, device="cpu"))
    config = json.loads(run.config_path.read_text())
    del config["training"]["num_frames"], config["training"]["frame_sampling"]
    run.config_path.write_text(json.dumps(config))
    after = evaluate(EvaluateConfig(run=run.path, cache=random_cache.path, device="cpu"))
    assert before.to_dict() == after.to_dict()


def test_frames_are_part_of_what_a_run_is(random_cache: FeatureCache, tmp_path: Path) -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        return _config(random_cache, tmp_path, **changes).identity()

    assert identity(frame_sampling="window") == identity()
    different = [identity(), identity(num_frames=8), identity(num_frames=8, frame_sampling="window")]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])
