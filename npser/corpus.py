"""Labelled recordings: corpora known by their file names, any folder of emotion folders, a CSV, the built-in corpus.

    python -m npser.corpus PATH     what is in one

`open_corpus` only lists files; the samples are read one utterance at a time by `Corpus.read`. Whatever is wrong with a
folder or a file ends in a `UserError` that names it, so that a damaged recording cannot slip into a training run.
"""

import csv
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from npser.audio import AUDIO_SUFFIXES, read_audio
from npser.errors import UserError
from npser.layouts import recognise

PAPER_LABELS = ("neutral", "anger", "fear", "disgust", "sadness", "boredom", "happy")  # row order of the paper's tables


@dataclass(frozen=True)
class Utterance:
    """One labelled recording."""

    path: str  # absolute path of the file; a virtual one ("demo/...") in the built-in corpus
    name: str  # file name relative to the corpus folder, "/" between folders: identifies the utterance in every output
    speaker: str  # "" if unknown
    text: str  # code of the spoken text, "" if unknown
    emotion: str
    split: str = ""  # "train" or "test" where the corpus says on which side of an evaluation it belongs


@dataclass(frozen=True)
class Corpus:
    """Labelled recordings and the way to read one."""

    name: str
    labels: tuple[str, ...]
    utterances: tuple[Utterance, ...]  # sorted by name
    skipped: tuple[str, ...]  # "name: reason" for each audio file that is left out
    read: Callable[[Utterance], NDArray[np.float32]]  # -> mono samples at SAMPLE_RATE in [-1, 1]

    @property
    def targets(self) -> NDArray[np.int64]:
        """(utterances,) index into `labels` of each utterance's emotion."""
        index = {label: i for i, label in enumerate(self.labels)}
        return np.array([index[u.emotion] for u in self.utterances], dtype=np.int64)

    @property
    def speakers(self) -> tuple[str, ...]:
        """The distinct speakers, sorted; ("",) if they are unknown."""
        return tuple(sorted({u.speaker for u in self.utterances}))


def open_corpus(which: str, option: str = "--data") -> Corpus:
    """List the corpus "demo", "emodb", the folder or the CSV file `which`. UserError if there is no usable one.

    option: what it was given to, for that line.

    "emodb" is fetched if it is nowhere on this machine (RunFailed when that fails).
    """
    if which == "demo":
        from npser.synthetic import demo_corpus  # here, because the synthesiser builds on this module

        return demo_corpus()
    if which == "emodb":
        return _folder_corpus(_find_emodb(), option)
    path = Path(which)
    listed = path.suffix.lower() == ".csv" and os.path.isfile(path)
    return _csv_corpus(path, option) if listed else _folder_corpus(path, option)


def cross_corpus(train: Corpus, test: Corpus) -> Corpus:
    """Both corpora as one, split into "train" and "test", with the emotions that they share.

    Names and speakers are prefixed with the name of their corpus. UserError when fewer than two emotions are shared,
    or a recording is in both.
    """
    if "demo" in (train.name, test.name):
        raise UserError("--test-data: the built-in corpus is made of no files: python -m npser.synthetic writes them")
    shared = tuple(label for label in train.labels if label in test.labels)
    if len(shared) < 2:
        raise UserError(
            f"--test-data: {train.name} and {test.name} share {', '.join(shared) or 'no emotion'}, at least two are "
            f"needed: {train.name} has {', '.join(train.labels)}; {test.name} has {', '.join(test.labels)}"
        )
    trained_on = {os.path.realpath(u.path) for u in train.utterances}
    if both := [u.path for u in test.utterances if os.path.realpath(u.path) in trained_on]:
        raise UserError(
            f"--test-data: has {len(both)} of the recordings of --data, {both[0]} for one: tests need others"
        )
    utterances: list[Utterance] = []
    skipped: list[str] = []
    unshared: list[str] = []  # last, so that they hide no other reason
    for split, corpus in (("train", train), ("test", test)):
        prefix = corpus.name if train.name != test.name else f"{corpus.name}-{split}"
        skipped += [f"{prefix}/{line}" for line in corpus.skipped]
        for u in corpus.utterances:
            name = f"{prefix}/{u.name}"
            if u.emotion in shared:
                speaker = u.speaker and f"{prefix}:{u.speaker}"
                utterances.append(Utterance(u.path, name, speaker, u.text, u.emotion, split))
            else:
                unshared.append(f"{name}: {u.emotion} is in only one of the two corpora")
    utterances.sort(key=lambda u: u.name)
    return Corpus(f"{train.name}-to-{test.name}", shared, tuple(utterances), (*skipped, *unshared), _read_utterance)


def user_cache() -> Path:
    """The user's cache folder of this program (it need not exist). UserError for a user who has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npser"
    except RuntimeError as error:
        raise UserError("XDG_CACHE_HOME: not set, and this user has no home: set it to a folder for caches") from error


def _find_emodb() -> Path:
    """Return the folder of EMO-DB: $NPSER_DATA/emodb, else the one in the user's cache folder, fetched if need be."""
    if data := os.environ.get("NPSER_DATA"):
        folder = Path(data) / "emodb"
        if folder.exists():
            return folder
    cache = user_cache() / "emodb"
    if not cache.exists():
        from npser.fetch import fetch_emodb  # here, because few need it

        fetch_emodb(cache)
    return cache


