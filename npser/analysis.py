"""What the decisions of a run allow to be said: intervals over speakers, hard utterances, and one run against another.

Utterances of one speaker resemble each other, and so do the decisions on one utterance in several repeats: whoever
resamples single decisions finds intervals that are too narrow. So speakers are what is resampled here, and what changes
sign in the paired test.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from npser.errors import UserError
from npser.foldresult import FoldResult, UtteranceResult, fold_result
from npser.metrics import average_f1

RESAMPLES = 10_000
_EXACT = 16  # up to so many speakers all 2^n sign flips are tried
_CONFIDENCE = (2.5, 97.5)  # percentiles

Floats = NDArray[np.float64]


# --- one run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A figure of pooled decisions and its 95 % interval."""

    value: float
    low: float
    high: float
    speakers: int


def speaker_matrices(results: Sequence[FoldResult], vote: str) -> dict[str, NDArray[np.int64]]:
    """The confusion matrix (K, K) of each speaker's utterances, all folds and repeats together."""
    labels = results[0].labels
    number = {label: k for k, label in enumerate(labels)}
    matrices: dict[str, NDArray[np.int64]] = {}
    for result in results:
        for u in result.utterances:
            matrix = matrices.setdefault(u.speaker, np.zeros((len(labels), len(labels)), np.int64))
            matrix[number[u.truth], number[u.by_vote(vote, labels)]] += 1
    return dict(sorted(matrices.items()))


def uar_interval(matrices: Mapping[str, NDArray[np.int64]], resamples: int = RESAMPLES) -> Interval | None:
    """The pooled UAR and its bootstrap interval over speakers; None with fewer than two known speakers.

    As many speakers as there are, drawn with replacement, `resamples` times: the interval holds the middle 95 % of the
    UARs of their summed matrices (percentile method; Efron and Tibshirani 1993).
    """
    if len(matrices) < 2 or "" in matrices:
        return None
    stacked = np.array(list(matrices.values()), dtype=np.float64)  # (S, K, K)
    S, K, _ = stacked.shape
    resampled = (_draws(S, resamples) @ stacked.reshape(S, K * K)).reshape(resamples, K, K)
    low, high = np.percentile(_uars(resampled), _CONFIDENCE)
    return Interval(float(_uars(stacked.sum(axis=0, keepdims=True))[0]), float(low), float(high), S)


def _draws(speakers: int, resamples: int) -> Floats:
    """How often each speaker is drawn in each resample, (resamples, speakers); the same in every call."""
    rng = np.random.default_rng(0)
    return rng.multinomial(speakers, np.full(speakers, 1 / speakers), size=resamples).astype(np.float64)


def _uars(matrix: Floats) -> Floats:
    """(N, K, K) -> (N,) UAR of each matrix; classes that do not occur are left out."""
    occurring = matrix.sum(axis=2)
    recall = np.diagonal(matrix, axis1=1, axis2=2) / np.maximum(occurring, 1)
    means: Floats = recall.sum(axis=1) / np.maximum((occurring > 0).sum(axis=1), 1)
    return means


@dataclass(frozen=True)
class Hard:
    """An utterance and how often it was taken for something else."""

    file: str
    truth: str
    wrong: int
    tested: int
    taken_for: str  # the most frequent wrong decision
    probability: float  # of the truth, mean over the repeats


def utterance_record(results: Sequence[FoldResult], vote: str) -> list[Hard]:
    """Every utterance, the most often confused ones first; of equals those whose truth was thought less probable."""
    labels = results[0].labels
    decisions: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for result in results:
        for u in result.utterances:
            p = u.probabilities[labels.index(u.truth)]
            decisions.setdefault((u.file, u.truth), []).append((u.by_vote(vote, labels), p))
    record = []
    for (file, truth), made in decisions.items():
        wrong = Counter(label for label, _ in made if label != truth)
        taken_for = max(wrong, key=lambda label: (wrong[label], -labels.index(label))) if wrong else ""
        mean = sum(p for _, p in made) / len(made)
        record.append(Hard(file, truth, wrong.total(), len(made), taken_for, mean))
    return sorted(record, key=lambda h: (-h.wrong / h.tested, -h.wrong, h.probability, h.file))


