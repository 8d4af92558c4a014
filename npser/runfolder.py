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
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npser.errors import UserError
from npser.files import explained, sweep, write_atomically
from npser.foldresult import VOTES, FoldResult, damaged, json_text
from npser.lock import Lock
from npser.recipes import completed
from npser.runreport import render_markdown

# What may differ between the start of a run and its resumption, or between machines that share its folds.
MAY_CHANGE = ("vote", "backend", "precision", "threads", "versions")

# Configuration keys that are spelt as options of npser.train in messages; any other key is shown under its own name.
_OPTIONS = {
    "arch",
    "cv",
    "folds",
    "repeats",
    "recipe",
    "epochs",
    "batch_size",
    "segment_hop",
    "share_windows",
    "seed",
    "vote",
}
_WORDS = {
    "utterances_sha256": "the list of utterances (SHA-256)",
    "audio_sha256": "what the recordings hold (SHA-256)",
}
_SHARED_FILES = re.compile(r"config\.json|predictions\.csv|report\.md")
_FOLD_FILE = re.compile(r"r(0|[1-9][0-9]*)f(0|[1-9][0-9]*)\.json")


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
        started with; config.json then holds the newest (each fold records its own). A run that has left nothing but its
        configuration may become any other. Finished folds are read, so that a damaged one is found before hours of
        training, not after.

        Raises UserError when any other key differs (both values are named), when `repeats` may change and there are
        folds of more repeats, when a fold is damaged, when another
        program is at work on the same folds (`npser.lock`), or when the folder holds results without a config.json or
        cannot be written; RunFailed when the disk is full.
        """
        path = Path(path)
        new = json.loads(json.dumps(dict(config), allow_nan=False))  # as it would be read back: tuples become lists
        if fault := config_fault(new):
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
                if only is not None or _holds_anything(path):  # with `only`, others may be about to
                    _refuse_differences(path, old, new, frozenset(may_change))
                    if only is not None and "repeats" in new:  # others may be at work on later ones
                        new["repeats"] = max(new["repeats"], old.get("repeats", 0))
                    _refuse_fewer_repeats(path, folder.load_folds(), new)
                if old == new:
                    return folder
            elif folder.finished() or any((path / name).exists() for name in ("predictions.csv", "report.md")):
                raise UserError(f"{path}: holds results, but no config.json that says whose: use another --out")
            write_atomically(path / "config.json", json_text(new))
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
        try:
            matches = [_FOLD_FILE.fullmatch(file.name) for file in folds.iterdir()] if folds.is_dir() else []
        except OSError as error:
            raise UserError(f"{folds}: cannot be read ({error.strerror}): check its permissions") from error
        return sorted((int(match[1]), int(match[2])) for match in matches if match)

    def load_fold(self, repeat: int, fold: int) -> FoldResult:
        """Read one finished fold; UserError, naming the file, when it is damaged or belongs to something else."""
        path = self.fold_path(repeat, fold)
        result = FoldResult.from_json(_read_text(path), path)
        if (result.repeat, result.fold) != (repeat, fold):
            raise damaged(path, f"it holds repeat {result.repeat}, fold {result.fold}")
        if list(result.labels) != self.config["labels"]:
            raise damaged(path, "its labels are not those of config.json")
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
        with self.lock.shared_files() if self.lock else nullcontext():
            while True:
                # Several processes may work in one folder (--only). Whoever writes last looks again whether a fold was
                # finished meanwhile, so that the tables end up complete.
                done = self.finished()
                results = self.load_folds()
                # Another may have resumed the run meanwhile, with another vote or more repeats.
                config = _read_config(self.path) if (self.path / "config.json").exists() else self.config
                write_atomically(self.path / "predictions.csv", _predictions_csv(results, config))
                write_atomically(self.path / "report.md", render_markdown(config, results))
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


def _holds_anything(path: Path) -> bool:
    """Whether a run has left more there than its configuration."""
    return any(entry.name not in ("config.json", "folds", ".lock") for entry in path.iterdir()) or any(
        (path / "folds").iterdir()
    )


def _refuse_fewer_repeats(path: Path, finished: Iterable[FoldResult], new: Mapping[str, Any]) -> None:
    """A run may get more repeats, which leaves those that it has as they are; UserError where it would lose some."""
    most = max((result.repeat + 1 for result in finished), default=0)
    if most > new.get("repeats", most):
        raise UserError(f"{path}: has folds of {most} repeats: use another --out, or --repeats {most} at least")


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
    name = key.removeprefix("training.")
    return f"--{name.replace('_', '-')}" if name in _OPTIONS else _WORDS.get(key, key)


def _shown(config: Mapping[str, Any], key: str) -> str:
    """A value for a one-line message; long ones are cut."""
    if key not in config:
        return "not set"
    value = config[key]
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def config_fault(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the keys that reading the folds and reporting them needs, or None."""
    labels = config.get("labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        return "labels is not a list of names"
    for key in ("folds", "repeats", "utterances"):
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
        fault = config_fault(config) if isinstance(config, dict) else "not a JSON object"
    except (ValueError, RecursionError) as error:
        fault = str(error)
    if fault:
        raise UserError(f"{source}: damaged ({fault}): restore it, or use another --out")
    return completed(config)


def _read_text(path: Path) -> str:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path}: not a file: remove it, and run again")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged (not UTF-8 text): restore it, or delete it and run again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error
