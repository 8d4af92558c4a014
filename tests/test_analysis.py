"""Intervals, hard utterances and paired tests, against what can be worked out by hand or by brute force."""

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binomtest, t

from npser.analysis import (
    averaged,
    learning_curves,
    listeners,
    paired,
    paired_folds,
    speaker_matrices,
    uar_interval,
    utterance_record,
)
from npser.errors import UserError
from npser.foldresult import EpochResult, fold_result
from npser.metrics import average_f1

LABELS = ("calm", "joy")


def fold(decisions, repeat=0, number=0, epochs=()):
    """decisions: file -> (speaker, truth, decision, probability of joy)."""
    return fold_result(
        repeat=repeat,
        fold=number,
        labels=LABELS,
        vote="sum",
        epochs=epochs,
        files=list(decisions),
        speakers=[d[0] for d in decisions.values()],
        truth=[d[1] for d in decisions.values()],
        probabilities=[(1 - d[3], d[3]) for d in decisions.values()],
        majority=[d[2] for d in decisions.values()],
        run={},
    )


def random_fold(right, seed=0, speakers="abcdefgh", repeat=0):
    """40 utterances, each right with the probability of its speaker."""
    rng = np.random.default_rng(seed)
    decisions = {}
    for n in range(40):
        speaker, truth = speakers[n % len(speakers)], n // 8 % 2
        k = truth if rng.random() < right[speaker] else 1 - truth
        decisions[f"{n}.wav"] = (speaker, truth, k, 0.9 if k else 0.1)
    return fold(decisions, repeat)


EVEN = dict.fromkeys("abcdefgh", 0.6)
UNEVEN = {s: 0.95 if s in "abcd" else 0.25 for s in "abcdefgh"}


def test_matrices_of_speakers_add_up_to_the_folds():
    folds = [random_fold(EVEN, 0), random_fold(EVEN, 1, repeat=1)]
    matrices = speaker_matrices(folds, "sum")
    assert list(matrices) == list("abcdefgh")
    np.testing.assert_array_equal(sum(matrices.values()), folds[0].matrix("sum") + folds[1].matrix("sum"))
    assert all(matrix.sum() == 10 for matrix in matrices.values())


def test_interval_is_the_bootstrap_over_speakers():
    matrices = speaker_matrices([random_fold(UNEVEN)], "sum")
    interval = uar_interval(matrices)
    rng = np.random.default_rng(99)  # another generator, the plain loop
    stacked, uars = np.array(list(matrices.values())), []
    for _ in range(4000):
        matrix = stacked[rng.integers(0, 8, 8)].sum(axis=0)
        uars.append(np.mean([matrix[k, k] / matrix[k].sum() for k in (0, 1)]))
    low, high = np.percentile(uars, (2.5, 97.5))
    assert interval.low == pytest.approx(low, abs=0.02)
    assert interval.high == pytest.approx(high, abs=0.02)
    assert interval.low < interval.value < interval.high
    assert interval.speakers == 8


def test_speakers_who_differ_widen_the_interval():
    alike, unlike = (uar_interval(speaker_matrices([random_fold(r, 3)], "sum")) for r in (EVEN, UNEVEN))
    assert unlike.high - unlike.low > 1.3 * (alike.high - alike.low)


# file -> (speaker, truth, majority's decision, probability of joy): two repeats of two folds, and one that is not whole
REPEATS = [
    [{"a": ("s", 1, 1, 0.9), "b": ("s", 0, 0, 0.4)}, {"c": ("t", 1, 0, 0.3), "d": ("t", 0, 1, 0.6)}],
    [{"d": ("t", 0, 0, 0.3), "b": ("s", 0, 1, 0.8)}, {"a": ("s", 1, 0, 0.2), "c": ("t", 1, 0, 0.6)}],
    [{"a": ("s", 1, 0, 0.0), "c": ("t", 1, 1, 1.0)}],
]