def _folder_corpus(folder: Path, option: str) -> Corpus:
    """List a folder, by the file names of a known corpus if there are any, else by the folder that each lies in."""
    if not os.path.exists(folder):
        raise UserError(f"{option} {folder}: no such folder")
    if not folder.is_dir():
        raise UserError(f"{option} {folder}: not a folder; name the folder that holds the recordings, or a .csv file")
    root = folder.resolve()
    names = sorted(audio_names(root))
    if not names:
        raise UserError(f"{option} {folder}: no audio file in it ({' '.join(AUDIO_SUFFIXES)})")
    layout = recognise(names)
    utterances: list[Utterance] = []
    skipped: list[str] = []
    known = set(names)
    files: dict[str, str] = {}  # each file's name, or its first: that of no link if there is one
    for name in sorted(names, key=lambda name: (os.path.islink(root / name), name)):
        files.setdefault(os.path.realpath(root / name), name)
    for name in names:
        path = str(root / name)
        first = files[os.path.realpath(path)]
        twin = layout.twin(name) if layout else None
        if first != name:
            skipped.append(f"{name}: the same file as {first}")
        elif twin in known:
            skipped.append(f"{name}: the same performance as {twin}")
        elif layout:
            parsed = layout.parse(name)
            if parsed:
                utterances.append(Utterance(path, name, parsed.speaker, parsed.text, parsed.emotion))
            else:
                skipped.append(f"{name}: not {layout.file_name}")
        elif "/" not in name:
            skipped.append(f"{name}: lies in no emotion folder")
        else:
            utterances.append(Utterance(path, name, "", "", name.split("/")[-2]))
    if not utterances:
        raise UserError(
            f"{option} {folder}: none of its {len(names)} audio files lies in an emotion folder; "
            "put each into a sub-folder named after its emotion"
        )
    return _corpus(f"{option} {folder}", layout.name if layout else root.name, utterances, skipped)


def _csv_corpus(file: Path, option: str) -> Corpus:
    """List the recordings that a CSV file names: columns path and emotion, and speaker, text, split if it has them.

    Paths are relative to the CSV file. UserError, naming file and line, for a row that cannot be used.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            first = lines.readline()
            delimiter = max(",;\t", key=first.count)
            columns = [column.strip().lower() for column in next(csv.reader([first], delimiter=delimiter), [])]
            missing = [column for column in ("path", "emotion") if column not in columns]
            if missing:
                raise UserError(
                    f"{option} {file}: its first line has no column {' and no column '.join(missing)}: "
                    "path,emotion[,speaker][,text][,split] are wanted"
                )
            rows = [(n, dict(zip(columns, row, strict=False))) for n, row in _csv_rows(lines, delimiter)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{option} {file}: cannot be read as CSV in UTF-8 ({error})") from error
    utterances: list[Utterance] = []
    skipped: list[str] = []
    seen: set[str] = set()
    for line, row in rows:
        cells = {column: (row.get(column) or "").strip() for column in ("path", "speaker", "text", "emotion", "split")}
        name = Path(cells["path"]).as_posix() if cells["path"] else ""
        path = file.resolve().parent / name
        if not name or not cells["emotion"]:
            raise UserError(f"{option} {file}: line {line} has no {'emotion' if name else 'path'}")
        if not os.path.isfile(path):
            raise UserError(f"{option} {file}: line {line}: there is no file {path}")
        if os.path.realpath(path) in seen:
            raise UserError(f"{option} {file}: line {line}: {name} is there twice")
        seen.add(os.path.realpath(path))
        if "split" in columns and cells["split"] not in ("train", "test"):
            skipped.append(f"{name}: its split is {cells['split'] or 'empty'}, neither train nor test")
            continue
        utterances.append(Utterance(str(path), name, cells["speaker"], cells["text"], cells["emotion"], cells["split"]))
    if not utterances:
        raise UserError(f"{option} {file}: it names no recording that can be used")
    return _corpus(f"{option} {file}", file.stem, sorted(utterances, key=lambda u: u.name), skipped)


def _csv_rows(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows behind the first line, empty ones left out, with their line numbers."""
    reader = csv.reader(lines, delimiter=delimiter)
    for row in reader:
        if any(cell.strip() for cell in row):
            yield reader.line_num + 1, row


def _corpus(source: str, name: str, utterances: list[Utterance], skipped: list[str]) -> Corpus:
    """The corpus of these utterances; UserError when they have only one emotion."""
    emotions = {u.emotion for u in utterances}
    if len(emotions) == 1:
        raise UserError(f"{source}: only one emotion ({utterances[0].emotion}); at least two are needed")
    if strange := [emotion for emotion in sorted(emotions) if not emotion.isprintable()]:
        raise UserError(f"{source}: the emotion {strange[0]!r} is no name that can be printed: rename it")
    name = "demo-folder" if name == "demo" else name  # "demo" is the built-in corpus
    return Corpus(name, _label_order(emotions), tuple(utterances), tuple(skipped), _read_utterance)


def audio_names(root: Path) -> Iterator[str]:
    """Yield the audio files below `root`, relative and with "/", leaving out whatever is hidden."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{root}: cannot list {error.filename} ({error.strerror}): check its permissions") from error

    seen: set[str] = set()  # real paths, because linked folders are followed and may form a loop
    for parent, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        shown = (name for name in folders if not name.startswith("."))
        folders[:] = sorted(shown, key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        for name in files:
            if not name.startswith(".") and name.lower().endswith(AUDIO_SUFFIXES):
                yield (Path(parent) / name).relative_to(root).as_posix()


def _label_order(emotions: set[str]) -> tuple[str, ...]:
    """The paper's order if it has them all, else alphabetical."""
    if emotions <= set(PAPER_LABELS):
        return tuple(label for label in PAPER_LABELS if label in emotions)
    return tuple(sorted(emotions))


def _read_utterance(utterance: Utterance) -> NDArray[np.float32]:
    return read_audio(utterance.path)  # a named function, because worker processes receive it by name


if __name__ == "__main__":
    from npser.cli import run
    from npser.inventory import main

    run("npser.corpus", main)
