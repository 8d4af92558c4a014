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

from npser.corpus import Corpus
from npser.errors import RunFailed
from npser.features import Standardisation, WindowSet, window_count
from npser.folds import Indices, speaker_folds, split_test, stratified_folds
from npser.models import Model, build_model
from npser.progress import Progress
from npser.runfolder import FoldResult, RunFolder, fold_result
from npser.trainer import Checkpoint, Task, evaluate, fit, steps_per_epoch

Frames = Sequence[NDArray[np.float32]]


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run, beside the corpus."""

    arch: str
    backend: str
    seed: int
    epochs: int
    batch_size: int
    segment_hop: int  # frames from one window of an utterance to the next
    vote: str
    clip_norm: float | None


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


def training_steps(frames: Frames, targets: NDArray[np.int64], train: Indices, length: int, settings: Settings) -> int:
    """The updates that training on these utterances takes."""
    windows = [window_count(len(frames[i]), length, settings.segment_hop) for i in train]
    return settings.epochs * steps_per_epoch(np.repeat(targets[train], windows), settings.batch_size)


def train_on(
    frames: Frames,
    targets: NDArray[np.int64],
    train: Indices,
    classes: int,
    settings: Settings,
    words: Sequence[int],
    progress: Progress,
    checkpoint: Checkpoint | None,
) -> tuple[Model, list[Any]]:
    """A fresh network trained on some utterances: (model, epoch results).

    words: (seed, repeat, fold), from which everything random is drawn.
    """
    model_seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    model = build_model(settings.arch, backend=settings.backend, seed=model_seed, classes=classes)
    model.scale = scale = Standardisation.of([frames[i] for i in train])
    windows = WindowSet([frames[i] for i in train], scale, model.input_frames, settings.segment_hop)
    task = Task(windows, targets[train][windows.owner], words, settings.epochs, settings.batch_size, settings.clip_norm)
    return model, fit(model, task, progress, checkpoint)


def run_fold(
    corpus: Corpus,
    frames: Frames,
    fold: Fold,
    settings: Settings,
    folder: RunFolder,
    progress: Progress,
    with_checkpoint: bool,
    about: Mapping[str, Any],
) -> None:
    """Train and test one fold and save its result; `about` is recorded with it."""
    path = folder.checkpoint_path(fold.repeat, fold.number) if with_checkpoint else None
    folder.save_fold(train_and_test(corpus, frames, fold, settings, progress, path, about))


def train_and_test(
    corpus: Corpus,
    frames: Frames,
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
    checkpoint = Checkpoint(checkpoint_path, f"{settings.arch} {words}", progress) if checkpoint_path else None
    try:
        model, epochs = train_on(frames, targets, fold.train, len(corpus.labels), settings, words, progress, checkpoint)
        assert model.scale is not None
        test = WindowSet([frames[i] for i in fold.test], model.scale, model.input_frames, settings.segment_hop)
        votes = evaluate(model, test)
    except RunFailed as error:
        raise RunFailed(f"fold {fold.name}: {error}") from error
    tested = [corpus.utterances[i] for i in fold.test]
    return fold_result(
        repeat=fold.repeat,
        fold=fold.number,
        labels=corpus.labels,
        vote=settings.vote,
        epochs=epochs,
        files=[u.name for u in tested],
        speakers=[u.speaker for u in tested],
        truth=targets[fold.test],
        probabilities=votes.probabilities,
        majority=votes.majority,
        run={**about, "seconds": round(time.monotonic() - started, 3)},
    )
