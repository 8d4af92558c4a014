"""A recording of any length -> the probabilities of each of its windows, in constant memory.

samples, block by block -> frames -> overlapping pieces of half a minute -> probabilities
"""

from collections.abc import Iterable, Iterator
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from kernels.reference import Array
from npser.errors import UserError
from npser.features import BINS, FRAME, HOP, LOG_FLOOR, Standardisation, log_magnitude, window_count
from npser.inference import window_probabilities
from npser.models import Model

PIECE = 4096  # frames between the first windows of two pieces, about: half a minute


def frame_blocks(k: ModuleType, samples: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """Blocks of samples at 16 kHz -> blocks of log magnitudes (frames, 128): together those of the whole recording."""
    held = np.empty(0, np.float32)
    for block in samples:
        held = np.concatenate([held, block])
        if (frames := (len(held) - FRAME) // HOP + 1) > 0:
            yield log_magnitude(k, held[: (frames - 1) * HOP + FRAME])
            held = held[frames * HOP :]


def score(
    model: Model, blocks: Iterable[NDArray[np.float32]], hop: int, piece: int | None = None
) -> Iterator[NDArray[np.float32]]:
    """Blocks of log magnitudes (frames, 128) of one recording -> probabilities (windows, K), piece by piece.

    Window n begins at frame n * hop. A recording shorter than a window is padded with the floor, as in training.
    piece: how many windows are scored at once.
    """
    scale, length = standardisation(model), model.input_frames
    if model.settings["bins"] != BINS:
        raise UserError(f"the model reads spectra of {model.settings['bins']} bins, recordings give {BINS}")
    piece = piece or max(PIECE // hop, 1)
    needed = length + (piece - 1) * hop  # frames that `piece` windows span
    held = np.empty((0, BINS), np.float32)
    begun, ahead = False, 0  # ahead: frames to come that no window reads, when hop exceeds the window
    for block in blocks:
        dropped = min(ahead, len(block))
        ahead -= dropped
        held = np.concatenate([held, scale.apply(block[dropped:])])
        while len(held) >= needed:
            yield _scored(model, held[:needed], hop)
            begun = True
            ahead += max(piece * hop - len(held), 0)
            held = held[piece * hop :]
    if not begun and len(held) < length:
        silence = np.full((length - len(held), BINS), LOG_FLOOR, np.float32)
        held = np.concatenate([held, scale.apply(silence)])
    if len(held) >= length:
        yield _scored(model, held, hop)


def _scored(model: Model, frames: NDArray[np.float32], hop: int) -> Array:
    """Probabilities (windows, K) of all whole windows of standardised frames (N, 128), `hop` frames apart."""
    starts = hop * np.arange(window_count(len(frames), model.input_frames, hop))
    return window_probabilities(model, [(frames, starts)])


def standardisation(model: Model) -> Standardisation:
    """The model's statistics; UserError for a model that was saved without."""
    if model.scale is None:
        raise UserError("the model holds no feature statistics: make it with python -m npser.train --cv none --save")
    return model.scale
