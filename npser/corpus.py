"""Labelled recordings: EMO-DB, any folder of emotion folders, and the built-in demonstration corpus.

`open_corpus` only lists files; the samples are read one utterance at a time by `Corpus.read`. Whatever is wrong with a
folder or a file ends in a `UserError` that names it, so that a damaged recording cannot slip into a training run.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from npser.audio import AUDIO_SUFFIXES
from npser.audio import SAMPLE_RATE as SAMPLE_RATE
from npser.audio import read_audio as read_audio
from npser.errors import UserError

PAPER_LABELS = ("neutral", "anger", "fear", "disgust", "sadness", "boredom", "happy")  # row order of the paper's tables

# EMO-DB names its files speaker, text, emotion (initial of the German word), version: 03a01Wa.wav.
EMODB_NAME = re.compile(r"(\d\d)([ab]\d\d)([WLEAFTN])([a-z]?)\.(?i:wav)")
EMODB_EMOTIONS = {
    "W": "anger",  # Wut (Ärger)
    "L": "boredom",  # Langeweile
    "E": "disgust",  # Ekel
    "A": "fear",  # Angst
    "F": "happy",  # Freude
    "T": "sadness",  # Trauer
    "N": "neutral",
}


@dataclass(frozen=True)
class Utterance:
    """One labelled recording."""

    path: str  # absolute path of the file; a virtual one ("demo/...") in the built-in corpus
    name: str  # file name relative to the corpus folder, "/" between folders: identifies the utterance in every output
    speaker: str  # "" if unknown
    text: str  # code of the spoken text, "" if unknown
    emotion: str


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


def open_corpus(which: str) -> Corpus:
    """List the corpus "demo", "emodb" or the folder `which`. UserError if there is no usable one."""
    if which == "demo":
        from npser.synthetic import demo_corpus  # here, because the synthesiser builds on this module

        return demo_corpus()
    return _folder_corpus(_find_emodb() if which == "emodb" else Path(which))


def user_cache() -> Path:
    """The user's cache folder of this program (it need not exist)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npser"


def _find_emodb() -> Path:
    """Return the folder of EMO-DB. UserError if it is in neither of the two places."""
    if data := os.environ.get("NPSER_DATA"):
        folder = Path(data) / "emodb"
        if folder.exists():
            return folder
    cache = user_cache() / "emodb"
    if cache.exists():
        return cache
    raise UserError(
        f"--data emodb: found neither $NPSER_DATA/emodb nor {cache}; "
        "set NPSER_DATA to the folder that holds emodb, or pass --data FOLDER"
    )


def _folder_corpus(folder: Path) -> Corpus:
    """List a folder, by EMO-DB file names if there is one, else by the folder that each file lies in."""
    if not folder.exists():
        raise UserError(f"--data {folder}: no such folder")
    if not folder.is_dir():
        raise UserError(f"--data {folder}: not a folder; name the folder that holds the recordings")
    root = folder.resolve()
    names = sorted(audio_names(root))
    if not names:
        raise UserError(f"--data {folder}: no audio file in it ({' '.join(AUDIO_SUFFIXES)})")
    is_emodb = any(EMODB_NAME.fullmatch(_base_name(name)) for name in names)
    utterances: list[Utterance] = []
    skipped: list[str] = []
    for name in names:
        match = EMODB_NAME.fullmatch(_base_name(name))
        path = str(root / name)
        if match:
            utterances.append(Utterance(path, name, match[1], match[2], EMODB_EMOTIONS[match[3]]))
        elif is_emodb:
            skipped.append(f"{name}: not an EMO-DB file name")
        elif "/" not in name:
            skipped.append(f"{name}: lies in no emotion folder")
        else:
            utterances.append(Utterance(path, name, "", "", name.split("/")[-2]))
    if not utterances:
        raise UserError(
            f"--data {folder}: none of its {len(names)} audio files lies in an emotion folder; "
            "put each into a sub-folder named after its emotion"
        )
    emotions = {u.emotion for u in utterances}
    if len(emotions) == 1:
        raise UserError(f"--data {folder}: only one emotion ({utterances[0].emotion}); at least two are needed")
    name = "demo-folder" if root.name == "demo" else root.name  # "demo" is the built-in corpus
    return Corpus(
        name="emodb" if is_emodb else name,
        labels=_label_order(emotions),
        utterances=tuple(utterances),
        skipped=tuple(skipped),
        read=_read_utterance,
    )


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
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and name.lower().endswith(AUDIO_SUFFIXES):
                yield (Path(parent) / name).relative_to(root).as_posix()


def _base_name(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _label_order(emotions: set[str]) -> tuple[str, ...]:
    """The paper's order if it has them all, else alphabetical."""
    if emotions <= set(PAPER_LABELS):
        return tuple(label for label in PAPER_LABELS if label in emotions)
    return tuple(sorted(emotions))


def _read_utterance(utterance: Utterance) -> NDArray[np.float32]:
    return read_audio(utterance.path)  # a named function, because worker processes receive it by name
