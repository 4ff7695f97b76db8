"""Accuracies, in plain NumPy. Ties are broken by class id: the lower one wins."""

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
    correct = correct_in_top(1, scores, labels)
    classes = np.unique(labels[labels != UNKNOWN])
    if not len(classes):
        return None
    return float(np.mean([correct[labels == label].mean() for label in classes]))


def softmax(logits: Scores) -> npt.NDArray[np.float64]:
    """Probabilities along the last axis."""
    shifted = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def action_in_top(
    k: int, verb_logits: Scores, noun_logits: Scores, verbs: Labels, nouns: Labels
) -> npt.NDArray[np.bool_]:
    """Whether the true (verb, noun) pair is among the best `k` [clip]; False where one of both is unknown.

    The score of a pair is the product of the two softmaxes; all pairs count, and their id is noun * verbs + verb.
    The best pair is the best verb with the best noun.
    """
    if k == 1:
        return correct_in_top(1, verb_logits, verbs) & correct_in_top(1, noun_logits, nouns)
    known = np.flatnonzero((verbs != UNKNOWN) & (nouns != UNKNOWN))
    num_verbs, num_nouns = verb_logits.shape[1], noun_logits.shape[1]
    correct = np.zeros(len(verbs), dtype=bool)
    chunk = max(1, _CHUNK_NUMBERS // (num_verbs * num_nouns))
    for rows in (known[start : start + chunk] for start in range(0, len(known), chunk)):
        verb, noun = softmax(verb_logits[rows]), softmax(noun_logits[rows])
        pairs = (noun[:, :, None] * verb[:, None, :]).reshape(len(rows), -1)
        labels = nouns[rows].astype(np.int64) * num_verbs + verbs[rows]
        correct[rows] = ranks(pairs, labels) < k
    return correct
