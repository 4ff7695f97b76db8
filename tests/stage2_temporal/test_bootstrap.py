import numpy as np
import pytest

from vivit.stage2_temporal.bootstrap import mean_class_interval, share_interval

RNG = np.random.default_rng(0)
CORRECT = RNG.random(300) < 0.4
LABELS = RNG.choice([0, 1, 2, 7], 300, p=[0.5, 0.3, 0.15, 0.05])


def by_drawing_clips(number: object, resamples: int = 4000) -> list[float]:
    """The textbook: draw clips with replacement, compute the number, take percentiles."""
    assert callable(number)
    values = [number(RNG.integers(0, 300, 300)) for _ in range(resamples)]
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def test_the_interval_of_a_share_is_that_of_drawn_clips() -> None:
    expected = by_drawing_clips(lambda rows: CORRECT[rows].mean())
    assert share_interval(CORRECT) == pytest.approx(expected, abs=0.006)


def test_the_interval_of_mean_class_accuracy_is_that_of_drawn_clips() -> None:
    def mean_class(rows: np.ndarray) -> float:
        return float(np.mean([CORRECT[rows][LABELS[rows] == c].mean() for c in np.unique(LABELS[rows])]))

    assert mean_class_interval(CORRECT, LABELS) == pytest.approx(by_drawing_clips(mean_class), abs=0.012)


@pytest.mark.parametrize("value", [False, True])
def test_where_all_clips_agree_there_is_no_doubt(value: bool) -> None:
    every = np.full(300, value)
    assert share_interval(every) == mean_class_interval(every, LABELS) == [value, value]


def test_the_same_clips_have_the_same_interval() -> None:
    assert share_interval(CORRECT) == share_interval(CORRECT)
    assert mean_class_interval(CORRECT, LABELS) == mean_class_interval(CORRECT, LABELS)


def test_more_clips_make_it_narrower() -> None:
    (few_low, few_high), (low, high) = share_interval(CORRECT), share_interval(np.tile(CORRECT, 16))
    assert few_low < low < CORRECT.mean() < high < few_high
    assert (high - low) / (few_high - few_low) == pytest.approx(1 / 4, abs=0.03)
