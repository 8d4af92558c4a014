"""Which utterances test, which train, and which are repeated: folds, development split, random oversampling.

Everything here works on positions in the corpus (0 .. N-1) and is a pure function of its arguments: the same seed gives
the same folds on every machine.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from npser.errors import UserError

Indices = NDArray[np.intp]

# First word of the generator's seed: the folds and the development split of one run draw from unrelated streams.
_FOLDS, _DEVELOPMENT = 1, 2


def stratified_folds(
    targets: ArrayLike, folds: int, seed: Sequence[int], labels: Sequence[str] | None = None
) -> list[Indices]:
    """Deal the utterances into `folds` test folds, stratified by class (the paper's 10-fold cross-validation).

    targets (N,) class numbers; seed: any non-negative integers, here (seed, repeat); labels name the classes in
    messages. Returns `folds` sorted index arrays: every utterance lies in exactly one, the counts of a class differ by
    at most one between folds, and so do the sizes of the folds.

    Raises UserError when folds < 2 or a class has fewer utterances than folds.
    """
    classes = np.asarray(targets)
    if folds < 2:
        raise UserError(f"--folds {folds}: cross-validation needs at least 2 folds")
    if classes.size == 0:
        raise UserError(f"--folds {folds}: there are no utterances to divide: check --data")
    present, counts = np.unique(classes, return_counts=True)
    rarest = int(np.argmin(counts))
    if counts[rarest] < folds:
        name = labels[int(present[rarest])] if labels is not None else str(present[rarest])
        count = int(counts[rarest])
        remedy = f"use --folds {count} or fewer" if count >= 2 else "add recordings of it or leave the class out"
        raise UserError(
            f"--folds {folds}: class {name} has only {count} utterance{'s' * (count != 1)}, "
            f"and every fold needs one of each class: {remedy}"
        )
    rng = np.random.default_rng((_FOLDS, *seed))
    # Like cards: class after class, shuffled within the class, one utterance to each fold in turn. The next class goes
    # on where the last one stopped, so the remainders of the classes do not pile up in the first folds.
    deck = np.concatenate([rng.permutation(np.flatnonzero(classes == k)) for k in present])
    return [np.sort(deck[first::folds]) for first in range(folds)]


def speaker_folds(speakers: Sequence[str]) -> list[Indices]:
    """Leave one speaker out: one test fold per speaker, in sorted speaker order.

    speakers: (N,) the speaker of each utterance, "" where unknown. Returns sorted index arrays.

    Raises UserError when a speaker is unknown or there are fewer than two speakers.
    """
    unknown = sum(not speaker for speaker in speakers)
    if unknown:
        raise UserError(
            f"--cv speaker: the speaker of {unknown} of {len(speakers)} utterances is unknown: use --cv stratified"
        )
    names = sorted(set(speakers))
    if len(names) < 2:
        raise UserError(f"--cv speaker: needs at least 2 speakers, found {len(names)}: use --cv stratified")
    speaker_of = np.asarray(speakers, dtype=object)
    return [np.flatnonzero(speaker_of == name) for name in names]


def split_test(splits: Sequence[str], targets: ArrayLike, labels: Sequence[str]) -> Indices:
    """The utterances to test on where the corpus says it itself: sorted positions; all others are for training.

    splits: (N,) "train" or "test"; targets (N,) classes; labels name them in messages.

    Raises UserError when an utterance is on neither side, a side is empty, or a class has nothing to be learned from.
    """
    unknown = sum(split not in ("train", "test") for split in splits)
    if unknown:
        raise UserError(
            f"--cv split: {unknown} of {len(splits)} utterances are neither for training nor for testing: it needs a "
            ".csv file with a column split, or --test-data"
        )
    is_test = np.array([split == "test" for split in splits])
    if is_test.all() or not is_test.any():
        raise UserError(f"--cv split: nothing to {'train' if is_test.all() else 'test'} on")
    untrained = np.setdiff1d(np.arange(len(labels)), np.asarray(targets)[~is_test])
    if untrained.size:
        raise UserError(f"--cv split: there is no {labels[untrained[0]]} to train on: leave it out of the test as well")
    return np.flatnonzero(is_test)


def random_oversampling(targets: ArrayLike, rng: np.random.Generator) -> Indices:
    """Random oversampling, the paper's remedy against class imbalance: make every class as large as the largest.

    targets (M,) the classes of the training utterances. Returns positions in `targets`: each once, in order, and behind
    them random repeats, drawn with replacement within each smaller class. Give it training utterances only: a repeat
    drawn before the folds were made could end up on both sides of a split.
    """
    single = np.arange(len(np.asarray(targets)))[:, None]
    return np.concatenate([np.empty(0, np.intp), *oversampled_runs(targets, list(single), rng)])


def runs(owner: Indices, longest: int) -> list[Indices]:
    """Windows of utterances, owner (M,), in runs of neighbours: `longest` of the same utterance, or its last ones."""
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    cuts = [
        at for first, end in zip(starts, [*starts[1:], len(owner)], strict=True) for at in range(first, end, longest)
    ]
    return np.split(np.arange(len(owner)), cuts[1:])


def oversampled_runs(targets: ArrayLike, pieces: Sequence[Indices], rng: np.random.Generator) -> list[Indices]:
    """`random_oversampling` that repeats whole runs, all windows of a run being of one class.

    Returns each run once, and behind them random repeats, the last of each class cut to the number that is missing.
    """
    classes = np.asarray(targets)
    present, counts = np.unique(classes, return_counts=True)
    class_of_run = classes[np.array([piece[0] for piece in pieces], dtype=np.intp)]
    made = list(pieces)
    for k, count in zip(present, counts, strict=True):
        missing = int(counts.max() - count)
        for number in rng.choice(np.flatnonzero(class_of_run == k), size=missing):
            if missing <= 0:
                break
            made.append(pieces[number][:missing])
            missing -= len(made[-1])
    return made


def development_split(targets: ArrayLike, share: float, seed: Sequence[int]) -> tuple[Indices, Indices]:
    """Split training utterances for choosing settings, stratified by class -> positions (train, development), sorted.

    targets (M,) classes; share in (0, 1): the part of each class that goes to development, rounded. Every class with
    two or more utterances is on both sides; a single utterance stays in training. Settings chosen on the development
    part have not seen the test fold.

    Raises ValueError when share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, not {share}")
    classes = np.asarray(targets)
    rng = np.random.default_rng((_DEVELOPMENT, *seed))
    development = np.zeros(len(classes), dtype=bool)
    for k in np.unique(classes):
        members = rng.permutation(np.flatnonzero(classes == k))
        # min before max: of one utterance, none can be given away
        development[members[: min(max(round(share * len(members)), 1), len(members) - 1)]] = True
    return np.flatnonzero(~development), np.flatnonzero(development)
