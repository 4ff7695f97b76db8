import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pa_parquet
import pytest
import torch

from vivit.pipeline.errors import CheckpointError, DataError, IncompleteCacheError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.evaluate import EvaluateConfig, evaluate, load_model
from vivit.stage2_temporal.metrics import softmax
from vivit.stage2_temporal.run_folder import RunFolder, default_run_name
from vivit.stage2_temporal.train import train

LABELS = {"verb": [0, 1, 1, -1, 0, 1, 1], "noun": [2, 0, 1, 1, 2, 0, 0]}
CLASSES = {"verb": 2, "noun": 3}


def _splits(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    train_labels = {"verb": [0, 1] * 6, "noun": [0, 1, 2] * 4}
    return {
        "train": (rng.normal(size=(12, 2, 3, 16)), train_labels),
        "validation": (rng.normal(size=(7, 4, 3, 16)), LABELS),
    } | changes


@pytest.fixture
def cache(make_cache: Any) -> FeatureCache:
    made: FeatureCache = make_cache(_splits(), classes=CLASSES, failed={"validation": [1, 6]})
    return made


@pytest.fixture
def run(cache: FeatureCache, tmp_path: Path) -> Path:
    """A run with weights that are not symmetric in anything."""
    path = tmp_path / "run"
    train(TrainConfig(cache=cache.path, run=path, epochs=3, depth=1, batch_size=4, learning_rate=1e-2))
    return path


def _view_logits(run: Path, cache: FeatureCache, views: int) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """Logits [clip, view, class] per head of the usable validation clips, one view at a time."""
    model, _ = load_model(RunFolder(run))
    rows = cache.usable_rows("validation")
    with torch.no_grad():
        each = [
            model.eval()(
                torch.from_numpy(np.ascontiguousarray(cache.read("validation", rows, [v])[:, 0])).float()
            )
            for v in range(views)
        ]
    return rows, {head: np.stack([logits[head].numpy() for logits in each], 1) for head in CLASSES}


@pytest.mark.parametrize("average", ["logits", "softmax"])
@pytest.mark.parametrize("max_views", [None, 3])
def test_views_are_averaged(cache: FeatureCache, run: Path, average: Any, max_views: int | None) -> None:
    config = EvaluateConfig(run=run, cache=cache.path, average=average, max_views=max_views, batch_size=8)
    found = evaluate(config)
    rows, expected = _view_logits(run, cache, max_views or 4)
    table = pa_parquet.read_table(run / "evaluation" / "validation.parquet")
    assert table["clip_id"].to_pylist() == [f"validation-{row}" for row in rows]
    assert table["num_views"].to_pylist() == [max_views or 4] * 5 == [found.num_views] * 5
    for head, logits in expected.items():
        stored = np.array(table[f"logits/{head}"].to_pylist())
        if average == "logits":
            np.testing.assert_allclose(stored, logits.mean(1), atol=1e-5)
        else:
            np.testing.assert_allclose(softmax(stored), softmax(logits).mean(1), atol=1e-6)
        assert table[f"label/{head}"].to_pylist() == [LABELS[head][row] for row in rows]
    assert found.average == average


def test_scores_are_those_of_the_stored_logits(cache: FeatureCache, run: Path) -> None:
    found = evaluate(EvaluateConfig(run=run, cache=cache.path))
    table = pa_parquet.read_table(run / "evaluation" / "validation.parquet").to_pydict()
    right = {
        head: np.array(
            [np.argmax(x) == y for x, y in zip(table[f"logits/{head}"], table[f"label/{head}"], strict=True)]
        )
        for head in CLASSES
    }
    labelled = np.array(table["label/verb"]) >= 0
    assert found.scores["verb"].top1 == right["verb"][labelled].mean()
    assert found.scores["noun"].top1 == right["noun"].mean()
    assert found.scores["action"].top1 == (right["verb"] & right["noun"])[labelled].mean()
    assert (found.scores["verb"].num_clips, found.scores["noun"].num_clips) == (4, 5)
    assert found.scores["noun"].top5 == 1
    assert json.loads((run / "evaluation" / "validation.json").read_text()) == found.to_dict()


def test_left_out_clips_are_counted_and_count_as_wrong(cache: FeatureCache, run: Path) -> None:
    found = evaluate(EvaluateConfig(run=run, cache=cache.path))
    assert found.coverage.num_clips == 7
    assert found.coverage.num_evaluated == 5
    assert found.coverage.outcomes == {"ok": 5, "missing": 2}
    assert found.coverage.left_out == {"missing": 2}
    for head, evaluated, labelled in (("verb", 4, 6), ("noun", 5, 7), ("action", 4, 6)):
        score = found.scores[head]
        assert score.top1_of_all == pytest.approx(score.top1 * evaluated / labelled)


def test_a_partial_cache_is_refused_or_said(make_cache: Any, cache: FeatureCache, run: Path) -> None:
    partial = make_cache(
        _splits(), classes=CLASSES, name="partial.zarr", block_size=4, skipped={"validation": [1]}
    )
    config = {"run": run, "cache": partial.path, "split": "validation"}
    with pytest.raises(IncompleteCacheError, match="validation lacks 1 of 2 blocks"):
        evaluate(EvaluateConfig(**config))
    found = evaluate(EvaluateConfig(**config, allow_partial=True))
    assert found.coverage.left_out == {"not extracted": 3}
    assert found.coverage.num_evaluated == 4


def test_a_split_without_labels_gets_logits_and_no_scores(make_cache: Any, run: Path) -> None:
    features = np.random.default_rng(1).normal(size=(3, 4, 3, 16))
    unlabelled = make_cache(
        {"test": (features, {"verb": [-1] * 3, "noun": [-1] * 3})}, classes=CLASSES, name="test.zarr"
    )
    found = evaluate(EvaluateConfig(run=run, cache=unlabelled.path, split="test"))
    assert found.scores == {}
    assert found.coverage.num_evaluated == 3
    assert pa_parquet.read_table(run / "evaluation" / "test.parquet").num_rows == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights_sha256": "f" * 64}, r"backbone\.weights_sha256: 000.* in the run, fff.* in the cache"),
        ({"num_frames": 6}, r"backbone\.tubelet: 1 in the run, 2 in the cache\n  views\.num_frames: 3 in"),
        ({"classes": {"verb": 2, "noun": 4}}, r"has other classes than .*\n  heads\.noun: "),
        ({"classes": {"verb": 2, "noun": 3, "tool": 2}}, r"heads\.tool: None in the run, \['tool 0'"),
    ],
    ids=["weights", "view", "class list", "head"],
)
def test_features_or_classes_of_another_kind_are_refused(
    make_cache: Any, run: Path, options: dict[str, Any], message: str
) -> None:
    other = make_cache(_splits(), name="other.zarr", **({"classes": CLASSES} | options))
    with pytest.raises(CheckpointError, match=message):
        evaluate(EvaluateConfig(run=run, cache=other.path))