def listeners(file: Path) -> dict[str, float]:
    """EMO-DB's erkennung.txt: file name -> the share of human listeners who recognised its emotion, 0 to 1.

    Columns number, file, recognised, natural; German decimal commas, padded with no-break spaces. UserError where it is
    another file.
    """
    rates: dict[str, float] = {}
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise OSError("not a file")
        for line in file.read_text(encoding="latin-1").splitlines()[1:]:
            cells = [cell.strip() for cell in line.split("\t")]
            if len(cells) >= 3 and cells[1]:
                rates[cells[1]] = float(cells[2].replace(",", ".")) / 100
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as EMO-DB's erkennung.txt ({error})") from error
    if not rates:
        raise UserError(f"{file}: names no recording: EMO-DB's erkennung.txt is wanted")
    return rates


def learning_curves(results: Sequence[FoldResult]) -> list[tuple[int, Floats, Floats]]:
    """For each epoch: its number, and the losses and training accuracies of all folds that have it."""
    epochs: dict[int, list[tuple[float, float]]] = {}
    for result in results:
        for epoch in result.epochs:
            epochs.setdefault(epoch.epoch, []).append((epoch.loss, epoch.accuracy))
    return [(n, *np.array(values, dtype=np.float64).T) for n, values in sorted(epochs.items())]


def whole_repeats(results: Sequence[FoldResult], folds: int | None = None) -> list[int]:
    """The repeats that are done. folds: of a whole repeat (default: the most that any has)."""
    sizes = Counter(result.repeat for result in results)
    return sorted(repeat for repeat, n in sizes.items() if n >= (folds or max(sizes.values())))


def averaged(results: Sequence[FoldResult], folds: int | None = None) -> tuple[list[FoldResult], int] | None:
    """All whole repeats as one: its folds are those of the first, and how many networks decide on an utterance.

    An utterance has one network in each repeat that had it in its test fold, so none of them was trained on it. By sum,
    the mean of their probabilities decides; by majority, the majority of their own decisions, of equals the one with
    the larger mean. folds: see `whole_repeats`, of which there must be two: None otherwise.
    """
    whole = whole_repeats(results, folds)
    made: dict[tuple[str, str], list[UtteranceResult]] = {}
    for result in results:
        for u in result.utterances if result.repeat in whole else ():
            made.setdefault((u.file, u.truth), []).append(u)
    if len(whole) < 2 or any(len(of) != len(whole) for of in made.values()):
        return None
    together = []
    for result in (r for r in results if r.repeat == whole[0]):
        labels, of = result.labels, [made[u.file, u.truth] for u in result.utterances]
        p = np.array([np.mean([u.probabilities for u in networks], axis=0) for networks in of])
        ballots = np.array([[sum(u.majority == label for u in networks) for label in labels] for networks in of])
        p, ballots = p.reshape(-1, len(labels)), ballots.reshape(-1, len(labels))  # of a fold without utterances, too
        together.append(
            fold_result(
                repeat=result.repeat,
                fold=result.fold,
                labels=labels,
                vote=result.vote,
                epochs=(),
                files=[u.file for u in result.utterances],
                speakers=[u.speaker for u in result.utterances],
                truth=[labels.index(u.truth) for u in result.utterances],
                probabilities=p,
                majority=(ballots + p / 2).argmax(axis=1),  # p decides between equal counts
                run={},
            )
        )
    return together, len(whole)


# --- two runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """Run A against run B, on the utterances that both tested."""

    utterances: int
    difference: float  # UAR of A - UAR of B
    low: float  # its 95 % interval, bootstrap over speakers; NaN where the speakers are unknown
    high: float
    p_speakers: float  # sign flips of whole speakers; NaN where they are unknown
    a_better: int  # utterances that A got right more often than B
    b_better: int
    p_utterances: float  # exact sign test on these two counts: with one repeat, McNemar's test


def paired(a: Sequence[FoldResult], b: Sequence[FoldResult], vote_a: str, vote_b: str) -> Paired | None:
    """Compare two runs over the same utterances in the same repeats; None when they have none in common.

    An utterance's accuracy is the share of right decisions over the repeats that both runs have of it: shares of one
    decision and of two are no pair. With w_u = 1 / (K n_k) for each of the n_k utterances of class k, the difference of
    the UARs is the sum over the utterances of w_u (accuracy in A - in B).
    """
    from scipy.stats import binomtest

    right_a, right_b = _decisions(a, vote_a), _decisions(b, vote_b)
    differences: dict[Key, list[int]] = {}
    for key, repeat in sorted(set(right_a) & set(right_b)):
        differences.setdefault(key, []).append(right_a[key, repeat] - right_b[key, repeat])
    if not differences:
        return None
    common = list(differences)
    per_class = Counter(truth for _, truth, _ in common)
    d = np.array([np.mean(difference) for difference in differences.values()])
    w = np.array([1 / (len(per_class) * per_class[truth]) for _, truth, _ in common])
    names = sorted({speaker for _, _, speaker in common})
    of = np.array([names.index(speaker) for _, _, speaker in common])
    difference = float((w * d).sum())
    low = high = p_speakers = float("nan")
    if len(names) > 1 and "" not in names:
        by_speaker = np.bincount(of, weights=w * d)
        sums = _signs(len(names)) @ by_speaker
        extreme = np.abs(sums) >= abs(difference) - 1e-12  # sums that are equal round differently
        p_speakers = float(extreme.mean())
        low, high = _difference_interval(common, d, of)
    a_better, b_better = int((d > 0).sum()), int((d < 0).sum())
    p_utterances = binomtest(a_better, a_better + b_better).pvalue if a_better + b_better else 1.0
    return Paired(len(common), difference, low, high, p_speakers, a_better, b_better, float(p_utterances))


