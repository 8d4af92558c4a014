"""Audio files of any format, rate and length -> mono samples at 16 kHz, block by block or all at once.

A long recording never lies in memory: `Recording` decodes and resamples it in blocks, and the samples are the same,
bit for bit, as those of the whole file resampled at once. Whatever is wrong with a file ends in a `UserError` that
names it.
"""

import math
import os
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile
from scipy.signal import firwin, resample_poly

from npser.container import is_cut_off, mp3_samples
from npser.errors import UserError

SAMPLE_RATE = 16000  # Hz
FRAME = 256  # samples: a recording must fill one analysis frame
AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".w64"),
)

_BLOCK = 1 << 18  # samples of one channel that are decoded at once
_MP3_FRAME = 1152  # samples, at most
_UNKNOWN = 1 << 62  # samples, at least, of a file that libsndfile knows no length of
_REACH = 10  # the resampling filter's length on each side, in periods of the lower of the two rates (as in SciPy)

Samples = NDArray[np.float64]


@dataclass(frozen=True)
class Recording:
    """A recording that was read through once and found usable; `samples` reads it again, block by block.

    path: the file; length: samples at 16 kHz; peak: the largest magnitude among them, as decoded.
    """

    path: str
    length: int
    peak: float

    @property
    def seconds(self) -> float:
        return self.length / SAMPLE_RATE

    def samples(self) -> Iterator[NDArray[np.float32]]:
        """Blocks of mono samples at 16 kHz within [-1, 1], one after the other; see `read_audio`."""
        for block in _resampled_blocks(self.path):
            yield _scaled(block, self.peak)


def open_recording(path: str | os.PathLike[str], seen: Callable[[float], object] | None = None) -> Recording:
    """Read a file through, in constant memory, and say whether it can be used: UserError, naming it, where not.

    Refused: missing or unreadable, not audio, truncated, empty, silent, shorter than one frame, or with samples that
    are not finite. seen: is told, block after block, how many seconds are read.
    """
    path = os.fspath(path)
    length, peak = 0, 0.0
    for block in _resampled_blocks(path):
        length += block.size
        peak = max(peak, _peak(block))
        if seen:
            seen(length / SAMPLE_RATE)
    return Recording(path, length, peak)


def read_audio(path: str | os.PathLike[str]) -> NDArray[np.float32]:
    """Read any audio file: (samples,) float32, mono (mean of the channels), 16 kHz, within [-1, 1].

    Only a file that exceeds full scale (floating-point formats, overshoot of the resampling filter) is scaled, to
    peak 1. UserError as in `open_recording`.
    """
    samples = np.concatenate(list(_resampled_blocks(os.fspath(path))))
    return _scaled(samples, _peak(samples))


def _peak(samples: Samples) -> float:
    return float(np.abs(samples).max()) if samples.size else 0.0


def _scaled(samples: Samples, peak: float) -> NDArray[np.float32]:
    return np.ascontiguousarray(samples / max(peak, 1.0), dtype=np.float32)