def test_repeats_are_averaged_over_the_networks_of_an_utterance():
    results = [fold(part, r, n) for r, parts in enumerate(REPEATS) for n, part in enumerate(parts)]
    together, networks = averaged(results, 2)
    assert networks == 2
    assert [(r.repeat, r.fold, [u.file for u in r.utterances]) for r in together] == [
        (0, 0, ["a", "b"]), (0, 1, ["c", "d"])
    ]  # fmt: skip
    said = {u.file: u for r in together for u in r.utterances}
    for file, joy in {"a": 0.55, "b": 0.6, "c": 0.45, "d": 0.45}.items():
        np.testing.assert_allclose(said[file].probabilities, (1 - joy, joy))
    assert {file: u.prediction for file, u in said.items()} == {"a": "joy", "b": "joy", "c": "calm", "d": "calm"}
    # one ballot each: the larger mean decides
    assert {file: u.majority for file, u in said.items()} == {"a": "joy", "b": "joy", "c": "calm", "d": "calm"}


def test_a_majority_of_networks_outvotes_the_probabilities():
    votes = [(0, 0.45), (0, 0.45), (1, 0.99)]
    results = [fold({"a": ("s", 0, majority, joy)}, r) for r, (majority, joy) in enumerate(votes)]
    [[together], networks] = averaged(results)
    assert (networks, together.utterances[0].prediction, together.utterances[0].majority) == (3, "joy", "calm")


def test_a_fold_without_utterances_is_averaged_too():
    results = [fold({"a": ("s", 0, 0, 0.1)}, r, n) for r in (0, 1) for n in (0, 1)]
    nothing = {vote: [[0, 0], [0, 0]] for vote in ("sum", "majority")}
    results[::2] = [replace(result, utterances=(), confusion=nothing) for result in results[::2]]
    together, _ = averaged(results)
    assert [len(r.utterances) for r in together] == [0, 1]


def test_nothing_is_averaged_without_two_whole_repeats():
    first, second, third = ([fold(part, r, n) for n, part in enumerate(parts)] for r, parts in enumerate(REPEATS))
    assert averaged([*first, *third], 2) is None
    assert averaged([*first, *second[:1]], 2) is None
    elsewhere = [fold({"e": ("s", 0, 0, 0.1)}, 1, 0), second[1]]
    assert averaged([*first, *elsewhere], 2) is None  # other utterances: no repeat of the same experiment


def test_no_interval_without_speakers():
    assert uar_interval(speaker_matrices([random_fold({"": 0.6}, speakers=[""])], "sum")) is None
    assert uar_interval(speaker_matrices([random_fold({"a": 0.6}, speakers="a")], "sum")) is None


def test_hard_utterances_first():
    one = fold({"a": ("x", 0, 1, 0.9), "b": ("x", 0, 1, 0.6), "c": ("x", 1, 1, 0.8), "d": ("x", 1, 0, 0.3)})
    two = fold({"a": ("x", 0, 1, 0.7), "b": ("x", 0, 1, 0.8), "c": ("x", 1, 1, 0.9), "d": ("x", 1, 1, 0.9)}, repeat=1)
    record = utterance_record([one, two], "sum")
    assert [(h.file, h.wrong, h.tested, h.taken_for) for h in record] == [
        ("a", 2, 2, "joy"),
        ("b", 2, 2, "joy"),
        ("d", 1, 2, "calm"),
        ("c", 0, 2, ""),
    ]
    assert record[0].probability == pytest.approx(0.2)
    assert record[2].probability == pytest.approx(0.6)


def test_listeners(tmp_path):
    file = tmp_path / "erkennung.txt"
    file.write_bytes("Nr.\tSatz\terkannt\tnatürlich\n1\xa0 \t03a01Fa.wav\t90,00\xa0 \t75,00\n".encode("latin-1"))
    assert listeners(file) == {"03a01Fa.wav": 0.9}
    for content in (b"", b"a\nb\tc\td\n", b"only\na\n"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"erkennung\.txt"):
            listeners(file)
    with pytest.raises(UserError):
        listeners(tmp_path / "absent.txt")


