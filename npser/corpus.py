"""Labelled recordings: EMO-DB, any folder of emotion folders, and the built-in demonstration corpus.

`open_corpus` only lists files; the samples are read one utterance at a time by `Corpus.read`. Whatever is wrong with a
folder or a file ends in a `UserError` that names it, so that a damaged recording cannot slip into a training run.
"""

import math
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile
from scipy.signal import resample_poly

from npser.errors import UserError

SAMPLE_RATE = 16000  # Hz
FRAME = 256  # samples: a recording must fill one analysis frame
PAPER_LABELS = ("neutral", "anger", "fear", "disgust", "sadness", "boredom", "happy")  # row order of the paper's tables
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")

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


def read_audio(path: str | os.PathLike[str]) -> NDArray[np.float32]:
    """Read any audio file: (samples,) float32, mono (mean of the channels), 16 kHz, within [-1, 1].

    Only a file that exceeds full scale (floating-point formats, overshoot of the resampling filter) is scaled, to
    peak 1. UserError, naming the file: missing or unreadable, not audio, truncated, empty, silent, shorter than one
    frame, or with samples that are not finite.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise UserError(f"{path}: not a file; name an audio file")
    try:
        if os.path.getsize(path) == 0:
            raise UserError(f"{path}: empty, it holds no bytes; copy it again")
        if _header_promises_more(path):
            raise UserError(f"{path}: truncated, the header promises more data than the file holds; copy it again")
        samples, rate, promised = _decode(path)
    except (OSError, RuntimeError, TypeError) as error:  # soundfile raises all three; TypeError is for headerless .raw
        reason = " ".join(str(getattr(error, "error_string", error)).split())
        raise UserError(f"{path}: cannot be read as audio ({reason}); copy it again or convert it to WAV") from error
    if samples.size == 0:
        raise UserError(f"{path}: empty, it holds no samples; remove it or record it again")
    # The length of an MP3 file without an index is an estimate: a shortage of up to two of its frames is no damage.
    if samples.size < promised - (2 * 1152 if path.lower().endswith(".mp3") else 0):
        raise UserError(f"{path}: truncated, {samples.size} of {promised} samples could be read; copy it again")
    if not np.isfinite(samples).all():
        raise UserError(f"{path}: holds samples that are not finite (NaN or infinity); export it again")
    if samples.min() == samples.max():
        raise UserError(f"{path}: silent, all its samples are equal; remove it or record it again")
    if not 1000 <= rate <= 768_000:  # the resampling filter grows with the rate: a damaged one would exhaust memory
        raise UserError(f"{path}: sample rate of {rate} Hz is not that of a speech recording; convert it to 16 kHz")
    if rate != SAMPLE_RATE:
        common = math.gcd(rate, SAMPLE_RATE)
        samples = resample_poly(samples, SAMPLE_RATE // common, rate // common)
    if samples.size < FRAME:
        raise UserError(f"{path}: {samples.size} samples at 16 kHz are shorter than one frame of {FRAME}; remove it")
    peak = float(np.abs(samples).max())
    return np.ascontiguousarray(samples / max(peak, 1.0), dtype=np.float32)


def _decode(path: str) -> tuple[NDArray[np.float64], int, int]:
    """Return (samples,) averaged over channels, the rate in Hz and the number of samples that the header promises.

    Block by block, so that memory grows with what the file really holds and not with what its header claims.
    """
    try:
        import soundfile  # the only place that needs it
    except ImportError:
        return _decode_wav(path)
    with soundfile.SoundFile(path) as file:
        block = max(1, (1 << 20) // file.channels)
        blocks: list[NDArray[np.float64]] = []
        while len(samples := file.read(block, dtype="float64", always_2d=True)):
            blocks.append(samples.mean(axis=1))
        return np.concatenate([*blocks, np.empty(0)]), file.samplerate, file.frames


def _decode_wav(path: str) -> tuple[NDArray[np.float64], int, int]:
    """`_decode` on a machine without soundfile: WAV files alone, by SciPy."""
    if not path.lower().endswith(".wav"):
        raise UserError(f"{path}: only WAV files can be read without the package soundfile: pip install soundfile")
    try:
        with warnings.catch_warnings():  # about chunks beside the samples
            warnings.simplefilter("ignore", wavfile.WavFileWarning)
            rate, values = wavfile.read(path)
    except ValueError as error:
        raise OSError(str(error)) from error
    samples = values.reshape(len(values), -1).astype(np.float64)
    if values.dtype.kind == "u":
        samples = samples / 128 - 1  # 8 bits, offset
    elif values.dtype.kind == "i":
        samples /= 2.0 ** (8 * values.dtype.itemsize - 1)
    return samples.mean(axis=1), int(rate), len(samples)


def _header_promises_more(path: str) -> bool:
    """Whether the sample chunk of a WAV or AIFF file is longer than the file: libsndfile would shorten it silently."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        container = file.read(12)[:4]
        if container not in (b"RIFF", b"RIFX", b"FORM"):
            return False
        order = "<" if container == b"RIFF" else ">"
        while len(header := file.read(8)) == 8:
            length = struct.unpack(order + "I", header[4:])[0]
            if header[:4] in (b"data", b"SSND"):
                # Programs that write into a pipe cannot know the length and put (nearly) the largest one there.
                return file.tell() + length > size and length < 0x7FFF0000
            file.seek(length + length % 2, os.SEEK_CUR)  # chunks start at even offsets
    return False


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
    names = sorted(_audio_names(root))
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


def _audio_names(root: Path) -> Iterator[str]:
    """Yield the audio files below `root`, relative and with "/", leaving out whatever is hidden."""

    def refuse(error: OSError) -> None:
        raise UserError(f"--data {root}: cannot list {error.filename} ({error.strerror})") from error

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
