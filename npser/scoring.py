"""A recording of any length -> the probabilities of each of its windows, in constant memory.

samples, block by block -> frames -> overlapping pieces of half a minute -> probabilities
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from npser.errors import UserError
from npser.features import BINS, FRAME, HOP, Standardisation, log_magnitude, padded, window_count
from npser.inference import window_probabilities
from npser.models import Model, load_model

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
    models: Sequence[Model], blocks: Iterable[NDArray[np.float32]], hop: int, piece: int | None = None
) -> Iterator[NDArray[np.float64]]:
    """Blocks of log magnitudes (frames, 128) of one recording -> probabilities (windows, K), piece by piece.

    Window n begins at frame n * hop. A recording shorter than a window is padded with the floor, as in training.
    models: one, or several of the same architecture, whose probabilities are averaged; piece: how many windows are
    scored at once.
    """
    length = models[0].input_frames
    for model in models:
        require_readable(model)
    piece = piece or max(PIECE // hop, 1)
    needed = length + (piece - 1) * hop  # frames that `piece` windows span
    held = np.empty((0, BINS), np.float32)
    begun, ahead = False, 0  # ahead: frames to come that no window reads, when hop exceeds the window
    for block in blocks:
        dropped = min(ahead, len(block))
        ahead -= dropped
        held = np.concatenate([held, block[dropped:]])
        while len(held) >= needed:
            yield _scored(models, held[:needed], hop)
            begun = True
            ahead += max(piece * hop - len(held), 0)
            held = held[piece * hop :]
    if not begun:
        held = padded(held, length)
    if len(held) >= length:
        yield _scored(models, held, hop)


def _scored(models: Sequence[Model], frames: NDArray[np.float32], hop: int) -> NDArray[np.float64]:
    """Probabilities (windows, K) of all whole windows of log magnitudes (N, 128), `hop` frames apart."""
    starts = hop * np.arange(window_count(len(frames), models[0].input_frames, hop))
    said = [window_probabilities(model, [(standardisation(model).apply(frames), starts)]) for model in models]
    mean: NDArray[np.float64] = np.mean(said, axis=0, dtype=np.float64)
    return mean


def load_together(paths: Sequence[Path], backend: str, require: Callable[[Model], object]) -> list[Model]:
    """The models of these files, the first as it was named, the others by --with: one kind, whose votes are averaged.

    UserError, naming the file, for one that is named twice, is of another kind, or that `require` refuses.
    """
    models: list[Model] = []
    for number, path in enumerate(paths):
        if path.resolve() in [earlier.resolve() for earlier in paths[:number]]:
            raise UserError(f"--with {path}: this model is there already")
        model = load_model(path, backend)
        try:
            require(model)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        first = models[0] if models else model
        if (model.arch, model.labels, model.input_frames) != (first.arch, first.labels, first.input_frames):
            raise UserError(
                f"--with {path}: {_kind(model)}, but {paths[0]} is {_kind(first)}: "
                "only models of one kind decide together"
            )
        models.append(model)
    return models


def _kind(model: Model) -> str:
    return f"{model.arch} for {', '.join(model.labels)} in windows of {model.input_frames} frames"


def require_readable(model: Model) -> None:
    """UserError for a model that cannot score recordings."""
    standardisation(model)
    if model.settings["bins"] != BINS:
        raise UserError(f"the model reads spectra of {model.settings['bins']} bins, recordings give {BINS}")


def standardisation(model: Model) -> Standardisation:
    """The model's statistics; UserError for a model that was saved without."""
    if model.scale is None:
        raise UserError("the model holds no feature statistics: make it with python -m npser.train --cv none --save")
    return model.scale
