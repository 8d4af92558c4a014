"""Training one network on one set of windows: epochs of shuffled batches, a checkpoint after each.

Everything random is drawn from the seed and the epoch's number, and the checkpoint holds the rest of the state, so a
run that was stopped and resumed gives the same numbers as one that was not.
"""

import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.reference import Array
from npser.errors import RunFailed
from npser.features import WindowSet
from npser.folds import random_oversampling
from npser.inference import window_probabilities
from npser.models import Model
from npser.optim import SGD
from npser.progress import Progress, duration
from npser.runfolder import EpochResult

_OVERSAMPLING, _SHUFFLING = 1, 2  # last words of the generators' seeds: two unrelated streams
LOOK_EVERY = 0.5  # seconds between two readings of loss and accuracy where reading waits for a GPU


@dataclass(frozen=True)
class Task:
    """What is to be learned: windows, their classes, and the seed words (seed, repeat, fold) of all that is random."""

    windows: WindowSet
    targets: NDArray[np.int64]  # (windows,)
    seed: Sequence[int]
    epochs: int
    batch_size: int
    clip_norm: float | None = None  # see npser.optim.SGD

    def oversampled(self) -> NDArray[np.intp]:
        """The numbers of the windows of an epoch: all, and repeats until every class is as large as the largest."""
        return random_oversampling(self.targets, np.random.default_rng([*self.seed, _OVERSAMPLING]))