def _resampled_blocks(path: str) -> Iterator[Samples]:
    """Blocks of mono samples at 16 kHz, not scaled. UserError, at the end at the latest, for a file not to be used."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise UserError(f"{path}: not a file; name an audio file")
    try:
        if os.path.getsize(path) == 0:
            raise UserError(f"{path}: empty, it holds no bytes; copy it again")
        if is_cut_off(as_bytes(path)):
            raise UserError(f"{path}: truncated, its container promises more than the file holds; copy it again")
        with _opened(path) as file:
            # The filter grows with the rate, less what it shares with ours: a damaged one would exhaust memory.
            odd = file.rate // math.gcd(max(file.rate, 1), SAMPLE_RATE) > 200_000
            if odd or not 1000 <= file.rate <= 768_000:
                if not file.promised:
                    raise UserError(f"{path}: empty, it holds no samples; remove it or record it again")
                raise UserError(
                    f"{path}: sample rate of {file.rate} Hz is not that of a speech recording; convert it to 16 kHz"
                )
            made = 0
            for block in resampled(_checked(path, file), file.rate):
                if not np.isfinite(block).all():
                    raise UserError(f"{path}: holds samples that are too large to be resampled; export it again")
                made += block.size
                yield block
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error
    except (OSError, RuntimeError, TypeError) as error:  # soundfile raises all three; TypeError is for headerless .raw
        reason = " ".join(str(getattr(error, "error_string", error)).split())
        raise UserError(f"{path}: cannot be read as audio ({reason}); copy it again or convert it to WAV") from error
    if made < FRAME:
        raise UserError(f"{path}: {made} samples at 16 kHz are shorter than one frame of {FRAME}; remove it")


@dataclass(frozen=True)
class _Decoded:
    """An open file: blocks of its samples, averaged over the channels, their rate, and how many there have to be."""

    blocks: Iterator[Samples]
    rate: int
    promised: int  # what the header says
    least: int  # fewer than that, and the file is truncated


@contextmanager
def _opened(path: str) -> Iterator[_Decoded]:
    """The file, while it is open. OSError, RuntimeError or TypeError when it cannot be decoded."""
    try:
        import soundfile
    except ImportError:
        yield _decoded_wav(path)
        return
    with soundfile.SoundFile(as_bytes(path)) as file:
        least = file.frames
        if file.format in ("MP3", "MPEG"):
            least = _least_of_mp3(path, file.frames)
        if file.frames >= _UNKNOWN:
            raise UserError(f"{path}: does not say how long it is, as a stream does; convert it to WAV")
        yield _Decoded(_blocks(file), file.samplerate, file.frames, least)


def _least_of_mp3(path: str, promised: int) -> int:
    """How many samples there have to be. UserError where there are more than libsndfile is going to give.

    Without an index in the file, the length that libsndfile promises is a guess, and it gives no more than that. A few
    frames are always the encoder's own, and no damage.
    """
    counted, indexed = mp3_samples(as_bytes(path))
    if counted - promised > 4 * _MP3_FRAME:
        raise UserError(
            f"{path}: an MP3 file that does not say how long it is; {promised} of {counted} samples would be read: "
            "convert it to WAV"
        )
    return (promised if indexed or not counted else min(promised, counted)) - 2 * _MP3_FRAME


def as_bytes(path: str) -> str | bytes:
    """A path as soundfile takes it, which does not know the stray bytes that a name may hold."""
    return os.fsencode(path) if os.name == "posix" else path


def _blocks(file: Any) -> Iterator[Samples]:
    """Of a soundfile.SoundFile: memory grows with neither the file nor what its header claims."""
    block = max(1, _BLOCK // file.channels)
    while len(samples := file.read(block, dtype="float64", always_2d=True)):
        with np.errstate(invalid="ignore", over="ignore"):  # infinities are refused in a moment
            mono = samples.mean(axis=1)
        yield mono  # not within errstate, which a generator that is closed elsewhere could not leave


def _decoded_wav(path: str) -> _Decoded:
    """A file on a machine without soundfile: WAV alone, by SciPy, which reads all of it at once."""
    if not path.lower().endswith(".wav"):
        raise UserError(f"{path}: only WAV files can be read without the package soundfile: pip install soundfile")
    try:
        with warnings.catch_warnings():  # about chunks beside the samples
            warnings.simplefilter("ignore", wavfile.WavFileWarning)
            rate, values = wavfile.read(path)
    except (ValueError, ZeroDivisionError, struct.error) as error:
        raise OSError(str(error)) from error
    values = values.reshape(len(values), -1 if values.size else 1)  # (samples, channels)
    block = max(1, _BLOCK // values.shape[1])
    blocks = (_as_reals(values[at : at + block]).mean(axis=1) for at in range(0, len(values), block))
    return _Decoded(blocks, int(rate), len(values), len(values))


def _as_reals(values: NDArray[Any]) -> Samples:
    """PCM samples of any width -> [-1, 1)."""
    if values.dtype.kind == "u":
        return values.astype(np.float64) / 128 - 1  # 8 bits, offset
    scale = 2.0 ** (8 * values.dtype.itemsize - 1) if values.dtype.kind == "i" else 1.0
    return values.astype(np.float64) / scale


def _checked(path: str, file: _Decoded) -> Iterator[Samples]:
    """The same blocks; UserError where the samples cannot be those of a recording."""
    size, least, most = 0, math.inf, -math.inf
    for block in file.blocks:
        if not np.isfinite(block).all():
            raise UserError(f"{path}: holds samples that are not finite (NaN or infinity); export it again")
        size, least, most = size + block.size, min(least, float(block.min())), max(most, float(block.max()))
        yield block
    if size == 0:
        raise UserError(f"{path}: empty, it holds no samples; remove it or record it again")
    if size < file.least:
        raise UserError(f"{path}: truncated, {size} of {file.promised} samples could be read; copy it again")
    if least == most:
        raise UserError(f"{path}: silent, all its samples are equal; remove it or record it again")


def resampled(blocks: Iterable[Samples], rate: int) -> Iterator[Samples]:
    """Blocks of samples at `rate` Hz -> blocks at 16 kHz: together what SciPy's `resample_poly` makes of the whole.

    With p/q the ratio of the rates, output m is the filter's sum around input m q/p. A piece that starts at a multiple
    of q inputs therefore has its outputs on the same grid as the whole; given the filter's reach on both sides, its
    inner outputs are the same sums.
    """
    common = math.gcd(rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // common, rate // common
    if up == down:
        yield from blocks
        return
    taps = firwin(2 * _REACH * max(up, down) + 1, 1 / max(up, down), window=("kaiser", 5.0))
    margin = -(-_REACH * max(up, down) // (up * down)) + 1  # of inputs on each side, in multiples of `down`
    least = max(_BLOCK // 2, 4 * margin * down)
    held = np.empty(0)  # inputs not finished with: `before` multiples that only reach into the next outputs, then new
    before = 0
    for block in blocks:
        held = np.concatenate([held, block])
        if held.size < least + (before + margin) * down:
            continue
        ready = held.size // down - before - margin  # multiples of `down` whose outputs have all their inputs
        made = resample_poly(held, up, down, window=taps)
        yield made[before * up : (before + ready) * up]
        kept = min(before + ready, margin)
        held = held[(before + ready - kept) * down :]
        before = kept
    if held.size:
        yield resample_poly(held, up, down, window=taps)[before * up :]
