"""Every expected number here was worked out by hand from the matrices shown."""

import math

import numpy as np
import pytest

from npser.metrics import (
    accuracy,
    average_f1,
    confusion_matrix,
    mean_over_classes,
    precision_recall_f1,
    summarise,
    unweighted_average_recall,
)

PERFECT = np.array([[2, 0], [0, 2]])  # P = R = F1 = (1, 1)
ONE_MISSED = np.array([[1, 1], [0, 2]])  # P = (1, 2/3), R = (1/2, 1), F1 = (2/3, 4/5)
NEVER_PREDICTED = np.array([[0, 2], [0, 2]])  # P = (0, 1/2), R = (0, 1), F1 = (0, 2/3)
FOUR_FOLDS = {(0, 0): PERFECT, (0, 1): ONE_MISSED, (1, 0): NEVER_PREDICTED, (1, 1): PERFECT}
LABELS = ("calm", "angry")


def test_confusion_matrix_counts_truth_in_rows():
    matrix = confusion_matrix([0, 0, 1, 2, 1], [0, 0, 0, 0, 1], 3)
    assert matrix.tolist() == [[2, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert matrix.dtype == np.int64


def test_confusion_matrix_of_nothing():
    assert confusion_matrix([], [], 2).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("truth", "predicted", "said"),
    [
        ([0, 1], [0], "2 entries"),
        ([0, 2], [0, 1], "truth runs from 0 to 2"),
        ([0, 1], [-1, 1], "predicted runs from -1 to 1"),
        ([0.0, 1.0], [0, 1], "integers"),
    ],
)
def test_confusion_matrix_refuses(truth, predicted, said):
    with pytest.raises(ValueError, match=said):
        confusion_matrix(truth, predicted, 2)


def test_scores_with_a_class_never_predicted():
    precision, recall, f1 = precision_recall_f1(np.array([[2, 0, 0], [1, 1, 0], [1, 0, 0]]))
    np.testing.assert_allclose(precision, [2 / 4, 1, 0])
    np.testing.assert_allclose(recall, [1, 1 / 2, 0])
    np.testing.assert_allclose(f1, [2 / 3, 2 / 3, 0])


def test_overall_figures():
    matrix = np.array([[2, 0, 0], [1, 1, 0], [1, 0, 0]])
    assert accuracy(matrix) == pytest.approx(3 / 5)
    assert unweighted_average_recall(matrix) == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert average_f1(matrix) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


@pytest.mark.filterwarnings("error")  # no warning about empty slices or divisions
def test_a_class_absent_from_the_fold_is_undefined_and_left_out():
    matrix = np.array([[1, 1], [0, 0]])  # the second class never occurs, yet was predicted once
    for scores, expected in zip(precision_recall_f1(matrix), (1, 1 / 2, 2 / 3), strict=True):
        assert scores[0] == pytest.approx(expected)
        assert math.isnan(scores[1])
    assert unweighted_average_recall(matrix) == pytest.approx(1 / 2)
    assert average_f1(matrix) == pytest.approx(2 / 3)
    assert accuracy(matrix) == pytest.approx(1 / 2)


@pytest.mark.filterwarnings("error")
def test_an_empty_matrix_has_no_figures():
    empty = np.zeros((2, 2), dtype=np.int64)
    assert math.isnan(accuracy(empty))
    assert math.isnan(unweighted_average_recall(empty))
    assert math.isnan(average_f1(empty))


def test_summary_means_are_means_of_folds():
    summary = summarise(FOUR_FOLDS, LABELS)
    np.testing.assert_allclose(summary.mean.precision, [3 / 4, 19 / 24])  # (1+1+0+1)/4, (1+2/3+1/2+1)/4
    np.testing.assert_allclose(summary.mean.recall, [5 / 8, 1])  # (1+1/2+0+1)/4
    np.testing.assert_allclose(summary.mean.f1, [2 / 3, 13 / 15])  # (1+2/3+0+1)/4, (1+4/5+2/3+1)/4
    # not the harmonic mean of the mean precision and recall, which is 15/22 for the first class
    assert summary.mean.f1[0] < 15 / 22
    assert summary.average_f1.mean == pytest.approx(23 / 30)  # (2/3 + 13/15) / 2
    assert mean_over_classes(summary.mean.f1) == pytest.approx(23 / 30)
    assert (summary.folds, summary.complete_repeats, summary.absences) == (4, 2, 0)


def test_summary_pools_the_matrices():
    summary = summarise(FOUR_FOLDS, LABELS)
    assert summary.matrix.tolist() == [[5, 3], [0, 8]]
    np.testing.assert_allclose(summary.pooled.precision, [1, 8 / 11])
    np.testing.assert_allclose(summary.pooled.recall, [5 / 8, 1])
    np.testing.assert_allclose(summary.pooled.f1, [10 / 13, 16 / 19])
    assert summary.average_f1.pooled == pytest.approx((10 / 13 + 16 / 19) / 2)
    assert summary.uar.pooled == pytest.approx((5 / 8 + 1) / 2)
    assert summary.accuracy.pooled == pytest.approx(13 / 16)


def test_summary_spreads():
    summary = summarise(FOUR_FOLDS, LABELS)
    # the repeats' average F1: (5/6 + 9/10)/2 = 13/15 and (1/2 + 5/6)/2 = 2/3; two values differ by sqrt(2) deviations
    assert summary.average_f1.over_repeats == pytest.approx((13 / 15 - 2 / 3) / math.sqrt(2))
    # the folds' average F1: 1, 11/15, 1/3, 1; their mean is 23/30, the deviations 7, -1, -13, 7 thirtieths
    assert summary.average_f1.over_folds == pytest.approx(math.sqrt((49 + 1 + 169 + 49) / 900 / 3))
    # accuracies 1, 3/4 | 1/2, 1: mean 13/16, repeats 7/8 and 3/4, deviations 3, -1, -5, 3 sixteenths; UAR is the same
    for figure in (summary.accuracy, summary.uar):
        assert figure.mean == pytest.approx(13 / 16)
        assert figure.over_repeats == pytest.approx((7 / 8 - 3 / 4) / math.sqrt(2))
        assert figure.over_folds == pytest.approx(math.sqrt((9 + 1 + 25 + 9) / 256 / 3))


def test_an_unfinished_repeat_enters_the_means_but_not_the_spread_over_repeats():
    whole = summarise(FOUR_FOLDS, LABELS, folds_per_repeat=2)
    more = summarise(FOUR_FOLDS | {(2, 0): NEVER_PREDICTED}, LABELS, folds_per_repeat=2)
    assert more.complete_repeats == 2
    assert more.average_f1.over_repeats == pytest.approx(whole.average_f1.over_repeats)
    assert more.accuracy.mean == pytest.approx((4 * 13 / 16 + 1 / 2) / 5)
    assert more.average_f1.over_folds != pytest.approx(whole.average_f1.over_folds)


@pytest.mark.filterwarnings("error")
def test_spreads_that_cannot_be_given_are_nan():
    one_fold = summarise({(0, 0): ONE_MISSED}, LABELS, folds_per_repeat=2)
    assert math.isnan(one_fold.average_f1.over_folds)
    assert math.isnan(one_fold.average_f1.over_repeats)
    assert one_fold.complete_repeats == 0
    one_repeat = summarise({(0, 0): ONE_MISSED, (0, 1): PERFECT}, LABELS)
    assert math.isnan(one_repeat.accuracy.over_repeats)
    assert one_repeat.accuracy.over_folds == pytest.approx((1 - 3 / 4) / math.sqrt(2))


@pytest.mark.filterwarnings("error")
def test_absent_classes_stay_out_of_the_means():
    only_first = np.array([[1, 1], [0, 0]])
    summary = summarise({(0, 0): only_first, (0, 1): PERFECT}, LABELS)
    np.testing.assert_allclose(summary.mean.recall, [3 / 4, 1])  # the second class: one fold only
    np.testing.assert_allclose(summary.mean.f1, [(2 / 3 + 1) / 2, 1])
    assert summary.absences == 1
    assert summary.uar.mean == pytest.approx((3 / 4 + 1) / 2)
    assert summary.pooled.precision[1] == pytest.approx(2 / 3)  # the false alarm counts here
    never = summarise({(0, 0): only_first}, LABELS)
    assert math.isnan(never.mean.f1[1])
    assert never.average_f1.mean == pytest.approx(2 / 3)


def test_summary_refuses():
    with pytest.raises(ValueError, match="no folds"):
        summarise({}, LABELS)
    with pytest.raises(ValueError, match="labels are 3"):
        summarise({(0, 0): PERFECT}, ["a", "b", "c"])
