import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pa_parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vivit.pipeline.errors import CheckpointError, ConfigError, InterruptedRunError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.tensor_file import read_tensors
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.evaluate import EvaluateConfig, evaluate, load_model
from vivit.stage2_temporal.joint_head import JOINT_HEAD, Pairs
from vivit.stage2_temporal.metrics import softmax
from vivit.stage2_temporal.model import ModelConfig
from vivit.stage2_temporal.run_folder import RunFolder, default_run_name
from vivit.stage2_temporal.train import train

CLASSES = {"verb": 2, "noun": 3}
NAMES = {head: [f"{head} {i}" for i in range(count)] for head, count in CLASSES.items()}
TRAINING = {"verb": [0, 1, 1, 0, -1, 1, 0, 1], "noun": [2, 0, 1, 2, 1, -1, 2, 0]}
SEEN = [2, 3, 4]
"""(0, 2), (1, 0) and (1, 1) as verb * 3 + noun."""
VALIDATION = {"verb": [0, 1, 1, 0, -1], "noun": [2, 0, 2, 0, 1]}
"""The third and fourth pair are not in training; the last clip has no verb."""


@pytest.fixture
def cache(make_cache: Any) -> FeatureCache:
    made: FeatureCache = make_cache(splits(), classes=CLASSES)
    return made


def splits(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "train": (rng.normal(size=(8, 2, 3, 16)), TRAINING),
        "validation": (rng.normal(size=(5, 2, 3, 16)), VALIDATION),
    } | changes


@pytest.fixture
def config(cache: FeatureCache, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        cache=cache.path, run=tmp_path / "run", joint_head=True, epochs=4, depth=1, batch_size=4, mixup=0.3,
        learning_rate=1e-2, device="cpu",
    )  # fmt: skip


def arrays(labels: Mapping[str, list[int]]) -> dict[str, npt.NDArray[np.int32]]:
    return {head: np.array(values, np.int32) for head, values in labels.items()}


def test_the_classes_are_the_pairs_seen_in_training() -> None:
    pairs = Pairs.seen(arrays(TRAINING), NAMES)
    assert (pairs.ids, pairs.split()) == (SEEN, [(0, 2), (1, 0), (1, 1)])
    verbs, nouns = arrays(VALIDATION).values()
    assert pairs.labels(verbs, nouns).tolist() == [0, 1, -1, -1, -1]


@pytest.mark.parametrize(
    ("labels", "heads", "message"),
    [
        ({"label": [0]}, {"label": ["a"]}, "needs the heads verb and noun, and there are label"),
        (TRAINING, {**NAMES, "joint": ["x"]}, "a head called joint of its own"),
        ({"verb": [0, -1], "noun": [-1, 1]}, NAMES, "no training clip has both"),
    ],
    ids=["other heads", "taken", "no pair"],
)
def test_without_pairs_there_is_no_joint_head(labels: Any, heads: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pairs.seen(arrays(labels), heads)


def test_a_model_has_as_many_joint_classes_as_pairs() -> None:
    shape: dict[str, Any] = {"dim": 8, "time": 2}
    config = ModelConfig(**shape, heads={**CLASSES, JOINT_HEAD: 3}, pairs=SEEN)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="head joint has 4 classes for 3 pairs"):
        ModelConfig(**shape, heads={**CLASSES, JOINT_HEAD: 4}, pairs=SEEN)


def logits_of(num_clips: int) -> Any:
    values = st.integers(-6, 6).map(lambda number: number / 2)
    sizes = {**CLASSES, JOINT_HEAD: len(SEEN)}
    return st.fixed_dictionaries(
        {head: hnp.arrays(np.float32, (num_clips, size), elements=values) for head, size in sizes.items()}
    )


