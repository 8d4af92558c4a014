"""Cross-validation: which folds there are, and what is done for each (paper: 10 stratified folds, 5 repeats).

For every fold: statistics of the training utterances -> windows -> a fresh network -> training -> votes on the test
utterances -> one file in the run folder. Nothing of the test utterances is looked at before the last epoch is over.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npser.augment import AugmentedWindows
from npser.corpus import Corpus
from npser.errors import RunFailed, UserError
from npser.features import Standardisation, WindowSet, window_count
from npser.foldresult import EpochResult, FoldResult, fold_result
from npser.folds import Indices, speaker_folds, split_test, stratified_folds
from npser.models import Model, build_model
from npser.progress import Progress
from npser.recipes import Recipe
from npser.runfolder import RunFolder
from npser.trainer import Checkpoint, Task, Votes, evaluate, fit, steps_per_epoch

Frames = Sequence[NDArray[np.float32]]
Versions = Sequence[Frames]  # of all utterances: as they are, then at other speeds


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run, beside the corpus."""

    arch: str
    backend: str
    seed: int
    vote: str
    recipe: Recipe


@dataclass(frozen=True)
class Fold:
    """One fold of one repeat: positions in the corpus."""

    repeat: int
    number: int
    train: Indices
    test: Indices

    @property
    def name(self) -> str:
        return f"{self.repeat}.{self.number}"


def make_folds(corpus: Corpus, cv: str, folds: int, repeats: int, seed: int) -> list[Fold]:
    """All folds of a run, repeat after repeat; cv: "stratified" (dealt anew in every repeat), "speaker" or "split"."""
    made = []
    for repeat in range(repeats):
        if cv == "speaker":
            tests = speaker_folds([u.speaker for u in corpus.utterances])
        elif cv == "split":
            tests = [split_test([u.split for u in corpus.utterances], corpus.targets, corpus.labels)]
        else:
            tests = stratified_folds(corpus.targets, folds, (seed, repeat), corpus.labels)
        everything = np.arange(len(corpus.utterances))
        made += [Fold(repeat, f, np.setdiff1d(everything, test), test) for f, test in enumerate(tests)]
    return made


def only(folds: Sequence[Fold], wanted: tuple[int, int] | None) -> list[Fold]:
    """The fold (repeat, number) that --only names, or all of them. UserError where there is none such."""
    chosen = [fold for fold in folds if wanted in (None, (fold.repeat, fold.number))]
    if wanted and not chosen:
        last = folds[-1]
        raise UserError(
            f"--only {wanted[0]}.{wanted[1]}: there are repeats 0 to {last.repeat} and folds 0 to {last.number}"
        )
    return chosen


def training_steps(frames: Frames, targets: NDArray[np.int64], train: Indices, length: int, settings: Settings) -> int:
    """The updates that training on these utterances takes."""
    recipe = settings.recipe
    windows = [window_count(len(frames[i]), length, recipe.segment_hop) for i in train]
    return recipe.epochs * steps_per_epoch(np.repeat(targets[train], windows), recipe.batch_size)


def prepare(
    versions: Versions,
    targets: NDArray[np.int64],
    train: Indices,
    classes: int,
    settings: Settings,
    words: Sequence[int],
) -> tuple[Model, Task]:
    """A fresh network, the standardisation of some utterances in it, and the task of learning them.

    words: (seed, repeat, fold), from which everything random is drawn.
    """
    recipe = settings.recipe
    model_seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    model = build_model(settings.arch, backend=settings.backend, seed=model_seed, classes=classes)
    heard = [[frames[i] for i in train] for frames in versions]
    model.scale = scale = Standardisation.of(heard[0], recipe.standardisation)
    windows = (
        AugmentedWindows(heard, scale, model.input_frames, recipe)
        if recipe.augmented
        else WindowSet(heard[0], scale, model.input_frames, recipe.segment_hop)
    )
    return model, Task.of(windows, targets[train][windows.owner], words, recipe)


def run_fold(
    corpus: Corpus,
    versions: Versions,
    fold: Fold,
    settings: Settings,
    folder: RunFolder,
    progress: Progress,
    with_checkpoint: bool,
    about: Mapping[str, Any],
) -> None:
    """Train and test one fold and save its result; `about` is recorded with it."""
    path = folder.checkpoint_path(fold.repeat, fold.number) if with_checkpoint else None
    folder.save_fold(train_and_test(corpus, versions, fold, settings, progress, path, about))


def train_and_test(
    corpus: Corpus,
    versions: Versions,
    fold: Fold,
    settings: Settings,
    progress: Progress,
    checkpoint_path: Path | None,
    about: Mapping[str, Any],
) -> FoldResult:
    """Train and test one fold; `about` is recorded with its result."""
    started = time.monotonic()
    targets = corpus.targets
    words = (settings.seed, fold.repeat, fold.number)
    identity = f"{settings.arch} {words}"
    checkpoint = Checkpoint(checkpoint_path, identity, progress, origin_of(about)) if checkpoint_path else None
    try:
        model, task = prepare(versions, targets, fold.train, len(corpus.labels), settings, words)
        epochs = fit(model, task, progress, checkpoint)
        assert model.scale is not None
        tested = [versions[0][i] for i in fold.test]
        test = WindowSet(tested, model.scale, model.input_frames, settings.recipe.segment_hop)
        votes = evaluate(model, test)
    except RunFailed as error:
        raise RunFailed(f"fold {fold.name}: {error}") from error
    earlier = sum(epoch.seconds for epoch in checkpoint.resumed) if checkpoint else 0.0
    told = {**about, "seconds": seconds_since(started, earlier)}
    if checkpoint and checkpoint.also_by:
        told["also_by"] = checkpoint.also_by
    return tested_fold(corpus, fold, settings, epochs, votes, told)


def origin_of(about: Mapping[str, Any]) -> str:
    """What computes, for the record of a training that goes on elsewhere."""
    return f"{(about.get('versions') or {}).get('commit')} on {about.get('machine')}"


def seconds_since(started: float, earlier: float = 0.0) -> float:
    """A fold's duration as its file has it: since then, and the epochs that were done before an interruption."""
    return round(earlier + time.monotonic() - started, 3)


def tested_fold(
    corpus: Corpus,
    fold: Fold,
    settings: Settings,
    epochs: Sequence[EpochResult],
    votes: Votes,
    about: Mapping[str, Any],
) -> FoldResult:
    """What is kept of a fold whose test utterances have been decided on."""
    utterances = [corpus.utterances[i] for i in fold.test]
    return fold_result(
        repeat=fold.repeat,
        fold=fold.number,
        labels=corpus.labels,
        vote=settings.vote,
        epochs=epochs,
        files=[u.name for u in utterances],
        speakers=[u.speaker for u in utterances],
        truth=corpus.targets[fold.test],
        probabilities=votes.probabilities,
        majority=votes.majority,
        run=about,
    )
