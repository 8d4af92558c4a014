"""The run folder: what a cross-validated run leaves on disk, and how it is resumed.

    config.json                   everything needed to repeat the run
    folds/r<R>f<F>.json           one finished fold (repeat R, fold F, counted from 0): a FoldResult
    folds/r<R>f<F>.checkpoint.npz an unfinished fold; the trainer writes it, `save_fold` removes it
    predictions.csv, report.md    made from the fold files, after every fold
    .lock                         who is at work here: `npser.lock`

A fold is finished when its JSON file is there, and every file is written whole or not at all, so a run may be
interrupted at any moment and loses at most the fold (or the epochs since the checkpoint) it was working on. Temporary
files of a program that was killed are removed by the next one that locks what they were to become.
"""

import csv
import errno
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from npser.errors import RunFailed, UserError
from npser.files import replacing, sweep
from npser.lock import Lock
from npser.metrics import confusion_matrix

VOTES = ("sum", "majority")  # sum of the segments' probabilities; majority of the segments' decisions

# What may differ between the start of a run and its resumption, or between machines that share its folds.
MAY_CHANGE = ("vote", "backend", "precision", "threads", "workers", "only", "versions", "checkpoint")

# Configuration keys that are spelt as options of npser.train in messages; any other key is shown under its own name.
_OPTIONS = {
    *("arch", "data", "cv", "folds", "repeats", "epochs", "batch_size", "segment_hop", "vote"),
    *("only", "backend", "precision", "threads", "workers", "seed", "out", "save"),
}
_FULL_DISK = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NOT_WRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}
_SHARED_FILES = re.compile(r"config\.json|predictions\.csv|report\.md")
_FOLD_FILE = re.compile(r"r(0|[1-9][0-9]*)f(0|[1-9][0-9]*)\.json")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all (`npser.files`), to the disk.

    Text is written as UTF-8; file names that are not valid UTF-8 (Python's surrogate escapes) keep their bytes.

    Raises RunFailed when the disk is full or fails, UserError when the place cannot be written to.
    """
    data = content.encode("utf-8", errors="surrogateescape") if isinstance(content, str) else content
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise explained(path, error) from error


@dataclass(frozen=True)
class EpochResult:
    """One epoch of training: its number from 1, mean training loss, training accuracy (fraction) and duration."""

    epoch: int
    loss: float
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class UtteranceResult:
    """One test utterance: classes by their labels, probabilities (mean over the segments) in label order."""

    file: str
    speaker: str  # "" where unknown
    truth: str
    prediction: str  # by the fold's vote
    majority: str  # by majority vote, whatever the fold's vote
    probabilities: tuple[float, ...]

    def by_vote(self, vote: str, labels: Sequence[str]) -> str:
        """The decision by "sum" (the label of the largest probability, the first of equals) or by "majority"."""
        return self.majority if vote == "majority" else labels[int(np.argmax(self.probabilities))]


@dataclass(frozen=True)
class FoldResult:
    """One finished fold, as `folds/r<R>f<F>.json` holds it.

    `confusion` holds, for both votes, the matrix as nested lists (rows the truth, label order). `run` says how this
    fold was computed (backend, threads, seconds, machine, versions ...), any JSON values. Made by `fold_result`; the
    constructor raises ValueError when the parts contradict each other.
    """

    repeat: int
    fold: int
    labels: tuple[str, ...]
    vote: str
    confusion: Mapping[str, list[list[int]]]
    epochs: tuple[EpochResult, ...]
    utterances: tuple[UtteranceResult, ...]
    run: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.repeat < 0 or self.fold < 0:
            raise ValueError(f"repeat {self.repeat} and fold {self.fold} count from 0")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label occurs twice")
        if self.vote not in VOTES:
            raise ValueError(f"the vote {self.vote!r} is neither sum nor majority")
        if not all(math.isfinite(epoch.loss) and math.isfinite(epoch.accuracy) for epoch in self.epochs):
            raise ValueError("a training loss or accuracy is not finite")
        if len({utterance.file for utterance in self.utterances}) != len(self.utterances):
            raise ValueError("an utterance occurs twice")
        for utterance in self.utterances:
            _check_utterance(utterance, self.labels, self.vote)
        if dict(self.confusion) != _both_confusions(self.utterances, self.labels):
            raise ValueError("the confusion matrices do not agree with the utterances")

    def matrix(self, vote: str) -> NDArray[np.int64]:
        """The confusion matrix by a vote, (K, K) int64, rows the truth."""
        return np.array(self.confusion[vote], dtype=np.int64).reshape(len(self.labels), len(self.labels))

    def to_json(self) -> str:
        """The fold as JSON text; the same fold gives the same text."""
        content = {
            "repeat": self.repeat,
            "fold": self.fold,
            "labels": list(self.labels),
            "vote": self.vote,
            "confusion": dict(self.confusion),
            "epochs": [vars(epoch) for epoch in self.epochs],
            "utterances": [
                vars(utterance) | {"probabilities": dict(zip(self.labels, utterance.probabilities, strict=True))}
                for utterance in self.utterances
            ],
            "run": dict(self.run),
        }
        return _json_text(content)

    @classmethod
    def from_json(cls, text: str, source: Path | str) -> "FoldResult":
        """Read `to_json`'s text back; source is the file's name for messages.

        Raises UserError, naming the file, when the text is damaged or contradicts itself.
        """
        try:
            content = json.loads(text)
            labels = tuple(_string(label) for label in content["labels"])
            return cls(
                repeat=_integer(content["repeat"]),
                fold=_integer(content["fold"]),
                labels=labels,
                vote=_string(content["vote"]),
                confusion=dict(content["confusion"]),
                epochs=tuple(
                    EpochResult(
                        _integer(epoch["epoch"]),
                        float(epoch["loss"]),
                        float(epoch["accuracy"]),
                        float(epoch["seconds"]),
                    )
                    for epoch in content["epochs"]
                ),
                utterances=tuple(
                    UtteranceResult(
                        file=_string(utterance["file"]),
                        speaker=_string(utterance["speaker"]),
                        truth=_string(utterance["truth"]),
                        prediction=_string(utterance["prediction"]),
                        majority=_string(utterance["majority"]),
                        probabilities=tuple(float(utterance["probabilities"][label]) for label in labels),
                    )
                    for utterance in content["utterances"]
                ),
                run=dict(content["run"]),
            )
        except KeyError as error:
            raise _damaged(source, f"{error} is missing") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(source, str(error)) from error


def fold_result(
    *,
    repeat: int,
    fold: int,
    labels: Sequence[str],
    vote: str,
    epochs: Iterable[EpochResult],
    files: Sequence[str],
    speakers: Sequence[str],
    truth: ArrayLike,
    probabilities: ArrayLike,
    majority: ArrayLike,
    run: Mapping[str, Any],
) -> FoldResult:
    """Make the record of a fold of N test utterances, confusion matrices by both votes included.

    files and speakers: N strings; truth (N,) class numbers; probabilities (N, K), the segments' probabilities averaged
    (the vote by sum: the largest average is the largest sum); majority (N,) the class numbers voted for by most
    segments. Raises ValueError when these do not fit together.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    decisions = {"sum": p.argmax(axis=1), "majority": np.asarray(majority)}
    confusion = {by: confusion_matrix(truth, decisions[by], len(labels)).tolist() for by in VOTES}
    utterances = tuple(
        UtteranceResult(
            file=file,
            speaker=speaker,
            truth=labels[true_class],
            prediction=labels[predicted],
            majority=labels[majority_class],
            probabilities=tuple(row.tolist()),
        )
        for file, speaker, true_class, predicted, majority_class, row in zip(
            files,
            speakers,
            np.asarray(truth),
            decisions["majority" if vote == "majority" else "sum"],
            decisions["majority"],
            p,
            strict=True,
        )
    )
    return FoldResult(
        repeat=repeat,
        fold=fold,
        labels=tuple(labels),
        vote=vote,
        confusion=confusion,
        epochs=tuple(epochs),
        utterances=utterances,
        run=dict(run),
    )


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and its configuration; made by `open_or_create` (to run) or `open` (to read)."""

    path: Path
    config: Mapping[str, Any]
    lock: Lock | None = field(default=None, compare=False)  # None: opened to be read

    @classmethod
    def open_or_create(
        cls,
        path: Path | str,
        config: Mapping[str, Any],
        may_change: Iterable[str] = (),
        only: tuple[int, int] | None = None,
    ) -> "RunFolder":
        """Start a run in a new folder, or resume the run that lies there; only: to compute that repeat and fold alone.

        config: JSON values; needs `labels` and `vote`. Keys in `may_change` may differ from the ones the run was
        started with; config.json then holds the newest (each fold records its own). Finished folds are read, so that a
        damaged one is found before hours of training, not after.

        Raises UserError when any other key differs (both values are named), when a fold is damaged, when another
        program is at work on the same folds (`npser.lock`), or when the folder holds results without a config.json or
        cannot be written; RunFailed when the disk is full.
        """
        path = Path(path)
        new = json.loads(json.dumps(dict(config), allow_nan=False))  # as it would be read back: tuples become lists
        if fault := _config_fault(new):
            raise ValueError(f"the configuration's {fault}")
        try:
            (path / "folds").mkdir(parents=True, exist_ok=True)
            lock = Lock(path, only)
        except OSError as error:
            raise explained(path, error) from error
        folder = cls(path, new, lock)
        folds = r"r\d+f\d+" if only is None else f"r{only[0]}f{only[1]}"
        sweep(path / "folds", re.compile(rf"{folds}\.(json|checkpoint\.npz)"))
        for finished in folder.finished():
            if only in (None, finished):  # killed between the result and the removal of the checkpoint
                folder.checkpoint_path(*finished).unlink(missing_ok=True)
        with lock.shared_files():
            sweep(path, _SHARED_FILES)
            if (path / "config.json").exists():
                old = _read_config(path)
                _refuse_differences(path, old, new, frozenset(may_change))
                folder.load_folds()
                if old == new:
                    return folder
            elif folder.finished() or (path / "predictions.csv").exists():
                raise UserError(f"{path}: holds results, but no config.json that says whose: use another --out")
            write_atomically(path / "config.json", _json_text(new))
        return folder

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
        """Open an existing run folder for reading; UserError when it is none or its config.json is damaged."""
        path = Path(path)
        if not os.path.isfile(path / "config.json"):  # which answers for names that no file can have, too
            raise UserError(f"{path}: not a run folder (no config.json): give the --out folder of npser.train")
        return cls(path, _read_config(path))

    def fold_path(self, repeat: int, fold: int) -> Path:
        """Where the result of a finished fold lies."""
        return self.path / "folds" / f"r{repeat}f{fold}.json"

    def checkpoint_path(self, repeat: int, fold: int) -> Path:
        """Where the trainer keeps the state of an unfinished fold."""
        return self.path / "folds" / f"r{repeat}f{fold}.checkpoint.npz"

    def finished(self) -> list[tuple[int, int]]:
        """The finished folds, sorted: (repeat, fold)."""
        folds = self.path / "folds"
        matches = [_FOLD_FILE.fullmatch(file.name) for file in folds.iterdir()] if folds.is_dir() else []
        return sorted((int(match[1]), int(match[2])) for match in matches if match)

    def load_fold(self, repeat: int, fold: int) -> FoldResult:
        """Read one finished fold; UserError, naming the file, when it is damaged or belongs to something else."""
        path = self.fold_path(repeat, fold)
        result = FoldResult.from_json(_read_text(path), path)
        if (result.repeat, result.fold) != (repeat, fold):
            raise _damaged(path, f"it holds repeat {result.repeat}, fold {result.fold}")
        if list(result.labels) != self.config["labels"]:
            raise _damaged(path, "its labels are not those of config.json")
        return result

    def load_folds(self) -> list[FoldResult]:
        """All finished folds, sorted by repeat and fold."""
        return [self.load_fold(repeat, fold) for repeat, fold in self.finished()]

    def save_fold(self, result: FoldResult) -> None:
        """Record a finished fold, drop its checkpoint, and bring predictions.csv and report.md up to date."""
        if list(result.labels) != self.config["labels"]:
            raise ValueError(f"the fold's labels {result.labels} are not the run's {self.config['labels']}")
        write_atomically(self.fold_path(result.repeat, result.fold), result.to_json())
        self.checkpoint_path(result.repeat, result.fold).unlink(missing_ok=True)
        self.write_tables()

    def write_tables(self) -> None:
        """Write predictions.csv and report.md from the finished folds, decisions by the configuration's vote."""
        from npser.report import render_markdown  # not at the top: npser.report imports this module

        with self.lock.shared_files() if self.lock else nullcontext():
            while True:
                # Several processes may work in one folder (--only). Whoever writes last looks again whether a fold was
                # finished meanwhile, so that the tables end up complete.
                done = self.finished()
                results = self.load_folds()
                write_atomically(self.path / "predictions.csv", _predictions_csv(results, self.config))
                write_atomically(self.path / "report.md", render_markdown(self.config, results))
                if self.finished() == done:
                    return


def _predictions_csv(results: Iterable[FoldResult], config: Mapping[str, Any]) -> str:
    """The CSV text: repeat, fold, file, speaker, truth, prediction, p_<label> ..., sorted by repeat, fold and file."""
    labels = config["labels"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["repeat", "fold", "file", "speaker", "truth", "prediction", *(f"p_{label}" for label in labels)])
    for result in sorted(results, key=lambda result: (result.repeat, result.fold)):
        for utterance in sorted(result.utterances, key=lambda utterance: utterance.file):
            decision = utterance.by_vote(config["vote"], labels)
            writer.writerow(
                [result.repeat, result.fold, utterance.file, utterance.speaker, utterance.truth, decision]
                + [f"{p:.6g}" for p in utterance.probabilities]
            )
    return text.getvalue()


def _json_text(content: Mapping[str, Any]) -> str:
    """A JSON object that people can read: each key, and in it each epoch, utterance or matrix, on a line of its own."""

    def laid_out(value: Any) -> str:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if not any(isinstance(part, dict | list) for part in parts):
            return json.dumps(value, allow_nan=False)
        if isinstance(value, list):
            return "[\n  " + ",\n  ".join(json.dumps(part, allow_nan=False) for part in value) + "\n ]"
        return (
            "{\n  "
            + ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in value.items())
            + "\n }"
        )

    return "{\n " + ",\n ".join(f"{json.dumps(key)}: {laid_out(value)}" for key, value in content.items()) + "\n}\n"


