import errno
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vivit.pipeline import workspace
from vivit.pipeline.errors import CheckpointError, ConfigError, DataError, InterruptedRunError, StorageError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.tensor_file import read_tensors
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.learner import Learner
from vivit.stage2_temporal.loader import Batch
from vivit.stage2_temporal.run_folder import RunFolder, cache_of, default_run_name
from vivit.stage2_temporal.running_loss import DivergedError
from vivit.stage2_temporal.train import TrainResult, train
from vivit.stage2_temporal.validation import validation_metrics

STEPS_PER_EPOCH = 3
EPOCHS = 4
MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def config(toy_cache: FeatureCache, tmp_path: Path) -> MakeConfig:
    """Settings with everything that draws random numbers or keeps a memory, changed by keyword."""

    def make(run: str = "run", **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "cache": toy_cache.path,
            "epochs": EPOCHS,
            "batch_size": 8,
            "depth": 2,
            "warmup_epochs": 1.0,
            "drop_path": 0.3,
            "mixup": 0.4,
            "ema": 0.9,
            "device": "cpu",
        }
        return TrainConfig(run=tmp_path / run, **(settings | changes))

    return make


class Killed(BaseException):
    """Ends the process of a run as `kill -9` would: nothing is saved on the way out."""


def _at_step(monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> None:
    """Call `act` before step `at` (from 0)."""
    original = Learner.step

    def step(learner: Learner, batch: Batch, number: int) -> torch.Tensor:
        if number == at:
            act()
        return original(learner, batch, number)

    monkeypatch.setattr(Learner, "step", step)


def _kill() -> None:
    raise Killed


def _results(run: Path) -> dict[str, Any]:
    """All that a run leaves, without the time it took."""
    folder = RunFolder(run)
    lines = [json.loads(line) for line in folder.metrics_path.read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    state, _ = read_tensors(folder.state_path, remedy="")
    return {"model": folder.model_path.read_bytes(), "state": state, "metrics": lines}


def _assert_equal(one: Path, other: Path) -> None:
    a, b = _results(one), _results(other)
    assert a["model"] == b["model"]
    assert a["metrics"] == b["metrics"]
    assert a["state"].keys() == b["state"].keys()
    assert all(torch.equal(value, b["state"][name]) for name, value in a["state"].items())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("at", [0, 1, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH + 1])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, at: int, optimizer: str
) -> None:
    train(config("whole", optimizer=optimizer))
    with monkeypatch.context() as patch:
        _at_step(patch, at, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(
            InterruptedRunError, match=f"stopped after step {at + 1} of 12.*run the same command"
        ):
            train(config("parts", optimizer=optimizer))
    result = train(config("parts", optimizer=optimizer))
    assert result.resumed_from == at + 1
    _assert_equal(config("whole").run, config("parts").run)


@pytest.mark.parametrize("at", [1, STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH + 1])
def test_a_killed_run_ends_as_an_uninterrupted_one(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    train(config("whole"))
    with monkeypatch.context() as patch:
        _at_step(patch, at, _kill)
        with pytest.raises(Killed):
            train(config("parts"))
    assert train(config("parts")).resumed_from == at // STEPS_PER_EPOCH * STEPS_PER_EPOCH
    _assert_equal(config("whole").run, config("parts").run)


@pytest.mark.parametrize("method", ["save_model", "save_state", "write_metrics"])
def test_a_run_killed_while_it_saves_ends_as_an_uninterrupted_one(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    train(config("whole"))
    calls: list[int] = []
    original = getattr(RunFolder, method)

    def killed_at_second_call(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, method, killed_at_second_call)
        if method == "save_model":
            # The best epoch may be the first: make each epoch the best.
            patch.setattr("vivit.stage2_temporal.fit.best_epoch", lambda history: history[-1])
        with pytest.raises(Killed):
            train(config("parts"))
    train(config("parts"))
    _assert_equal(config("whole").run, config("parts").run)


def test_sigterm_stops_a_run_too_and_the_handlers_come_back(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    _at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(InterruptedRunError):
        train(config())
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_ctrl_c_does_not_wait(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    _at_step(monkeypatch, 1, twice)
    with pytest.raises(KeyboardInterrupt):
        train(config())


@pytest.mark.parametrize("where", ["load_training_data", "resume"])
def test_ctrl_c_before_the_first_step_loses_nothing_and_says_so(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(f"vivit.stage2_temporal.train.{where}", interrupted)
        with pytest.raises(
            InterruptedRunError, match="before the first step; nothing was lost: run the same"
        ):
            train(config("parts"))
    train(config("parts"))
    train(config("whole"))
    _assert_equal(config("whole").run, config("parts").run)


def test_two_trainings_in_one_folder_are_refused(config: MakeConfig) -> None:
    run = RunFolder(config().run)
    with (
        run.lock(),
        pytest.raises(
            CheckpointError, match=r"is being written by another process \(process \d+ on .*\): wait"
        ),
    ):
        train(config())
    assert train(config()).resumed_from == 0


def test_a_file_system_without_locks_is_a_warning(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("vivit.pipeline.folder_lock.fcntl.flock", refuse)
    assert train(config()).steps == EPOCHS * STEPS_PER_EPOCH
    assert "without locks" in caplog.text


def test_what_a_killed_training_began_to_write_is_removed_and_nothing_else(config: MakeConfig) -> None:
    run = train(config()).run
    begun = [run / ".model.safetensors.1.partial", run / "last" / ".state.safetensors.1.partial"]
    others = [run / "evaluation" / ".test.json.1.partial", run / "my.partial"]
    for path in [*begun, *others]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    train(config())
    assert [path.exists() for path in [*begun, *others]] == [False, False, True, True]


def test_training_does_not_depend_on_where_features_are_kept_or_on_global_randomness(
    config: MakeConfig,
) -> None:
    train(config("memory"))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    train(config("disk", memory_budget_bytes=0))
    _assert_equal(config("memory").run, config("disk").run)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_gives_other_weights(config: MakeConfig) -> None:
    models = [RunFolder(train(config(f"{s}", seed=s)).run).load_model()[0] for s in (0, 1)]
    assert not torch.equal(models[0]["temporal.pos_embed"], models[1]["temporal.pos_embed"])


def test_a_finished_run_is_left_as_it_is(config: MakeConfig) -> None:
    first = train(config())
    events = sorted(first.run.joinpath("tensorboard").iterdir())
    again = train(config(), report=lambda metrics: pytest.fail("nothing is left to train"))
    assert again.resumed_from == again.steps == EPOCHS * STEPS_PER_EPOCH
    assert again.history == first.history
    assert sorted(first.run.joinpath("tensorboard").iterdir()) == events


def test_each_epoch_is_reported_and_written_once(config: MakeConfig) -> None:
    reported: list[Any] = []
    result = train(config(), report=reported.append)
    lines = (result.run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history == reported
    assert [epoch["step"] for epoch in result.history] == [3, 6, 9, 12]
    assert result.best["score"] == max(epoch["score"] for epoch in result.history)
    assert any((result.run / "tensorboard").iterdir())


def test_the_best_epoch_is_kept_and_the_last_one_without_validation(config: MakeConfig) -> None:
    best = train(config())
    _, about = RunFolder(best.run).load_model()
    assert about["epoch"] == best.best["epoch"] == 1 + int(np.argmax([e["score"] for e in best.history]))
    last = train(config("last", validation_split=None, ema=None))
    tensors, about = RunFolder(last.run).load_model()
    state, _ = read_tensors(RunFolder(last.run).state_path, remedy="")
    assert about["epoch"] == EPOCHS
    assert "score" not in about
    assert all(torch.equal(value, state[f"model/{name}"]) for name, value in tensors.items())


def test_validation_comes_every_few_epochs_and_after_the_last(config: MakeConfig) -> None:
    history = train(config(validate_every=3)).history
    assert ["score" in epoch for epoch in history] == [False, False, True, True]


def test_the_average_of_the_weights_is_what_is_kept(config: MakeConfig) -> None:
    result = train(config(validation_split=None))
    tensors, _ = RunFolder(result.run).load_model()
    state, _ = read_tensors(RunFolder(result.run).state_path, remedy="")
    name = "heads.label.weight"
    assert torch.equal(tensors[name], state[f"average/{name}"])
    assert not torch.equal(tensors[name], state[f"model/{name}"])


def test_other_settings_are_refused_with_the_difference(config: MakeConfig) -> None:
    train(config(epochs=2))
    with pytest.raises(CheckpointError, match="was trained with other settings") as error:
        train(config(epochs=2, learning_rate=0.1, depth=3))
    message = str(error.value)
    assert "training.learning_rate: 0.0005 in the run, 0.1 asked for" in message
    assert "model.depth: 2 in the run, 3 asked for" in message
    assert "--run NAME" in message
    assert "epochs" not in message


def test_another_cache_is_refused_with_the_difference(config: MakeConfig, make_cache: Any) -> None:
    from_splits = {
        "train": (np.zeros((21, 2, 4, 16)), {"label": [0] * 21}),
        "validation": (np.zeros((9, 3, 4, 16)), {"label": [0] * 9}),
    }
    train(config(epochs=2))
    other = make_cache(from_splits, classes={"label": 3}, name="other.zarr", weights_sha256="f" * 64)
    with pytest.raises(
        CheckpointError, match=r"cache.settings.backbone.weights_sha256: 000.* in the run, fff"
    ):
        train(config(epochs=2, cache=other.path))
    relabelled = make_cache(from_splits, classes={"label": 3}, name="relabelled.zarr")
    with pytest.raises(CheckpointError, match=r"data\.sha256"):
        train(config(epochs=2, cache=relabelled.path))


def test_a_copy_of_the_cache_is_the_same_cache(config: MakeConfig, toy_cache: FeatureCache) -> None:
    train(config(epochs=2))
    moved = toy_cache.path.rename(toy_cache.path.with_name("moved.zarr"))
    assert train(config(epochs=2, cache=moved)).resumed_from == 6


def test_the_cache_of_a_run_is_found_from_any_folder(
    config: MakeConfig, toy_cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toy_cache.path.parent)
    run = train(config(cache=Path(toy_cache.path.name))).run
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cache_of(run) == toy_cache.path.resolve()


def test_the_default_name_is_the_same_until_something_that_decides_the_weights_changes(
    config: MakeConfig, make_cache: Any
) -> None:
    features = np.zeros((4, 1, 2, 16), np.float16)

    def name(folder: str, labels: list[int], classes: int = 2, **changes: Any) -> str:
        splits = {"train": (features, {"label": labels}), "test": (features, {"label": labels[::-1]})}
        cache = make_cache(splits, classes={"label": classes}, name=f"{folder}/toy.zarr")
        return default_run_name(config(cache=cache.path, **changes))

    assert name("a", [0, 1, 1, 1]) == name("b", [0, 1, 1, 1], precision="float32")
    others = [
        name("c", [0, 1, 1, 0]),
        name("d", [0, 1, 1, 1], classes=3),
        name("e", [0, 1, 1, 1], precision="bfloat16"),
        name("f", [0, 1, 1, 1], seed=1),
    ]
    assert len({name("g", [0, 1, 1, 1]), *others}) == 5


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_state_is_an_error_that_names_file_and_remedy(config: MakeConfig, damage: str) -> None:
    path = RunFolder(train(config(epochs=2)).run).state_path
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    damaged = {"truncated": data[: len(data) // 2], "flipped": data, "empty": bytearray()}
    path.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=rf"{path} is damaged.*delete {path.parent} to train again"):
        train(config(epochs=2))
    path.unlink()
    assert train(config(epochs=2)).resumed_from == 0


def test_a_damaged_configuration_is_an_error(config: MakeConfig) -> None:
    path = RunFolder(train(config(epochs=2)).run).config_path
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        train(config(epochs=2))
    path.write_text('{"format": 1}')
    for act in (lambda: train(config(epochs=2)), lambda: cache_of(config().run)):
        with pytest.raises(
            CheckpointError, match=r"config\.json is damaged \(it has no training\): restore it"
        ):
            act()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has weights but no config\.json"):
        train(config(epochs=2))


def test_a_full_disk_is_an_error_that_names_the_place(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("vivit.pipeline.tensor_file.write_atomically", full)
    with pytest.raises(StorageError, match=r"the disk is full at .*model\.safetensors"):
        train(config())
    monkeypatch.setattr("vivit.pipeline.tensor_file.write_atomically", workspace.write_atomically)
    assert train(config()).resumed_from == 0


@pytest.mark.parametrize("method", ["add_scalar", "close"])
def test_a_disk_that_is_full_for_the_curves_costs_nothing_that_is_saved(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    train(config("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(f"vivit.stage2_temporal.fit.SummaryWriter.{method}", full)
        with pytest.raises(StorageError, match=r"the disk is full at .*tensorboard"):
            train(config("parts"))
    assert train(config("parts")).resumed_from == (STEPS_PER_EPOCH if method == "add_scalar" else 12)
    _assert_equal(config("whole").run, config("parts").run)


def test_a_full_disk_does_not_hide_an_interruption(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(writer: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vivit.stage2_temporal.fit.SummaryWriter.close", full)
    _at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(InterruptedRunError, match="stopped after step 2"):
        train(config())


def test_a_folder_that_cannot_be_written_is_an_error(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="lies below a file"):
        train(config("file/run"))


def test_features_that_overflow_are_a_clear_error_and_are_not_saved(
    make_cache: Any, config: MakeConfig
) -> None:
    features = np.full((8, 1, 4, 16), 6e4, np.float16)
    cache = make_cache({"train": (features, {"label": [0] * 8})}, classes={"label": 2}, name="huge.zarr")
    settings = config(
        cache=cache.path, optimizer="sgd", learning_rate=1e30, clip_grad=None, temporal="mean", adapter="none"
    )
    with pytest.raises(
        DivergedError, match=r"the loss became (nan|inf) at step \d+: use a lower learning rate"
    ):
        train(settings)
    for path in (RunFolder(settings.run).state_path, RunFolder(settings.run).model_path):
        if path.exists():
            tensors, _ = read_tensors(path, remedy="")
            assert all(value.isfinite().all() for value in tensors.values())


def test_weights_that_break_in_the_last_step_are_not_saved(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Learner.step

    def step(learner: Learner, batch: Batch, number: int) -> torch.Tensor:
        loss = original(learner, batch, number)
        if number == 2 * STEPS_PER_EPOCH - 1:
            next(learner.model.parameters()).data.fill_(torch.nan)
        return loss

    monkeypatch.setattr(Learner, "step", step)
    with pytest.raises(DivergedError, match="weights are no longer finite after step 6"):
        train(config())
    _, about = read_tensors(RunFolder(config().run).state_path, remedy="")
    assert about["step"] == STEPS_PER_EPOCH


def test_a_split_without_labels_or_clips_is_an_error(make_cache: Any, config: MakeConfig) -> None:
    features = np.zeros((4, 1, 2, 16), np.float16)
    cases: dict[str, tuple[Any, dict[str, Any], str]] = {
        "unlabelled": (
            [-1] * 4,
            {},
            "has no labels: 4 of 4 clips have features, and none has a label of label",
        ),
        "failed": ([0] * 4, {"failed": {"train": range(4)}}, "has no usable clip: all 4 failed"),
    }
    for name, (labels, options, message) in cases.items():
        cache = make_cache(
            {"train": (features, {"label": labels})}, classes={"label": 2}, name=f"{name}.zarr", **options
        )
        with pytest.raises(DataError, match=message):
            train(config(name, cache=cache.path))
    with pytest.raises(DataError, match="has no split 'training' to train on: it has train, validation"):
        train(config(train_split="training"))


def test_failed_and_unlabelled_clips_are_left_out_and_counted(make_cache: Any, config: MakeConfig) -> None:
    features = np.random.default_rng(0).normal(size=(10, 1, 2, 16))
    labels = {"verb": [0, 1] * 4 + [-1, -1], "noun": [-1] * 9 + [1]}
    cache = make_cache(
        {"train": (features, labels)},
        classes={"verb": 2, "noun": 2},
        name="gaps.zarr",
        failed={"train": [0, 3]},
    )
    result = train(config(cache=cache.path))
    assert (result.num_clips, result.num_left_out) == (7, 3)


def test_verb_and_noun_choose_the_best_epoch_by_action(make_cache: Any, config: MakeConfig) -> None:
    features = np.random.default_rng(0).normal(size=(12, 1, 2, 16))
    labels = {"verb": [0, 1] * 6, "noun": [0, 1, 2] * 4}
    splits = {
        "train": (features, labels),
        "validation": (features[:6], {h: v[:6] for h, v in labels.items()}),
    }
    cache = make_cache(splits, classes={"verb": 2, "noun": 3}, name="ek.zarr")
    history = train(config(cache=cache.path)).history
    assert all(epoch["score"] == epoch["top1/action"] <= epoch["top1/verb"] for epoch in history)


def test_a_head_that_is_called_action_keeps_its_own_score() -> None:
    right, wrong = np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)[::-1]
    labels = {head: np.array([0, 1], np.int32) for head in ("verb", "noun", "action")}
    found = validation_metrics({"verb": right, "noun": right, "action": wrong}, labels)
    assert found == {"top1/verb": 1.0, "top1/noun": 1.0, "top1/action": 0.0, "score": pytest.approx(2 / 3)}


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_short_training_needs_no_other_warm_up(config: MakeConfig, epochs: int) -> None:
    run = train(config(epochs=epochs, warmup_epochs=None)).run
    assert RunFolder(run).read_config()["training"]["warmup_epochs"] == epochs / 10


def test_an_unknown_device_is_refused(config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="device 'gpu' cannot be used"):
        train(config(device="gpu"))


def test_bfloat16_trains_close_to_float32(config: MakeConfig) -> None:
    losses = [train(config(p, precision=p)).history[-1]["loss"] for p in ("float32", "bfloat16")]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def _order_splits() -> dict[str, Any]:
    """Class 0 shows a before b, class 1 b before a; the mean over time is the same for both."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 16)) * 2
    splits = {}
    for split, clips in (("train", 96), ("validation", 64)):
        labels = np.arange(clips) % 2
        early, late = np.where(labels[:, None], b, a), np.where(labels[:, None], a, b)
        features = rng.normal(size=(clips, 1, 6, 16)) * 0.3
        features[:, 0, :3] += early[:, None]
        features[:, 0, 3:] += late[:, None]
        splits[split] = (features, {"label": labels.tolist()})
    return splits


def test_the_transformer_learns_an_order_that_the_mean_cannot(make_cache: Any, config: MakeConfig) -> None:
    cache = make_cache(_order_splits(), classes={"label": 2}, name="order.zarr")

    def trained(temporal: str) -> TrainResult:
        return train(
            config(
                temporal,
                temporal=temporal,
                cache=cache.path,
                epochs=15,
                batch_size=16,
                learning_rate=3e-3,
                drop_path=0.0,
                mixup=0.0,
                ema=None,
            )
        )

    assert trained("transformer").history[-1]["score"] > 0.95
    assert trained("mean").history[-1]["score"] < 0.75