def test_another_cache_with_features_of_the_same_kind_is_fine(make_cache: Any, run: Path) -> None:
    more_views = np.random.default_rng(2).normal(size=(5, 6, 3, 16))
    labels = {head: values[:5] for head, values in LABELS.items()}
    other = make_cache({"validation": (more_views, labels)}, classes=CLASSES, name="other.zarr")
    assert evaluate(EvaluateConfig(run=run, cache=other.path)).num_views == 6


def test_damaged_or_missing_weights_are_an_error(cache: FeatureCache, run: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(run=run, cache=cache.path)
    path = run / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"model.safetensors is damaged.*run the command that trained it"
    ):
        evaluate(config)
    path.unlink()
    with pytest.raises(
        CheckpointError, match=r"model.safetensors does not exist: run the command that trained it"
    ):
        evaluate(config)
    with pytest.raises(CheckpointError, match=r"is not a run: it has no config\.json"):
        evaluate(EvaluateConfig(run=tmp_path / "nothing", cache=cache.path))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("cache", {"path": "c"}, r"config\.json is damaged \(it has no cache\.identity\)"),
        ("heads", None, r"config\.json is damaged \(it has no heads\)"),
        ("model", {}, r"config\.json does not describe a model"),
        ("model", {"dim": 8, "time": 3, "heads": CLASSES}, r"model\.safetensors does not fit .*config\.json"),
        ("model", {"dim": 8, "time": 3, "heads": ["verb"]}, r"does not describe a model"),
        (
            "model",
            {"dim": 0, "time": 3, "heads": CLASSES},
            r"does not describe a model \(dim must be at least 1",
        ),
    ],
    ids=["key of cache", "heads", "no model", "other model", "heads without counts", "impossible model"],
)
def test_a_configuration_that_lacks_or_mistakes_something_is_an_error(
    cache: FeatureCache, run: Path, part: str, value: Any, message: str
) -> None:
    path = RunFolder(run).config_path
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
    with pytest.raises(CheckpointError, match=message):
        evaluate(EvaluateConfig(run=run, cache=cache.path))


