"""95 % intervals by the percentile bootstrap: what a number would be on other clips of the same kind."""

from typing import Any

import numpy as np
import numpy.typing as npt

Interval = list[float]
"""Low and high end."""

NUM_RESAMPLES = 2000
_SEED = 0
_PERCENTILES = (2.5, 97.5)


def share_interval(correct: npt.NDArray[np.bool_]) -> Interval:
    """Interval of the share of correct clips.

    Of n clips drawn with replacement, Binomial(n, share) are correct: the clips themselves need not be drawn.
    """
    count = len(correct)
    return _interval(_generator().binomial(count, correct.mean(), NUM_RESAMPLES) / count)


def mean_class_interval(correct: npt.NDArray[np.bool_], labels: npt.NDArray[np.integer[Any]]) -> Interval:
    """Interval of the mean over classes of the share of correct clips [clip], all with a label.

    Of n clips drawn with replacement, the numbers per (class, correct or not) are multinomial. A class that a resample
    lacks is left out of its mean, as one that the split lacks is.
    """
    classes, index = np.unique(labels, return_inverse=True)
    cells = np.bincount(index * 2 + correct, minlength=2 * len(classes))
    drawn = _generator().multinomial(len(labels), cells / cells.sum(), NUM_RESAMPLES)
    wrong, right = drawn[:, 0::2], drawn[:, 1::2]
    occurs = wrong + right > 0
    shares = right / np.maximum(wrong + right, 1)
    return _interval(shares.sum(axis=1) / occurs.sum(axis=1))


def _generator() -> np.random.Generator:
    return np.random.Generator(np.random.Philox(_SEED))


def _interval(values: npt.NDArray[np.float64]) -> Interval:
    low, high = np.percentile(values, _PERCENTILES)
    return [float(low), float(high)]
