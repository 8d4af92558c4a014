import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npser.errors import UserError
from npser.folds import development_split, random_oversampling, speaker_folds, split_test, stratified_folds

# The corpus of the paper: neutral 79, anger 127, fear 69, disgust 46, sadness 62, boredom 81, happy 71.
EMODB = np.repeat(np.arange(7), [79, 127, 69, 46, 62, 81, 71])


@st.composite
def corpora(draw, smallest=1):
    """Class numbers in any order; every class has at least `smallest` utterances."""
    counts = draw(st.lists(st.integers(smallest, smallest + 20), min_size=1, max_size=6))
    targets = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(draw(st.integers(0, 99))).permutation(targets)


def class_counts(targets, parts, classes):
    """(parts, classes): how many utterances of each class lie in each part."""
    return np.array([np.bincount(targets[part], minlength=classes) for part in parts])


@given(st.data(), st.integers(2, 10), st.integers(0, 1000), st.integers(0, 4))
def test_stratified_folds_divide_evenly(data, folds, seed, repeat):
    targets = data.draw(corpora(smallest=folds))
    parts = stratified_folds(targets, folds, (seed, repeat))
    assert len(parts) == folds
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(targets)))
    counts = class_counts(targets, parts, targets.max() + 1)
    assert np.all(counts.max(axis=0) - counts.min(axis=0) <= 1)
    sizes = counts.sum(axis=1)
    assert sizes.max() - sizes.min() <= 1
    for part in parts:
        assert np.all(np.diff(part) > 0)


def test_stratified_folds_of_the_papers_corpus():
    counts = class_counts(EMODB, stratified_folds(EMODB, 10, (0, 0)), 7)
    assert sorted(counts.sum(axis=1).tolist()) == [53] * 5 + [54] * 5
    assert sorted(counts[:, 3].tolist()) == [4] * 4 + [5] * 6  # disgust: 46
    assert sorted(counts[:, 1].tolist()) == [12] * 3 + [13] * 7  # anger: 127


def test_stratified_folds_depend_on_seed_and_repeat_alone():
    def listed(seed, repeat):
        return [part.tolist() for part in stratified_folds(EMODB, 10, (seed, repeat))]

    assert listed(0, 0) == listed(0, 0)
    variants = [listed(0, 0), listed(0, 1), listed(1, 0), listed(1, 1)]
    for i, one in enumerate(variants):
        for other in variants[:i]:
            assert one != other


def test_stratified_folds_are_shuffled():
    # unshuffled dealing would put utterances 0, 10, 20 ... into the first fold
    first = stratified_folds(np.zeros(100, dtype=int), 10, (0, 0))[0]
    assert first.tolist() != list(range(0, 100, 10))


@pytest.mark.parametrize(
    ("folds", "said"),
    [
        (1, "--folds 1: cross-validation needs at least 2 folds"),
        (5, "--folds 5: class joy has only 3 utterances.*--folds 3 or fewer"),
    ],
)
def test_stratified_folds_refuse(folds, said):
    with pytest.raises(UserError, match=said):
        stratified_folds([0] * 9 + [1] * 3, folds, (0, 0), labels=["calm", "joy"])


def test_stratified_folds_name_no_impossible_remedy():
    with pytest.raises(UserError, match=r"class 1 has only 1 utterance, .*leave the class out"):
        stratified_folds([0, 0, 0, 1], 2, (0, 0))
    with pytest.raises(UserError, match="no utterances"):
        stratified_folds([], 2, (0, 0))


def test_speaker_folds_follow_sorted_speakers():
    parts = speaker_folds(["08", "03", "16", "03", "08", "03"])
    assert [part.tolist() for part in parts] == [[1, 3, 5], [0, 4], [2]]


@pytest.mark.parametrize(
    ("speakers", "said"),
    [
        (["03", "", "08", ""], "--cv speaker: the speaker of 2 of 4 utterances is unknown"),
        (["03", "03"], "--cv speaker: needs at least 2 speakers, found 1"),
        ([], "found 0"),
    ],
)
def test_speaker_folds_refuse(speakers, said):
    with pytest.raises(UserError, match=said):
        speaker_folds(speakers)


@given(corpora(), st.integers(0, 1000))
def test_oversampling_levels_the_classes(targets, seed):
    indices = random_oversampling(targets, np.random.default_rng(seed))
    counts = np.bincount(targets)
    assert np.bincount(targets[indices]).tolist() == [counts.max()] * len(counts)
    assert indices[: len(targets)].tolist() == list(range(len(targets)))  # every original once, and in order
    assert indices.min() >= 0
    assert indices.max() < len(targets)


def test_oversampling_is_random_and_with_replacement():
    targets = np.array([0] * 1000 + [1] * 10)
    extra = random_oversampling(targets, np.random.default_rng(0))[1010:]
    assert len(extra) == 990
    times = np.bincount(extra - 1000, minlength=10)
    assert times.sum() == 990
    assert np.all(times > 50)  # 99 expected, standard deviation 9.4
    assert len(set(times.tolist())) > 1  # not dealt in turn
    assert not np.array_equal(extra, random_oversampling(targets, np.random.default_rng(1))[1010:])


def test_oversampling_of_nothing():
    assert random_oversampling(np.array([], dtype=int), np.random.default_rng(0)).tolist() == []


@given(corpora(), st.floats(0.01, 0.99), st.integers(0, 1000))
def test_development_split_is_stratified(targets, share, seed):
    train, development = development_split(targets, share, (seed, 0, 3))
    assert sorted([*train.tolist(), *development.tolist()]) == list(range(len(targets)))
    in_train, in_development = class_counts(targets, (train, development), targets.max() + 1)
    total = in_train + in_development
    assert np.all(np.abs(in_development - share * total) <= 1)
    assert np.all(in_train >= 1)
    assert np.all((in_development >= 1) | (total == 1))


def test_development_split_depends_on_the_seed():
    def development(*seed):
        return development_split(EMODB, 0.1, seed)[1].tolist()

    assert development(0, 0, 0) == development(0, 0, 0)
    assert development(0, 0, 0) != development(0, 0, 1)
    # tenths of 79, 127, 69, 46, 62, 81, 71, rounded
    assert np.bincount(EMODB[development(0, 0, 0)]).tolist() == [8, 13, 7, 5, 6, 8, 7]


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_development_split_refuses_a_share_outside_0_to_1(share):
    with pytest.raises(ValueError, match="share"):
        development_split(EMODB, share, (0,))


def test_given_split():
    np.testing.assert_array_equal(split_test(["test", "train", "train", "test"], [0, 1, 0, 0], "ab"), [0, 3])
    for splits, targets, said in [
        (["train", ""], [0, 1], "1 of 2 utterances are neither"),
        (["test", "test"], [0, 1], "nothing to train on"),
        (["train", "train"], [0, 1], "nothing to test on"),
        (["train", "test"], [0, 1], "there is no b to train on"),
    ]:
        with pytest.raises(UserError, match=said):
            split_test(splits, targets, "ab")
