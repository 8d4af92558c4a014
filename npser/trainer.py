"""Training one network on one set of windows: epochs of shuffled batches, a checkpoint after each.

Everything random is drawn from the seed and the epoch's number, and the checkpoint holds the rest of the state, so a
run that was stopped and resumed gives the same numbers as one that was not.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.reference import Array
from npser.errors import RunFailed
from npser.features import Windows, WindowSet
from npser.files import explained, replacing
from npser.foldresult import EpochResult
from npser.folds import oversampled_runs, runs
from npser.inference import window_probabilities
from npser.modelfile import DAMAGE
from npser.models import Model
from npser.optim import SGD
from npser.progress import Progress, duration
from npser.recipes import Recipe

_OVERSAMPLING, _SHUFFLING, _AUGMENTING = 1, 2, 3  # words of the generators' seeds: unrelated streams
LOOK_EVERY = 0.5  # seconds between two readings of loss and accuracy where reading waits for a GPU


@dataclass(frozen=True)
class Task:
    """What is to be learned: windows, their classes, and the seed words (seed, repeat, fold) of all that is random."""

    windows: Windows
    targets: NDArray[np.int64]  # (windows,)
    seed: Sequence[int]
    epochs: int
    batch_size: int
    clip_norm: float | None = None  # this and what follows: see npser.recipes
    final_rate: float = 1.0
    average_last: int = 1
    share_windows: int = 1
    label_smoothing: float = 0.0

    @classmethod
    def of(cls, windows: Windows, targets: NDArray[np.int64], seed: Sequence[int], recipe: Recipe) -> "Task":
        """The task that a recipe makes of these windows."""
        names = {field.name for field in fields(cls)} & {field.name for field in fields(recipe)}
        return cls(windows, targets, seed, **{name: getattr(recipe, name) for name in names})

    def optimiser(self) -> SGD:
        total = self.epochs * steps_per_epoch(self.targets, self.batch_size)
        return SGD(clip_norm=self.clip_norm, final_rate=self.final_rate, total=total)

    def oversampled(self) -> list[NDArray[np.intp]]:
        """The numbers of the windows of an epoch, in runs: all, and repeats until the classes are equally large."""
        pieces = runs(self.windows.owner, self.share_windows)
        return oversampled_runs(self.targets, pieces, np.random.default_rng([*self.seed, _OVERSAMPLING]))


def steps_per_epoch(targets: NDArray[np.int64], batch_size: int) -> int:
    """The updates of an epoch over windows of these classes, oversampled."""
    counts = np.bincount(targets)
    return -(-int(counts.max() * np.count_nonzero(counts)) // batch_size)


def fit(model: Model, task: Task, progress: Progress, checkpoint: "Checkpoint | None" = None) -> list[EpochResult]:
    """Train until task.epochs are done, going on from the checkpoint if there is one.

    Raises RunFailed when the loss is no longer finite.
    """
    sgd = task.optimiser()
    mean = MeanWeights()
    done = checkpoint.load(model, sgd, mean, task.epochs) if checkpoint else []
    progress.skip(len(done) * steps_per_epoch(task.targets, task.batch_size))
    for result in train_epochs(model, sgd, task, progress, len(done), mean):
        done.append(result)
        if checkpoint and result.epoch < task.epochs:
            progress.say(f"    checkpoint written in {duration(checkpoint.save(model, sgd, done, mean))}")
    return done


class MeanWeights:
    """The mean of a network's parameters at several moments, by name; empty before the first.

    The last steps of stochastic gradient descent wander around a minimum, their mean lies nearer to it (Polyak and
    Juditsky 1992; Izmailov et al. 2018).
    """

    def __init__(self) -> None:
        self.params: dict[str, Array] = {}
        self.count = 0

    def add(self, model: Model) -> None:
        self.count += 1
        for name, value in model.params.items():
            if self.count == 1:
                self.params[name] = value.copy()
            else:
                mean = self.params[name]
                mean += (value - mean) / mean.dtype.type(self.count)


def train_epochs(
    model: Model, sgd: SGD, task: Task, progress: Progress, first: int = 0, mean: "MeanWeights | None" = None
) -> Iterator[EpochResult]:
    """Train epoch after epoch, `first` of them done already; yields each one's result when it is over.

    After the last epoch, the model has the weights that the task asks for: those of its last step, or the mean of the
    last epochs'. `mean` is what was averaged already.
    """
    mean = mean or MeanWeights()
    k, length = model.arrays, task.windows.length
    pieces, frames, held = task.oversampled(), None, None
    for epoch in range(first, task.epochs):
        shuffled = np.random.default_rng([*task.seed, _SHUFFLING, epoch]).permutation(len(pieces))
        order = np.concatenate([pieces[i] for i in shuffled])
        drawn, rows = task.windows.epoch(np.random.default_rng([*task.seed, _AUGMENTING, epoch]))
        if drawn is not held:  # without augmentation they stay where they are
            held, frames = drawn, k.asarray(drawn)
        rows, targets = rows[order], k.asarray(task.targets[order])
        starts = k.asarray(rows)
        tally, loss_mean, accuracy, reported = k.Tally(), 0.0, 0.0, 0
        started = before = time.monotonic()
        for at in range(0, len(order), task.batch_size):
            seen = min(at + task.batch_size, len(order))  # the last batch may be smaller
            y = targets[at:seen]
            if task.share_windows == 1:
                windows, place = k.take_windows(frames, starts[at:seen], length), None
            else:
                distinct, place = map(k.asarray, model.distinct_windows(rows[at:seen]))
                windows = k.take_windows(frames, distinct, model.window_frames)
            loss, p = model.train_batch(windows, y, sgd, place, task.label_smoothing)
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
        if task.average_last > 1 and result.epoch > task.epochs - task.average_last:
            mean.add(model)
            if result.epoch == task.epochs:
                model.set_params(mean.params)
        # The loss was looked at before the last update.
        if not all(np.isfinite((value.min(), value.max())).all() for value in model.params.values()):
            raise RunFailed(
                f"the training diverged: a parameter is not finite after epoch {result.epoch}; no result is written"
            )
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
    training starts at the beginning. `origin` says what computes; after `load`, `resumed` holds the epochs that were
    not trained by this program, and `also_by` where they were, if elsewhere.
    """

    def __init__(self, path: Path, identity: str, progress: Progress, origin: str = "") -> None:
        self.path, self.identity, self.progress, self.origin = path, identity, progress, origin
        self.resumed: Sequence[EpochResult] = ()
        self.also_by: list[str] = []

    def save(self, model: Model, sgd: SGD, done: Sequence[EpochResult], mean: MeanWeights | None = None) -> float:
        """Write the state; returns the seconds that it took. RunFailed when the disk is full."""
        started = time.monotonic()
        arrays: dict[str, Any] = {f"params/{name}": value for name, value in model.params.items()}
        arrays |= {f"velocities/{name}": model.arrays.asnumpy(value) for name, value in sgd.velocities.items()}
        if mean and mean.count:
            arrays |= {"averaged": mean.count, **{f"mean/{name}": value for name, value in mean.params.items()}}
        epochs = np.array([[r.epoch, r.loss, r.accuracy, r.seconds] for r in done])
        try:
            with replacing(self.path, to_disk=False) as file:
                about: dict[str, Any] = {"identity": np.array(self.identity)}
                about["origins"] = np.array([*self.also_by, self.origin])
                np.savez(file, **about, updates=sgd.updates, epochs=epochs, **arrays)
        except OSError as error:
            raise explained(self.path, error) from error
        return time.monotonic() - started

    def load(self, model: Model, sgd: SGD, mean: MeanWeights, epochs: int) -> list[EpochResult]:
        """Restore the state, if there is one, and return the results of the epochs done, fewer than `epochs`."""
        if not self.path.is_file():
            return []
        try:
            if self.path.stat().st_size > 2**20 + 4 * sum(value.nbytes for value in model.params.values()):
                raise ValueError("it is larger than the network")
            with self.path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                if sum(member.file_size for member in file.zip.infolist()) > self.path.stat().st_size:
                    raise ValueError("its contents are compressed, or claim to be larger than the file")
                if str(file["identity"]) != self.identity:
                    raise ValueError("it belongs to another training")
                params = {name: _like(value, file[f"params/{name}"]) for name, value in model.params.items()}
                velocities = {name: _like(value, file[f"velocities/{name}"]) for name, value in model.params.items()}
                updates, rows = int(file["updates"]), file["epochs"]
                origins = np.atleast_1d(file.get("origins", "an older npser"))
                count = int(file["averaged"]) if "averaged" in file else 0
                averaged = model.params.items() if count else ()
                means = {name: _like(value, file[f"mean/{name}"]) for name, value in averaged}
            if updates < 1 or rows.ndim != 2 or rows.shape[1] != 4 or not np.isfinite(rows).all():
                raise ValueError("its epochs are damaged")
            done = [EpochResult(int(epoch), *map(float, values)) for epoch, *values in rows]
            if [result.epoch for result in done] != list(range(1, len(done) + 1)) or not 0 < len(done) < epochs:
                raise ValueError("its epochs are not those of this training")
        except DAMAGE as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self.progress.warn(f"{self.path.name} cannot be used ({reason}): this fold starts at its beginning")
            return []
        model.set_params(params)
        sgd.velocities = {name: model.arrays.asarray(value) for name, value in velocities.items()}
        sgd.updates = updates
        mean.params, mean.count = means, count
        self.resumed, self.also_by = tuple(done), [str(o) for o in origins if o != self.origin]
        return done


def _like(mine: Array, read: NDArray[Any]) -> Array:
    """What was read in the place of an array; ValueError where it cannot be."""
    if read.shape != mine.shape or read.dtype != mine.dtype or not np.isfinite(read).all():
        raise ValueError(f"it holds {read.dtype} {read.shape} where finite {mine.dtype} {mine.shape} are expected")
    return np.ascontiguousarray(read)
