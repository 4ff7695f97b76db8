import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vivit.pipeline.errors import IncompleteCacheError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.stage2_temporal import loader
from vivit.stage2_temporal.loader import (
    Batch,
    Features,
    TrainingBatches,
    epoch_order,
    epoch_views,
    read_ahead,
)

CPU = torch.device("cpu")


def _batches(cache: FeatureCache, *, budget: int | None = None, seed: int = 0) -> TrainingBatches:
    rows = cache.usable_rows("train")
    features = Features(cache, "train", rows, device=CPU, budget_bytes=budget)
    labels = cache.manifest.labels("train")
    return TrainingBatches(features, rows, labels, batch_size=4, seed=seed, device=CPU)


def _stacked(batches: Iterator[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    made = list(batches)
    return torch.cat([b.tokens for b in made]), torch.cat([b.labels["label"] for b in made])


def _numbered(make_cache: Any, **options: Any) -> FeatureCache:
    """Each feature is 100 * view + row, and the label the row modulo 3."""
    rows, views = np.arange(21)[:, None, None, None], np.arange(3)[None, :, None, None]
    features = np.broadcast_to(rows + 100 * views, (21, 3, 2, 4))
    splits = {"train": (features, {"label": [row % 3 for row in range(21)]})}
    cache: FeatureCache = make_cache(splits, classes={"label": 3}, **options)
    return cache


@pytest.mark.parametrize("budget", [None, 0], ids=["memory", "disk"])
def test_an_epoch_uses_each_clip_once_with_its_own_label(make_cache: Any, budget: int | None) -> None:
    batches = _batches(_numbered(make_cache, failed={"train": [5, 8]}), budget=budget)
    tokens, labels = _stacked(batches.epoch(0))
    assert batches.steps_per_epoch == 5
    assert tokens.shape == (19, 2, 4)
    assert tokens.dtype == torch.float16
    rows = tokens[:, 0, 0].long() % 100
    assert sorted(rows.tolist()) == [row for row in range(21) if row not in (5, 8)]
    assert torch.equal(labels, rows % 3)


def test_features_come_from_the_same_views_wherever_they_are_kept(make_cache: Any) -> None:
    cache = _numbered(make_cache, failed={"train": [0, 17]})
    for epoch in range(3):
        kept, read = (_stacked(_batches(cache, budget=budget).epoch(epoch)) for budget in (None, 0))
        assert torch.equal(kept[0], read[0])
        assert torch.equal(kept[1], read[1])


def test_epochs_and_seeds_differ_and_repeat(make_cache: Any) -> None:
    cache = _numbered(make_cache)
    drawn = {(seed, e): _stacked(_batches(cache, seed=seed).epoch(e))[0] for seed in (0, 1) for e in (0, 1)}
    assert torch.equal(drawn[0, 1], _stacked(_batches(cache).epoch(1))[0])
    keys = list(drawn)
    assert not any(torch.equal(drawn[a], drawn[b]) for i, a in enumerate(keys) for b in keys[:i])


def test_an_epoch_can_be_entered_at_any_batch(make_cache: Any) -> None:
    batches = _batches(_numbered(make_cache))
    whole = [batch.tokens for batch in batches.epoch(2)]
    assert all(torch.equal(a.tokens, b) for a, b in zip(batches.epoch(2, first=3), whole[3:], strict=True))


def test_the_view_of_a_clip_does_not_depend_on_the_other_clips() -> None:
    every, some = np.arange(50), np.array([3, 7, 41])
    assert (epoch_views(0, 4, every, 50, 4)[some] == epoch_views(0, 4, some, 50, 4)).all()


def test_views_and_order_are_uniform() -> None:
    rows = np.arange(10)
    views = np.concatenate([epoch_views(0, epoch, rows, 10, 4) for epoch in range(400)])
    assert np.bincount(views, minlength=4) == pytest.approx(np.full(4, 1000), rel=0.1)
    firsts = [epoch_order(0, epoch, rows, 10)[0] for epoch in range(1000)]
    assert np.bincount(firsts, minlength=10) == pytest.approx(np.full(10, 100), rel=0.35)


def test_all_views_are_read_in_order(make_cache: Any) -> None:
    cache = _numbered(make_cache)
    rows = cache.usable_rows("train")
    for budget in (None, 0):
        features = Features(cache, "train", rows, device=CPU, budget_bytes=budget)
        tokens = features.first_views(np.array([9, 2]), 2)
        assert tokens[..., 0, 0].tolist() == [[9, 109], [2, 102]]


@pytest.mark.parametrize(
    ("budget", "free", "expected"),
    [(None, 10_000, "memory"), (None, 1_500, "disk"), (1_007, 10_000, "disk"), (1_008, 10_000, "memory")],
)
def test_features_stay_in_memory_within_the_budget(
    make_cache: Any, monkeypatch: pytest.MonkeyPatch, budget: int | None, free: int, expected: str
) -> None:
    monkeypatch.setattr(loader, "available_memory_bytes", lambda: free)
    cache = _numbered(make_cache)
    features = Features(cache, "train", np.arange(21), device=CPU, budget_bytes=budget)
    assert features.size_bytes == 21 * 3 * 2 * 4 * 2 == 1008
    assert features.residency == expected


def test_free_memory_is_a_number_of_bytes() -> None:
    assert 2**24 < loader.available_memory_bytes() < 2**50


def test_reading_ahead_keeps_order_stops_early_and_passes_errors() -> None:
    assert list(read_ahead(lambda x: x * 2, list(range(20)))) == list(range(0, 40, 2))
    made: list[int] = []

    def make(item: int) -> int:
        made.append(item)
        return item

    ahead = read_ahead(make, list(range(1000)))
    assert next(ahead) == 0
    ahead.close()  # type: ignore[attr-defined]
    assert len(made) < 10
    assert not any(thread.name.startswith("features") for thread in threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(lambda x: 1 // x, [1, 0]))


def _grown(cache: FeatureCache, failed: tuple[int, ...]) -> FeatureCache:
    """The cache with 2 more training views, 300 and 400 and the row, which some clips lack."""
    cache.append_views(5)
    cache = FeatureCache.open(cache.path)
    views = range(3, 5)
    for block in range(cache.num_blocks("train")):
        rows = range(*cache.rows("train", block))
        first = [record for record in cache.records("train")[rows.start : rows.stop] if record is not None]
        records = [
            replace(record, outcome="timeout") if row in failed else record
            for row, record in zip(rows, first, strict=True)
        ]
        features = np.zeros((len(rows), 2, 2, 4), np.float16)
        for at, (row, record) in enumerate(zip(rows, records, strict=True)):
            if record.usable:
                features[at] = row + 100 * np.array(views)[:, None, None]
        cache.commit("train", block, features, records, views=views)
    assert cache.publish_views()
    return FeatureCache.open(cache.path)


@pytest.mark.parametrize("budget", [None, 0], ids=["memory", "disk"])
def test_a_clip_is_drawn_from_the_views_that_it_has(make_cache: Any, budget: int | None) -> None:
    cache = _grown(_numbered(make_cache, failed={"train": [4]}), failed=(2, 11))
    batches = _batches(cache, budget=budget)
    seen: dict[int, set[int]] = {}
    for epoch in range(60):
        for number in _stacked(batches.epoch(epoch))[0][:, 0, 0].long().tolist():
            seen.setdefault(number % 100, set()).add(number // 100)
    assert seen.keys() == set(range(21)) - {4}
    assert all(views == set(range(3 if row in (2, 11) else 5)) for row, views in seen.items())


def test_other_clips_draw_the_same_views_whether_or_not_one_lacks_some(make_cache: Any) -> None:
    rows = np.arange(21)
    counts = np.where(rows == 3, 1, 5)
    even, uneven = epoch_views(0, 4, rows, 21, 5), epoch_views(0, 4, rows, 21, counts)
    assert uneven[3] == 0
    assert (np.delete(even, 3) == np.delete(uneven, 3)).all()


def test_scores_are_of_the_views_that_all_clips_have(make_cache: Any) -> None:
    cache = _grown(_numbered(make_cache), failed=(2,))
    assert Features(cache, "train", cache.usable_rows("train"), device=CPU).num_common_views == 3
    assert Features(cache, "train", np.array([0, 1]), device=CPU).num_common_views == 5


@pytest.mark.parametrize("budget", [None, 0], ids=["memory", "disk"])
def test_a_block_that_lost_its_appended_views_is_used_with_the_others(
    make_cache: Any, budget: int | None
) -> None:
    cache = _grown(_numbered(make_cache), failed=())
    cache.withdraw("ledger/train/000001.3-4.json")
    with pytest.raises(IncompleteCacheError, match=r"train lacks 1 of 3 blocks"):
        FeatureCache.open(cache.path)
    cache = FeatureCache.open(cache.path, allow_partial=True)
    assert cache.usable_views("train").tolist() == [5] * 8 + [3] * 8 + [5] * 5
    for epoch in range(10):
        numbers = _stacked(_batches(cache, budget=budget).epoch(epoch))[0][:, 0, 0].long()
        rows, views = numbers % 100, numbers // 100
        assert sorted(rows.tolist()) == list(range(21))
        assert (views[(rows >= 8) & (rows < 16)] < 3).all()