def steps_per_epoch(targets: NDArray[np.int64], batch_size: int) -> int:
    """The updates of an epoch over windows of these classes, oversampled."""
    counts = np.bincount(targets)
    return -(-int(counts.max() * np.count_nonzero(counts)) // batch_size)


def fit(model: Model, task: Task, progress: Progress, checkpoint: "Checkpoint | None" = None) -> list[EpochResult]:
    """Train until task.epochs are done, going on from the checkpoint if there is one.

    Raises RunFailed when the loss is no longer finite.
    """
    sgd = SGD(clip_norm=task.clip_norm)
    done = checkpoint.load(model, sgd) if checkpoint else []
    progress.skip(len(done) * steps_per_epoch(task.targets, task.batch_size))
    for result in train_epochs(model, sgd, task, progress, first=len(done)):
        done.append(result)
        if checkpoint and result.epoch < task.epochs:
            progress.say(f"    checkpoint written in {duration(checkpoint.save(model, sgd, done))}")
    return done


def train_epochs(model: Model, sgd: SGD, task: Task, progress: Progress, first: int = 0) -> Iterator[EpochResult]:
    """Train epoch after epoch, `first` of them done already; yields each one's result when it is over."""
    k, length = model.arrays, task.windows.length
    windows, frames = task.oversampled(), k.asarray(task.windows.everything)
    for epoch in range(first, task.epochs):
        order = np.random.default_rng([*task.seed, _SHUFFLING, epoch]).permutation(windows)
        starts, targets = k.asarray(task.windows.rows[order]), k.asarray(task.targets[order])
        tally, loss_mean, accuracy, reported = k.Tally(), 0.0, 0.0, 0
        started = before = time.monotonic()
        for at in range(0, len(order), task.batch_size):
            seen = min(at + task.batch_size, len(order))  # the last batch may be smaller
            y = targets[at:seen]
            loss, p = model.train_batch(k.take_windows(frames, starts[at:seen], length), y, sgd)
            if k.diverged(loss):
                raise _diverged(float(loss), epoch, sgd.updates + 1)
            tally.add(loss, p, y)
            # A GPU is left alone for a while between two looks at how far it is.
            if k.WAITS and at > 0 and seen < len(order) and time.monotonic() - before < LOOK_EVERY:
                continue
            loss_sum, right = tally.read()
            if not np.isfinite(loss_sum):
                raise _diverged(loss_sum, epoch, sgd.updates)
            loss_mean, accuracy = loss_sum / seen, right / seen
            now = time.monotonic()
            updates = -(-(seen - reported) // task.batch_size)
            progress.step(now - before, seen - reported, loss_mean, accuracy, epoch + 1, task.epochs, updates)
            before, reported = now, seen
        result = EpochResult(epoch + 1, loss_mean, accuracy, time.monotonic() - started)
        progress.epoch_done(result, task.epochs, len(order))
        yield result


def _diverged(loss: float, epoch: int, update: int) -> RunFailed:
    return RunFailed(
        f"the training diverged: the loss is {loss} in epoch {epoch + 1}, update {update}; no result is written"
    )


@dataclass(frozen=True)
class Votes:
    """What a network says of utterances: mean probabilities (N, K) and the class most windows voted for (N,)."""

    probabilities: NDArray[np.float64]
    majority: NDArray[np.int64]


def vote(p: Array, owner: NDArray[np.intp]) -> Votes:
    """Gather the votes of each utterance from its windows' probabilities (paper, decision per utterance).

    p (windows, K), owner (windows,): the utterance of each. By sum: the mean of the windows' probabilities. By
    majority: the class that most windows voted for; of equals the one with the larger sum.
    """
    utterances, classes = owner.max() + 1, p.shape[1]
    sums, ballots = np.zeros((utterances, classes)), np.zeros((utterances, classes))
    np.add.at(sums, owner, p.astype(np.float64))
    np.add.at(ballots, (owner, p.argmax(axis=1)), 1)
    # The sum decides between equal counts: it is scaled below one ballot.
    majority = (ballots + sums / (1 + sums.sum(axis=1, keepdims=True))).argmax(axis=1)
    return Votes(sums / sums.sum(axis=1, keepdims=True), majority)


def evaluate(model: Model, windows: WindowSet) -> Votes:
    """Score every window, and let each utterance's windows vote."""
    return vote(window_probabilities(model, windows.recordings()), windows.owner)


class Checkpoint:
    """The state after an epoch: parameters, velocities, number of updates, results so far; whole or not at all.

    `identity` says of what training this is the state; a checkpoint of anything else, or a damaged one, is ignored, and
    training starts at the beginning.
    """

    def __init__(self, path: Path, identity: str, progress: Progress) -> None:
        self.path, self.identity, self.progress = path, identity, progress

    def save(self, model: Model, sgd: SGD, done: Sequence[EpochResult]) -> float:
        """Write the state; returns the seconds that it took. RunFailed when the disk is full."""
        started = time.monotonic()
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        arrays: dict[str, Any] = {f"params/{name}": value for name, value in model.params.items()}
        arrays |= {f"velocities/{name}": model.arrays.asnumpy(value) for name, value in sgd.velocities.items()}
        epochs = np.array([[r.epoch, r.loss, r.accuracy, r.seconds] for r in done])
        try:
            with open(temporary, "wb") as file:
                np.savez(file, identity=np.array(self.identity), updates=sgd.updates, epochs=epochs, **arrays)
            os.replace(temporary, self.path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise RunFailed(f"{self.path}: cannot write the checkpoint ({error.strerror})") from error
            raise
        return time.monotonic() - started

    def load(self, model: Model, sgd: SGD) -> list[EpochResult]:
        """Restore the state, if there is one, and return the results of the epochs done."""
        if not self.path.exists():
            return []
        try:
            with np.load(self.path, allow_pickle=False) as file:
                if str(file["identity"]) != self.identity:
                    raise ValueError("it belongs to another training")
                params = {name: file[f"params/{name}"] for name in model.params}
                velocities = {name: file[f"velocities/{name}"] for name in model.params}
                updates, epochs = int(file["updates"]), file["epochs"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            self.progress.say(f"{self.path.name} cannot be used ({error}): this fold starts at its beginning")
            return []
        model.set_params(params)
        sgd.velocities = {name: model.arrays.asarray(value) for name, value in velocities.items()}
        sgd.updates = updates
        return [EpochResult(int(epoch), *map(float, values)) for epoch, *values in epochs]