def test_weights_without_their_epoch_are_an_error(cache: FeatureCache, run: Path) -> None:
    folder = RunFolder(run)
    folder.save_model(folder.load_model()[0], {})
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit .*'epoch'"):
        evaluate(EvaluateConfig(run=run, cache=cache.path))


def test_a_split_that_is_not_there_or_failed_is_an_error(
    make_cache: Any, cache: FeatureCache, run: Path
) -> None:
    with pytest.raises(DataError, match="has no split 'test': it has train, validation"):
        evaluate(EvaluateConfig(run=run, cache=cache.path, split="test"))
    broken = make_cache(_splits(), classes=CLASSES, name="broken.zarr", failed={"validation": range(7)})
    with pytest.raises(DataError, match="has no usable clip"):
        evaluate(EvaluateConfig(run=run, cache=broken.path))


def test_validation_during_training_is_the_evaluation(cache: FeatureCache, run: Path) -> None:
    found = evaluate(EvaluateConfig(run=run, cache=cache.path))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = next(line for line in lines if line["epoch"] == found.epoch)
    for head in ("verb", "noun", "action"):
        assert kept[f"top1/{head}"] == found.scores[head].top1


def _with_more_views(cache: FeatureCache) -> None:
    """Append a training view, a copy of the first."""
    cache.append_views(cache.shape("train")[1] + 1)
    cache = FeatureCache.open(cache.path)
    views = cache.view_ranges("train")[1]
    for block in range(cache.num_blocks("train")):
        rows = range(*cache.rows("train", block))
        records = [record for record in cache.records("train")[rows.start : rows.stop] if record is not None]
        cache.commit("train", block, np.array(cache.read("train", rows, [0])), records, views=views)
    cache.publish_views()


def test_a_run_is_evaluated_on_its_cache_that_gained_views(cache: FeatureCache, run: Path) -> None:
    config = EvaluateConfig(run=run, cache=cache.path)
    before = evaluate(config)
    _with_more_views(cache)
    assert evaluate(config).scores == before.scores


def test_a_training_does_not_go_on_with_views_that_it_did_not_begin_with(
    cache: FeatureCache, tmp_path: Path
) -> None:
    config = TrainConfig(cache=cache.path, run=tmp_path / "run", epochs=3, depth=1, batch_size=4)
    name = default_run_name(config)
    train(config)
    _with_more_views(cache)
    views = cache.shape("train")[1]
    with pytest.raises(
        CheckpointError, match=rf"views\.train_views: {views} in the run, {views + 1} asked for"
    ):
        train(config)
    assert default_run_name(config) != name
