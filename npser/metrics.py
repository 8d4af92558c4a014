"""From decisions to figures: confusion matrix, precision, recall, F1, and their summary over folds and repeats.

K classes. A confusion matrix is (K, K) int64, rows the true class, columns the predicted one. All figures are
fractions from 0 to 1; the report turns them into per cent. NaN means "undefined", and undefined values are left out of
every mean taken here.

The zero-division rule, stated once:
- A class with utterances in the test fold that was never predicted has precision 0, and F1 0.
- A class without utterances in the test fold has nothing to be found: precision, recall and F1 are undefined (NaN).
  This happens where a speaker, or a given split, is what is tested; stratified folds hold every class. False alarms
  into such a class are not forgiven: they lower the recall of the class they belong to, the accuracy, and the pooled
  precision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntMatrix = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ClassScores:
    """Precision, recall and F1 of each class, (K,) each, in label order."""

    precision: Floats
    recall: Floats
    f1: Floats


@dataclass(frozen=True)
class Figure:
    """One figure of the protocol: mean of the per-fold values, two spreads (NaN: cannot be given), pooled value."""

    mean: float
    over_repeats: float
    over_folds: float
    pooled: float


@dataclass(frozen=True, eq=False)
class ProtocolSummary:
    """What a cross-validated run amounts to; see `summarise`."""

    labels: tuple[str, ...]
    folds: int  # fold results summarised, all repeats together
    complete_repeats: int  # repeats with all of their folds; only these enter `over_repeats`
    absences: int  # (fold, class) pairs without an utterance, left out of the means
    mean: ClassScores  # unweighted means of the per-fold values: comparable to the paper's Tables
    pooled: ClassScores  # from `matrix`
    matrix: IntMatrix  # (K, K) sum over all folds and repeats
    average_f1: Figure
    uar: Figure
    accuracy: Figure


def confusion_matrix(truth: ArrayLike, predicted: ArrayLike, classes: int) -> IntMatrix:
    """Count the decisions: truth (N,) and predicted (N,), numbers in [0, classes) -> (classes, classes), rows truth.

    Raises ValueError when the lengths differ or a number is no class.
    """
    true_class = _class_numbers("truth", truth, classes)
    predicted_class = _class_numbers("predicted", predicted, classes)
    if len(true_class) != len(predicted_class):
        raise ValueError(f"truth has {len(true_class)} entries and predicted {len(predicted_class)}")
    cells = np.bincount(true_class * classes + predicted_class, minlength=classes * classes)
    return cells.reshape(classes, classes).astype(np.int64)


def precision_recall_f1(matrix: IntMatrix) -> tuple[Floats, Floats, Floats]:
    """Precision, recall and F1 of each class of a (K, K) confusion matrix -> three (K,).

    With the hits TP = M[k, k]: P = TP / column sum, R = TP / row sum, F1 = 2 P R / (P + R) = 2 TP / (column sum + row
    sum). Zero divisions: see the module's docstring.
    """
    hits = np.diagonal(matrix).astype(np.float64)
    predicted, occurring = matrix.sum(axis=0), matrix.sum(axis=1)
    precision = hits / np.maximum(predicted, 1)  # a class never predicted has no hits: 0 / 1
    recall = hits / np.maximum(occurring, 1)
    f1 = 2 * hits / np.maximum(predicted + occurring, 1)
    absent = occurring == 0
    for scores in (precision, recall, f1):
        scores[absent] = np.nan
    return precision, recall, f1


def accuracy(matrix: IntMatrix) -> float:
    """Share of right decisions (weighted accuracy); NaN for an empty matrix."""
    total = int(matrix.sum())
    return int(np.trace(matrix)) / total if total else float("nan")


def unweighted_average_recall(matrix: IntMatrix) -> float:
    """UAR: the mean of the recalls of the classes that occur; NaN for an empty matrix."""
    return float(_mean(precision_recall_f1(matrix)[1], axis=0))


def average_f1(matrix: IntMatrix) -> float:
    """The mean of the F1 of the classes that occur (macro-averaged F1); NaN for an empty matrix."""
    return float(_mean(precision_recall_f1(matrix)[2], axis=0))


def summarise(
    matrices: Mapping[tuple[int, int], IntMatrix], labels: Sequence[str], folds_per_repeat: int | None = None
) -> ProtocolSummary:
    """Summarise the (K, K) matrices of the folds done, keyed by (repeat, fold).

    The paper's table cells are means of per-fold figures, so `mean` holds, for each class, the unweighted mean of the
    per-fold precision, recall and F1 over all folds of all repeats. (The mean F1 of a class is therefore not the
    harmonic mean of its mean precision and mean recall.) The pooled figures come from the sum of all matrices.

    `average_f1` and `uar` are means over the classes of these per-class means; accuracy is the mean of the folds'.
    What the paper's +- means is not said, so two standard deviations are given, both with n - 1 in the denominator:
    over repeats, of the figure computed from each repeat's folds alone; over folds, of the figures of single folds.
    A repeat with fewer than `folds_per_repeat` folds (default: the most that any repeat has) is not finished and stays
    out of the spread over repeats, not out of the means.

    Raises ValueError without any fold, or when a matrix does not fit the labels.
    """
    if not matrices:
        raise ValueError("no folds to summarise")
    keys = sorted(matrices)
    classes = len(labels)
    for key in keys:
        if matrices[key].shape != (classes, classes):
            raise ValueError(f"the matrix of fold {key} is {matrices[key].shape}, the labels are {classes}")
    scores = np.array([precision_recall_f1(matrices[key]) for key in keys])  # (folds, 3, K)
    accuracies = np.array([accuracy(matrices[key]) for key in keys])[:, None]  # (folds, 1): like a single class
    repeat_of = np.array([repeat for repeat, _ in keys])
    repeats, sizes = np.unique(repeat_of, return_counts=True)
    complete = repeats[sizes >= (int(sizes.max()) if folds_per_repeat is None else folds_per_repeat)]

    def figure(values: Floats, pooled: float) -> Figure:
        """The figure of per-fold values (folds, K), with its spreads."""
        return Figure(
            mean=_mean_over_classes(values),
            over_repeats=_spread([_mean_over_classes(values[repeat_of == repeat]) for repeat in complete]),
            over_folds=_spread([_mean_over_classes(row[None]) for row in values]),
            pooled=pooled,
        )

    matrix = np.sum([matrices[key] for key in keys], axis=0)
    means = _mean(scores, axis=0)
    return ProtocolSummary(
        labels=tuple(labels),
        folds=len(keys),
        complete_repeats=len(complete),
        absences=int(np.isnan(scores[:, 1]).sum()),
        mean=ClassScores(*means),
        pooled=ClassScores(*precision_recall_f1(matrix)),
        matrix=matrix,
        average_f1=figure(scores[:, 2], average_f1(matrix)),
        uar=figure(scores[:, 1], unweighted_average_recall(matrix)),
        accuracy=figure(accuracies, accuracy(matrix)),
    )


def mean_over_classes(scores: Floats) -> float:
    """The mean of (K,) per-class scores, undefined ones left out: the average row of the paper's Tables."""
    return float(_mean(scores, axis=0))


def _class_numbers(name: str, numbers: ArrayLike, classes: int) -> NDArray[np.int64]:
    array = np.asarray(numbers)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a one-dimensional array of integers, not {array.dtype} {array.shape}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < classes:
        raise ValueError(f"{name} runs from {array.min()} to {array.max()}, the classes from 0 to {classes - 1}")
    return array.astype(np.int64)


def _mean(values: Floats, axis: int) -> Floats:
    """The mean along an axis of what is defined; NaN where nothing is (np.nanmean would warn there)."""
    defined = ~np.isnan(values)
    count = np.asarray(defined.sum(axis=axis))
    total = np.where(defined, values, 0.0).sum(axis=axis)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _mean_over_classes(values: Floats) -> float:
    """Per-fold values (folds, K) -> mean over the classes of each class's mean over the folds."""
    return mean_over_classes(_mean(values, axis=0))


def _spread(values: Sequence[float]) -> float:
    """Sample standard deviation (n - 1) of the defined values; NaN when there are fewer than two."""
    defined = [value for value in values if not np.isnan(value)]
    return float(np.std(defined, ddof=1)) if len(defined) > 1 else float("nan")
