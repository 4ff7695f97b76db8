import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vivit.stage2_temporal import metrics
from vivit.stage2_temporal.metrics import action_in_top, correct_in_top, mean_class_accuracy, softmax, top_k

SCORES = np.array([[0.1, 0.9, 0.5], [0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.5, 0.4, 0.1]])


def test_top_k_counts_labels_among_the_best_k() -> None:
    labels = np.array([2, 0, 1, 0])
    assert top_k(1, SCORES, labels) == 0.5
    assert top_k(2, SCORES, labels) == 0.75  # clip 2: classes 0 and 1 tie behind 2, and 0 wins
    assert top_k(3, SCORES, labels) == 1.0


def test_the_lower_class_wins_a_tie() -> None:
    scores = np.zeros((4, 4))
    assert correct_in_top(1, scores, np.arange(4)).tolist() == [True, False, False, False]
    assert correct_in_top(3, scores, np.arange(4)).tolist() == [True, True, True, False]


def test_clips_without_a_label_do_not_count() -> None:
    labels = np.array([-1, 0, -1, 1])
    assert top_k(1, SCORES, labels) == 0.5
    assert top_k(1, SCORES, np.full(4, -1)) is None
    assert mean_class_accuracy(SCORES, np.full(4, -1)) is None


def test_mean_class_accuracy_weighs_classes_not_clips() -> None:
    labels = np.array([0, 0, 0, 1])
    scores = np.eye(3)[[0, 0, 1, 1]]
    assert mean_class_accuracy(scores, labels) == pytest.approx((2 / 3 + 1) / 2)


def test_an_action_is_right_when_verb_and_noun_are() -> None:
    verb, noun = np.eye(2)[[0, 0, 1]], np.eye(3)[[2, 1, 0]]
    correct = action_in_top(1, verb, noun, np.array([0, 0, 0]), np.array([2, 0, 0]))
    assert correct.tolist() == [True, False, False]


def test_the_best_five_actions_are_the_largest_products() -> None:
    # Softmaxes: verb (0.6, 0.3, 0.1), noun (0.5, 0.3, 0.2); products in order:
    # (0,0) .30  (0,1) .18  (1,0) .15  (0,2) .12  (1,1) .09  (1,2) .06  (2,0) .05  ...
    verb, noun = np.log([[0.6, 0.3, 0.1]]), np.log([[0.5, 0.3, 0.2]])
    in_top = {
        (v, n): bool(action_in_top(5, verb, noun, np.array([v]), np.array([n]))[0])
        for v in range(3)
        for n in range(3)
    }
    assert {pair for pair, inside in in_top.items() if inside} == {(0, 0), (0, 1), (1, 0), (0, 2), (1, 1)}


def test_actions_without_verb_or_noun_do_not_count() -> None:
    verb, noun = np.eye(2)[[0, 0]], np.eye(2)[[0, 0]]
    for k in (1, 5):
        assert action_in_top(k, verb, noun, np.array([-1, 0]), np.array([0, -1])).tolist() == [False, False]


scores = hnp.arrays(np.float32, (6, 7), elements=st.integers(-8, 8).map(float))
labels = hnp.arrays(np.int32, 6, elements=st.integers(-1, 6))


@given(scores=scores, labels=labels)
def test_top_k_grows_with_k_and_ends_at_one(
    scores: npt.NDArray[np.float32], labels: npt.NDArray[np.int32]
) -> None:
    found = [correct_in_top(k, scores, labels) for k in range(1, 8)]
    assert all((after >= before).all() for before, after in itertools.pairwise(found))
    assert (found[-1] == (labels >= 0)).all()


@given(scores=scores, labels=labels)
def test_top_1_is_the_arg_max(scores: npt.NDArray[np.float32], labels: npt.NDArray[np.int32]) -> None:
    assert (correct_in_top(1, scores, labels) == (scores.argmax(axis=1) == labels)).all()


@given(verb=scores, noun=scores, verbs=labels, nouns=labels)
def test_action_top_5_contains_top_1_in_chunks_of_any_size(
    verb: npt.NDArray[np.float32],
    noun: npt.NDArray[np.float32],
    verbs: npt.NDArray[np.int32],
    nouns: npt.NDArray[np.int32],
) -> None:
    whole = action_in_top(5, verb, noun, verbs, nouns)
    assert (whole >= action_in_top(1, verb, noun, verbs, nouns)).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_CHUNK_NUMBERS", 1)
        assert (action_in_top(5, verb, noun, verbs, nouns) == whole).all()


def test_scores_that_are_not_numbers_are_never_right() -> None:
    scores = np.array([[np.nan, 0.0], [np.nan, np.nan], [0.0, np.nan]])
    assert correct_in_top(1, scores, np.array([0, 1, 0])).tolist() == [False, False, False]
    assert correct_in_top(2, scores, np.array([0, 1, 0])).tolist() == [False, False, True]


def test_softmax_does_not_overflow() -> None:
    assert softmax(np.array([[1e4, 0.0, 1e4]])).tolist() == [[0.5, 0.0, 0.5]]