def _both_confusions(utterances: Sequence[UtteranceResult], labels: Sequence[str]) -> dict[str, list[list[int]]]:
    """The confusion matrices by both votes, as nested lists."""
    number = {label: k for k, label in enumerate(labels)}
    truth = [number[utterance.truth] for utterance in utterances]
    return {
        vote: confusion_matrix(
            truth, [number[utterance.by_vote(vote, labels)] for utterance in utterances], len(labels)
        ).tolist()
        for vote in VOTES
    }


def _check_utterance(utterance: UtteranceResult, labels: Sequence[str], vote: str) -> None:
    """ValueError when an utterance's labels, probabilities and prediction do not fit together."""
    for label in (utterance.truth, utterance.prediction, utterance.majority):
        if label not in labels:
            raise ValueError(f"{utterance.file}: {label!r} is none of the labels")
    if len(utterance.probabilities) != len(labels) or not all(map(math.isfinite, utterance.probabilities)):
        raise ValueError(f"{utterance.file}: needs one finite probability for each label")
    if utterance.prediction != utterance.by_vote(vote, labels):
        raise ValueError(f"{utterance.file}: the prediction {utterance.prediction!r} is not the one by {vote}")


def _refuse_differences(path: Path, old: Mapping[str, Any], new: Mapping[str, Any], may_change: frozenset[str]) -> None:
    """UserError naming every option in which a run differs from the one in the folder."""
    fixed = [{k: v for k, v in config.items() if k not in may_change} for config in (old, new)]
    before, now = (_flat(config) for config in fixed)
    differences = [
        f"{_option(key)} was {_shown(before, key)}, now {_shown(now, key)}"
        for key in dict.fromkeys([*before, *now])
        if key not in before or key not in now or before[key] != now[key]
    ]
    if differences:
        raise UserError(f"{path}: {'; '.join(differences)}: use another --out, or the same options to resume")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names: {"features": {"hop": 128}} -> {"features.hop": 128}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}" if key in _OPTIONS else key