def paired_folds(
    a: Sequence[FoldResult], b: Sequence[FoldResult], vote_a: str, vote_b: str, corpus: int
) -> tuple[float, float, int] | None:
    """The mean difference of the folds' average F1, its p value, and how many folds both runs have in common.

    Folds of the same number must have tested the same utterances, and there must be two of them: None otherwise. The
    folds' differences d are not independent, because their training sets overlap. So their variance is enlarged (the
    corrected resampled t test; Nadeau and Bengio 2003):

        t = mean(d) / sqrt((1/J + n_test/n_train) var(d))        J folds, Student's t with J - 1 degrees of freedom

    Folds of several repeats that tested the same utterances, as those of one speaker do, trained on the same ones, too:
    they are one fold, with their mean difference.

    corpus: how many utterances there are; those that a fold does not test, it trains on.
    """
    from scipy.stats import t

    theirs = {(r.repeat, r.fold): r for r in b}
    common = [(r, theirs[r.repeat, r.fold]) for r in a if (r.repeat, r.fold) in theirs]
    if len(common) < 2 or any({u.file for u in x.utterances} != {u.file for u in y.utterances} for x, y in common):
        return None
    differences: dict[frozenset[str], list[float]] = {}
    for x, y in common:
        tested_by_both = frozenset(u.file for u in x.utterances)
        differences.setdefault(tested_by_both, []).append(average_f1(x.matrix(vote_a)) - average_f1(y.matrix(vote_b)))
    if len(differences) < 2:
        return None
    d = np.array([np.mean(values) for values in differences.values()])
    tested = float(np.mean([len(files) for files in differences]))
    variance = (1 / len(d) + tested / max(corpus - tested, 1)) * float(d.var(ddof=1))
    if variance == 0:
        return float(d.mean()), float(d.mean() == 0), len(d)
    return float(d.mean()), float(2 * t.sf(abs(d.mean()) / np.sqrt(variance), len(d) - 1)), len(d)


Key = tuple[str, str, str]  # file, truth, speaker


def _decisions(results: Sequence[FoldResult], vote: str) -> dict[tuple[Key, int], bool]:
    """Whether each utterance was recognised in each repeat."""
    return {
        ((u.file, u.truth, u.speaker), result.repeat): u.by_vote(vote, result.labels) == u.truth
        for result in results
        for u in result.utterances
    }


def _signs(n: int) -> Floats:
    """Sign flips of n things: all 2^n where that is few, else the given signs and random ones."""
    if n <= _EXACT:
        return np.where((np.arange(2**n)[:, None] >> np.arange(n)) & 1, -1.0, 1.0)
    random = np.random.default_rng(0).integers(0, 2, size=(RESAMPLES - 1, n))
    return np.concatenate([np.ones((1, n)), np.where(random, -1.0, 1.0)])


def _difference_interval(common: Sequence[Key], d: Floats, of: NDArray[np.int64]) -> tuple[float, float]:
    """Bootstrap over speakers of the difference of the UARs: class sizes are counted anew in every resample."""
    classes = sorted({truth for _, truth, _ in common})
    k = np.array([classes.index(truth) for _, truth, _ in common])
    shape = (int(of.max()) + 1, len(classes))
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (of, k), d)
    np.add.at(counts, (of, k), 1)
    draws = _draws(shape[0], RESAMPLES)
    n = draws @ counts  # (resamples, K)
    means = np.where(n > 0, draws @ sums / np.maximum(n, 1), np.nan)
    low, high = np.percentile(np.nanmean(means, axis=1), _CONFIDENCE)
    return float(low), float(high)
