"""Samples -> frames of log magnitudes -> standardised windows (paper, section on the input; the rest our choice).

A recording at 16 kHz becomes one row of 128 numbers every 8 ms: the log magnitudes of the lower 128 of the 129 bins of
a 256-point short-time Fourier transform (periodic Hann window, 50 % overlap, no centring). Networks read windows of
`length` consecutive rows, starting every `hop` rows; a recording shorter than one window is padded with the floor.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from kernels import host
from kernels.reference import Array
from npser.audio import FRAME as FRAME

HOP = 128  # samples: 8 ms at 16 kHz; FRAME has 16 ms
BINS = 128
FLOOR = 1e-3  # smallest magnitude, for samples in [-1, 1]: 16-bit quantisation noise lies at about 1e-4 per bin
LOG_FLOOR = float(np.log(FLOOR))


def transforming(backend: str) -> str:
    """The rung that makes the frames for a backend: the GPU has no Fourier transform, and gets those of the cpu."""
    return "cpu" if backend == "cuda" else backend


def magnitude(k: ModuleType, samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mono samples (N,) at 16 kHz -> magnitudes (frames, 128); k is the rung of `kernels` that computes."""
    spectra: NDArray[np.float32] = k.stft_magnitude_forward(samples, FRAME, HOP)[0]
    return spectra[:, :BINS]


def log_magnitude(k: ModuleType, samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """The natural logarithm of the magnitudes, of FLOOR where they are smaller; arguments as of `magnitude`."""
    return np.log(np.maximum(magnitude(k, samples), np.float32(FLOOR)))


def _sum_of_rows(parts: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The sum of the rows of all parts, each (rows, columns), in their order: (columns,)."""
    total: NDArray[np.float64] | None = None
    for part in parts:
        total = np.add.reduce(part if total is None else np.concatenate([total[None], part]))
    assert total is not None
    return total


@dataclass(frozen=True)
class Standardisation:
    """Mean and standard deviation of the training frames, of each bin or of all bins: x -> (x - mean) / deviation."""

    mean: NDArray[np.float32]  # (128,)
    deviation: NDArray[np.float32]  # (128,)

    @classmethod
    def of(cls, frames: Sequence[NDArray[np.float32]], kind: str = "bin") -> "Standardisation":
        """The statistics of all frames of some utterances, each (frames, 128); only training utterances belong here.

        kind: "bin", every bin has its own, or "global", all bins have the same.
        """
        count = sum(map(len, frames))
        if kind == "global":
            bins = frames[0].shape[1]
            mean = np.full(bins, sum(f.sum(dtype=np.float64) for f in frames) / (count * bins))
            squares = sum(np.square(f - mean, dtype=np.float64).sum() for f in frames)
            deviation = np.full(bins, np.sqrt(squares / (count * bins)))
        else:  # row after row, whatever the utterances' lengths
            mean = _sum_of_rows(frame.astype(np.float64) for frame in frames) / count
            deviation = np.sqrt(_sum_of_rows(np.square(frame - mean) for frame in frames) / count)
        # A bin that never moves must not be blown up.
        return cls(mean.astype(np.float32), np.maximum(deviation, 1e-3).astype(np.float32))

    def apply(self, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        return (frames - self.mean) / self.deviation


class Windows:
    """Where the windows of some utterances lie.

    `owner` (windows,) is the position of each window's utterance in the list given; `start` (windows,) its first frame
    there. The frames of all utterances behind each other, each utterance's begin in row `first` (utterances,), and
    `rows` (windows,) is the place of a window's first frame.
    """

    def __init__(self, lengths: Sequence[int], length: int, hop: int) -> None:
        """lengths: the frames of each utterance; one that is shorter than a window counts as one."""
        self.length = length
        padded = np.maximum(np.array(lengths), length)
        counts = [window_count(n, length, hop) for n in padded]
        self.owner = np.repeat(np.arange(len(counts)), counts)
        self.start = np.concatenate([hop * np.arange(count) for count in counts])
        self.first = np.cumsum(padded) - padded
        self.rows = self.first[self.owner] + self.start

    def __len__(self) -> int:
        return len(self.owner)

    def epoch(self, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        """What is trained on in an epoch: frames of all utterances, and the row at which each window begins."""
        raise NotImplementedError


class WindowSet(Windows):
    """All windows of some utterances, cut out of their frames when a batch is asked for.

    `everything` (frames, 128) holds the standardised frames of all utterances.
    """

    def __init__(
        self, utterances: Sequence[NDArray[np.float32]], scale: Standardisation, length: int, hop: int
    ) -> None:
        super().__init__([len(frames) for frames in utterances], length, hop)
        self.everything = np.concatenate([scale.apply(padded(frames, length)) for frames in utterances])

    def batch(self, which: NDArray[np.intp]) -> Array:
        """The windows with these numbers: (len(which), length, 128) float32."""
        return host.take_windows(self.everything, self.rows[which], self.length)

    def epoch(self, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        return self.everything, self.rows

    def recordings(self) -> Iterator[tuple[Array, NDArray[np.intp]]]:
        """Each utterance's standardised frames (N, 128), and where its windows begin among them."""
        ends = np.cumsum(np.bincount(self.owner))[:-1]
        yield from zip(np.split(self.everything, self.first[1:]), np.split(self.start, ends), strict=True)


def window_count(frames: int, length: int, hop: int) -> int:
    """How many windows of `length` frames, `hop` apart, an utterance of so many frames gives: at least one."""
    return 1 + max(frames - length, 0) // hop


def padded(frames: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """frames, followed by silence up to `length` rows if there are fewer."""
    missing = max(length - len(frames), 0)
    return np.pad(frames, ((0, missing), (0, 0)), constant_values=LOG_FLOOR)