def test_learning_curves():
    def epochs(*losses):
        return [EpochResult(n, loss, 0.5, 1.0) for n, loss in enumerate(losses, 1)]

    base = {"a": ("x", 0, 1, 0.9)}
    curves = learning_curves([fold(base, epochs=epochs(2.0, 1.0)), fold(base, 1, epochs=epochs(4.0))])
    assert [(n, losses.tolist()) for n, losses, _ in curves] == [(1, [2.0, 4.0]), (2, [1.0])]


def test_paired_difference_and_its_p_values_by_brute_force():
    a = [random_fold(UNEVEN, 1), random_fold(UNEVEN, 2, repeat=1), random_fold(UNEVEN, 3, repeat=2)]
    b = [random_fold(EVEN, 5, repeat=2), random_fold(EVEN, 6)]
    result = paired(a, b, "sum", "sum")
    accuracy = {}
    for name, folds in (("a", a), ("b", b)):
        for f in folds:
            for u in f.utterances:
                if f.repeat != 1:  # which b does not have
                    accuracy.setdefault((u.file, u.speaker, u.truth), {}).setdefault(name, []).append(
                        u.prediction == u.truth
                    )
    d = {key: np.mean(v["a"]) - np.mean(v["b"]) for key, v in accuracy.items()}
    classes = {truth: [x for (_, _, t), x in d.items() if t == truth] for truth in LABELS}
    assert result.difference == pytest.approx(np.mean([np.mean(x) for x in classes.values()]))
    contributions = {s: sum(x / len(classes[t]) / 2 for (_, v, t), x in d.items() if v == s) for s in "abcdefgh"}
    assert sum(contributions.values()) == pytest.approx(result.difference)
    sums = [np.dot(list(contributions.values()), signs) for signs in itertools.product((1, -1), repeat=8)]
    assert result.p_speakers == pytest.approx(np.mean(np.abs(sums) >= abs(result.difference) - 1e-12))
    better, worse = sum(x > 0 for x in d.values()), sum(x < 0 for x in d.values())
    assert (result.a_better, result.b_better, result.utterances) == (better, worse, 40)
    assert result.p_utterances == pytest.approx(binomtest(better, better + worse).pvalue)
    assert result.low < result.difference < result.high


def test_the_test_holds_its_level_and_finds_what_is_there():
    same = [paired([random_fold(EVEN, s)], [random_fold(EVEN, 1000 + s)], "sum", "sum") for s in range(60)]
    assert 0 < sum(r.p_speakers < 0.2 for r in same) < 24
    good = dict.fromkeys("abcdefgh", 0.95)
    assert paired([random_fold(good)], [random_fold(EVEN)], "sum", "sum").p_speakers < 0.05


def test_more_repeats_are_no_advantage():
    """Of two networks of one kind, neither is better more often, however many repeats one of them has."""
    pairs = [
        paired(
            [random_fold(EVEN, s)], [random_fold(EVEN, 1000 + 100 * n + s, repeat=n) for n in range(5)], "sum", "sum"
        )
        for s in range(60)
    ]
    assert sum(r.a_better for r in pairs) == pytest.approx(sum(r.b_better for r in pairs), rel=0.1)
    assert 0 < sum(r.p_utterances < 0.2 for r in pairs) < 16


def test_a_run_against_itself():
    result = paired([random_fold(EVEN)], [random_fold(EVEN)], "sum", "sum")
    assert (result.difference, result.p_speakers, result.p_utterances) == (0, 1, 1)
    assert (result.low, result.high) == (0, 0)


