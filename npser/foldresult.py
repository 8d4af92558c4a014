"""What is recorded of one fold: the decisions on its test utterances, and how the training went.

A `FoldResult` is the file `folds/r<R>f<F>.json` of a run folder (`npser.runfolder`); everything that is reported of a
run is computed from its fold files.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from npser.errors import UserError
from npser.metrics import confusion_matrix

VOTES = ("sum", "majority")  # sum of the segments' probabilities; majority of the segments' decisions


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
        if not all(math.isfinite(x) for epoch in self.epochs for x in (epoch.loss, epoch.accuracy, epoch.seconds)):
            raise ValueError("a training loss, accuracy or duration is not finite")
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
        return json_text(content)

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
            raise damaged(source, f"{error} is missing") from error
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise damaged(source, str(error)) from error


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


def json_text(content: Mapping[str, Any]) -> str:
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


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    value.encode("utf-8", "surrogateescape")  # UnicodeEncodeError, a ValueError, for what could not be written again
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not an integer")
    return value


def damaged(source: Path | str, why: str) -> UserError:
    """A fold file that cannot be used, as the project's one line."""
    return UserError(f"{source}: damaged ({why}): delete it, and the same command computes it again")
