"""Accuracies, in plain NumPy. Ties are broken by class id, or id of the pair: the lower one wins."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vivit.pipeline.manifest import UNKNOWN

Scores = npt.NDArray[np.floating]
Labels = npt.NDArray[np.integer]

_CHUNK_NUMBERS = 2**23
"""Numbers of an outer product held at a time."""


def ranks(scores: Scores, labels: Labels) -> npt.NDArray[np.int64]:
    """How many classes come before the true one, for scores [clip, class] and known labels [clip].

    A score that is not a number comes before all others, and ranks last where it is the true class's own.
    """
    own = scores[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(scores.shape[1]) < labels[:, None]
    return np.asarray(np.where(earlier, ~(scores < own), ~(scores <= own)).sum(axis=1))


def correct_in_top(k: int, scores: Scores, labels: Labels) -> npt.NDArray[np.bool_]:
    """Whether the true class is among the best `k` [clip]; False for clips without a label."""
    known = labels != UNKNOWN
    correct = np.zeros(len(labels), dtype=bool)
    correct[known] = ranks(scores[known], labels[known]) < k
    return correct


def top_k(k: int, scores: Scores, labels: Labels) -> float | None:
    """Share of the labelled clips whose true class is among the best `k`; None where no clip has a label."""
    return share_of(correct_in_top(k, scores, labels), labels != UNKNOWN)


def share_of(correct: npt.NDArray[np.bool_], counted: npt.NDArray[np.bool_]) -> float | None:
    """Share of the counted clips that are correct; None where none is counted."""
    return float(correct[counted].mean()) if counted.any() else None


def mean_class_accuracy(scores: Scores, labels: Labels) -> float | None:
    """Top-1 of each class that occurs, averaged over these classes; None where no clip has a label."""
    known = labels != UNKNOWN
    return mean_over_classes(correct_in_top(1, scores, labels)[known], labels[known]) if known.any() else None


def mean_over_classes(correct: npt.NDArray[np.bool_], labels: Labels) -> float:
    """Share of correct clips of each class that occurs, averaged over these classes; every clip has a label."""
    _, index = np.unique(labels, return_inverse=True)
    return float((np.bincount(index, weights=correct) / np.bincount(index)).mean())


def log_softmax(logits: Scores) -> npt.NDArray[np.float64]:
    """Logarithms of the probabilities along the last axis."""
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def softmax(logits: Scores) -> npt.NDArray[np.float64]:
    """Probabilities along the last axis."""
    shifted = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def action_in_top(
    k: int, verb_logits: Scores, noun_logits: Scores, verbs: Labels, nouns: Labels
) -> npt.NDArray[np.bool_]:
    """Whether the true (verb, noun) pair is among the best `k` [clip]; False where one of both is unknown.

    The score of a pair is the product of the two softmaxes. Its order is that of the sum of the two logits, which
    cannot underflow. All pairs count, and the id of a pair, which decides a tie, is verb * nouns + noun.
    """
    if k == 1:  # the best pair is the best verb with the best noun
        return correct_in_top(1, verb_logits, verbs) & correct_in_top(1, noun_logits, nouns)

    def sums(rows: npt.NDArray[np.intp]) -> Scores:
        verb, noun = verb_logits[rows].astype(np.float64), noun_logits[rows].astype(np.float64)
        return np.asarray(verb[:, :, None] + noun[:, None, :])

    num_pairs = verb_logits.shape[1] * noun_logits.shape[1]
    in_top = pair_ranks(sums, verbs, nouns, num_pairs=num_pairs) < k
    return np.asarray(in_top & (verbs != UNKNOWN) & (nouns != UNKNOWN))


def pair_ranks(
    scores: Callable[[npt.NDArray[np.intp]], Scores], verbs: Labels, nouns: Labels, *, num_pairs: int
) -> npt.NDArray[np.int64]:
    """How many pairs come before the true one [clip]; 0 for clips where one of both is unknown.

    `scores` gives those of some rows [row, verb, noun]; a few rows at a time, since they are large.
    """
    known = np.flatnonzero((verbs != UNKNOWN) & (nouns != UNKNOWN))
    found = np.zeros(len(verbs), np.int64)
    chunk = max(1, _CHUNK_NUMBERS // num_pairs)
    for rows in (known[start : start + chunk] for start in range(0, len(known), chunk)):
        pairs = scores(rows)
        found[rows] = ranks(
            pairs.reshape(len(rows), -1), verbs[rows].astype(np.int64) * pairs.shape[2] + nouns[rows]
        )
    return found