def test_a_difference_of_nothing_has_a_p_of_one():
    """Shares that sum to 0 by pencil, and to something like 1e-17 in floating point."""
    rounded = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        runs, exact = ({}, {}), Fraction(0)
        for truth, size in enumerate(rng.integers(2, 12, 2).tolist()):
            for n in range(size):
                decisions = rng.integers(0, 2, 2).tolist()
                exact += Fraction((decisions[0] == truth) - (decisions[1] == truth), 2 * size)
                for run, k in zip(runs, decisions, strict=True):
                    run[f"{truth}{n}.wav"] = ("abcdef"[n % 6], truth, k, 0.9 if k else 0.1)
        result = paired([fold(runs[0])], [fold(runs[1])], "sum", "sum")
        if exact == 0:
            assert result.p_speakers == 1
            rounded += result.difference != 0
    assert rounded


def test_unknown_speakers_and_other_utterances():
    a, b = (random_fold({"": r}, s, speakers=[""]) for s, r in ((0, 0.9), (1, 0.4)))
    result = paired([a], [b], "sum", "sum")
    assert np.isnan([result.low, result.high, result.p_speakers]).all()
    assert result.p_utterances < 0.01
    other = fold({"elsewhere.wav": ("x", 0, 0, 0.1)})
    assert paired([a], [other], "sum", "sum") is None


def test_more_speakers_than_can_be_enumerated():
    many = [f"s{n:02d}" for n in range(20)]
    a, b = (random_fold(dict.fromkeys(many, r), s, many) for s, r in ((0, 0.95), (1, 0.4)))
    assert paired([a], [b], "sum", "sum").p_speakers < 0.05


def test_folds_are_paired_with_the_corrected_t_test():
    def run(rights):
        """Folds of ten utterances, the first so many of them right."""
        folds = []
        for number, right in enumerate(rights):
            decisions = {
                f"{number}-{n}.wav": (
                    "s",
                    n % 2,
                    n % 2 if n < right else 1 - n % 2,
                    0.9 if (n % 2) == (n < right) else 0.1,
                )
                for n in range(10)
            }
            folds.append(fold(decisions, number=number))
        return folds

    a, b = run([10, 8, 10, 8]), run([8, 8, 8, 6])
    d = np.array([average_f1(x.matrix("sum")) - average_f1(y.matrix("sum")) for x, y in zip(a, b, strict=True)])
    mean, p, folds = paired_folds(a, b, "sum", "sum", 40)
    assert folds == 4
    np.testing.assert_allclose(mean, d.mean())
    # 4 folds of 10: training sets of 30, so a variance of (1/4 + 1/3) var(d)
    statistic = d.mean() / np.sqrt((1 / 4 + 1 / 3) * d.var(ddof=1))
    np.testing.assert_allclose(p, 2 * (1 - t.cdf(statistic, 3)), rtol=1e-9)
    np.testing.assert_allclose(paired_folds(b, a, "sum", "sum", 40)[:2], (-mean, p))
    assert paired_folds(a, a, "sum", "sum", 40)[:2] == (0.0, 1.0)
    assert paired_folds(a, b[:1], "sum", "sum", 40) is None
    assert paired_folds(a, [fold({"x.wav": ("s", 0, 0, 0.1)}), *b[1:]], "sum", "sum", 40) is None
    # half of the folds: each still trained on the 30 others, whichever run comes first
    mean, p, folds = paired_folds(a[:2], b, "sum", "sum", 40)
    statistic = d[:2].mean() / np.sqrt((1 / 2 + 1 / 3) * d[:2].var(ddof=1))
    np.testing.assert_allclose((mean, p, folds), (d[:2].mean(), 2 * t.sf(statistic, 1), 2), rtol=1e-9)
    np.testing.assert_allclose(paired_folds(b, a[:2], "sum", "sum", 40), (-mean, p, 2))

    again = [replace(r, repeat=1) for r in a], [replace(r, repeat=1) for r in b]  # as --cv speaker repeats its folds
    assert paired_folds([*a, *again[0]], [*b, *again[1]], "sum", "sum", 40) == paired_folds(a, b, "sum", "sum", 40)
    assert paired_folds([a[0], again[0][0]], [b[0], again[1][0]], "sum", "sum", 40) is None  # as --cv split does