def _shown(config: Mapping[str, Any], key: str) -> str:
    """A value for a one-line message; long ones are cut."""
    if key not in config:
        return "not set"
    value = config[key]
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _config_fault(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the two keys that reading the folds needs, or None."""
    labels = config.get("labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        return "labels is not a list of names"
    for key in ("folds", "repeats"):
        if not isinstance(config.get(key, 0), int):
            return f"{key} is not a number"
    try:
        "".join(labels).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return "labels holds what is no text"
    return None if config.get("vote") in list(VOTES) else "vote is neither sum nor majority"


def _read_config(path: Path) -> dict[str, Any]:
    source = path / "config.json"
    try:
        config = json.loads(_read_text(source))
        fault = _config_fault(config) if isinstance(config, dict) else "not a JSON object"
    except (ValueError, RecursionError) as error:
        fault = str(error)
    if fault:
        raise UserError(f"{source}: damaged ({fault}): restore it, or use another --out")
    return config


def _read_text(path: Path) -> str:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path}: not a file: remove it, and run again")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged (not UTF-8 text): restore it, or delete it and run again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    value.encode("utf-8", "surrogateescape")  # UnicodeEncodeError, a ValueError, for what could not be written again
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not an integer")
    return value


def _damaged(source: Path | str, why: str) -> UserError:
    return UserError(f"{source}: damaged ({why}): delete it, and the same command computes it again")


def explained(path: Path, error: OSError) -> UserError | RunFailed:
    """An operating-system error while writing, as the project's one line."""
    reason = error.strerror or str(error)
    if error.errno in _FULL_DISK:
        return RunFailed(f"{path}: {reason}: free some space and run the same command again to resume")
    if error.errno == errno.ENOENT and not path.parent.is_dir():
        return RunFailed(f"{path}: cannot be written, its folder is gone: run the same command again")
    if error.errno in _NOT_WRITABLE:
        return UserError(f"{path}: cannot be written ({reason}): choose another place with --out")
    return RunFailed(f"{path}: cannot be written ({reason})")