@given(logits=logits_of(4), share=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_the_fused_score_is_the_mixture_of_the_two_probabilities(logits: Any, share: float) -> None:
    verbs, nouns = np.array([0, 1, 1, -1]), np.array([2, 0, 2, 1])
    verb, noun, joint = (softmax(logits[head]) for head in ("verb", "noun", JOINT_HEAD))
    mixture = ((1 - share) * verb[:, :, None] * noun[:, None, :]).reshape(4, -1)
    mixture[:, SEEN] += share * joint
    found = Pairs(SEEN, 3).fused_ranks(logits, verbs, nouns, share=share)
    for row, pair in enumerate([2, 3, 5]):
        above = mixture[row] > mixture[row, pair] + 1e-9
        level = mixture[row] > mixture[row, pair] - 1e-9
        assert above.sum() <= found[row] < level.sum()
    assert found[3] == 0


def test_the_lower_pair_wins_a_tie() -> None:
    logits = {head: np.zeros((6, size)) for head, size in {**CLASSES, JOINT_HEAD: 3}.items()}
    verbs, nouns = np.divmod(np.arange(6), 3)
    assert Pairs(SEEN, 3).fused_ranks(logits, verbs, nouns, share=0.5).tolist() == [3, 4, 0, 1, 2, 5]
    assert Pairs(SEEN, 3).fused_ranks(logits, verbs, nouns, share=0.0).tolist() == list(range(6))


def test_a_trained_joint_head_is_evaluated_beside_the_product(config: TrainConfig) -> None:
    train(config)
    run = json.loads((config.run / "config.json").read_text())
    assert (run["model"]["pairs"], run["model"]["heads"][JOINT_HEAD]) == (SEEN, 3)
    assert run["heads"] == NAMES
    found = evaluate(EvaluateConfig(run=config.run, cache=config.cache, fusion=0.25))
    assert list(found.scores) == ["verb", "noun", "action", "joint", "fused"]
    table = pa_parquet.read_table(config.run / "evaluation" / "validation.parquet").to_pydict()
    logits = {head: np.array(table[f"logits/{head}"]) for head in ("verb", "noun", JOINT_HEAD)}
    right = [
        SEEN[int(joint.argmax())] == verb * 3 + noun
        for joint, verb, noun in zip(logits[JOINT_HEAD], *VALIDATION.values(), strict=True)
    ]
    assert found.scores["joint"].top1 == np.mean(right[:4])
    assert found.scores["joint"].top5 == 0.5  # pairs that were never seen count, and are never found
    probability = {head: softmax(values) for head, values in logits.items()}
    mixture = 0.75 * probability["verb"][:, :, None] * probability["noun"][:, None, :]
    mixture.reshape(5, -1)[:, SEEN] += 0.25 * probability[JOINT_HEAD]
    best = mixture.reshape(5, -1).argmax(axis=1)
    wanted = [verb * 3 + noun for verb, noun in zip(*VALIDATION.values(), strict=True)]
    assert found.scores["fused"].top1 == np.mean(best[:4] == wanted[:4])
    assert [found.scores[name].num_clips for name in ("action", "joint", "fused")] == [4, 4, 4]
    assert found.fusion == 0.25
    last = json.loads((config.run / "metrics.jsonl").read_text().splitlines()[found.epoch - 1])
    assert last["top1/joint"] == found.scores["joint"].top1
    assert last["score"] == found.scores["action"].top1


def test_a_joint_head_learns_its_pairs(make_cache: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    labels = {"verb": [0, 1] * 20, "noun": [2, 0] * 20}
    features = rng.normal(size=(40, 1, 3, 16)) + np.eye(2, 16)[labels["verb"]][:, None, None] * 4
    made = make_cache({"train": (features, labels), "validation": (features, labels)}, classes=CLASSES)
    run = tmp_path / "learnt"
    train(
        TrainConfig(
            cache=made.path, run=run, joint_head=True, epochs=30, depth=1, learning_rate=3e-3, device="cpu"
        )
    )
    found = evaluate(EvaluateConfig(run=run, cache=made.path))
    assert found.scores["joint"].top1 > 0.9
    assert found.scores["fused"].top1 > 0.9


def test_an_interrupted_training_with_a_joint_head_ends_with_the_same_weights(
    config: TrainConfig, tmp_path: Path
) -> None:
    whole = train(config)
    parts = replace(config, run=tmp_path / "parts")

    def interrupt(metrics: Mapping[str, Any]) -> None:
        if metrics["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRunError):
        train(parts, interrupt)
    assert 0 < train(parts).resumed_from < whole.steps
    tensors = [read_tensors(run / "model.safetensors", remedy="")[0] for run in (config.run, parts.run)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(value.equal(tensors[1][name]) for name, value in tensors[0].items())
    assert f"heads.{JOINT_HEAD}.weight" in tensors[0]


def test_a_joint_head_makes_another_run_and_none_changes_no_name(config: TrainConfig) -> None:
    plain = replace(config, joint_head=False)
    assert "joint_head" not in plain.identity()
    assert default_run_name(plain) != default_run_name(config)
    train(config)
    with pytest.raises(CheckpointError, match=r"joint_head: True in the run, None asked for"):
        train(plain)


def test_a_joint_head_starts_from_one_with_the_same_pairs_only(
    config: TrainConfig, make_cache: Any, tmp_path: Path
) -> None:
    train(config)
    init = str(config.run)
    same = replace(config, run=tmp_path / "same", init=init, epochs=1)
    train(same)
    origins = json.loads((same.run / "initialisation.json").read_text())
    assert origins["heads.joint.weight"] == "run/model.safetensors: heads.joint.weight"
    labels = {**TRAINING, "noun": [2, 0, 2, 2, 1, -1, 2, 0]}
    other = make_cache(splits(train=(splits()["train"][0], labels)), classes=CLASSES, name="other.zarr")
    changed = replace(same, run=tmp_path / "changed", cache=other.path)
    train(changed)
    assert load_model(RunFolder(changed.run))[0].config.pairs == [2, 3, 5]
    origins = json.loads((changed.run / "initialisation.json").read_text())
    assert "head joint has other pairs in" in origins["heads.joint.weight"]


def test_fusion_without_a_joint_head_is_refused(config: TrainConfig) -> None:
    train(replace(config, joint_head=False))
    with pytest.raises(ConfigError, match="--fusion is for a model with a joint head"):
        evaluate(EvaluateConfig(run=config.run, cache=config.cache, fusion=0.5))
