"""Networks on recordings: the windows of one recording overlap, and what they have in common is computed once.

A window's answer is that of `Model.predict_proba`, within rounding, but

- the convolution blocks run over the whole recording, where the windows begin a multiple of 4 frames apart: two
  poolings make 4 frames one row, so that the maps of two windows are slices of one map. Only the first and the last
  row of a window differ, because the window ends in zeros there; they are computed from its outer 8 frames;
- what an input adds to the gates of the first LSTM layer is computed once for each frame (lstm) or each window of 128
  frames (tdcnn, where one window is part of up to four samples).

At a segment hop of 8 frames a window of cnn needs a fifth of the convolutions (its dense layer remains), and a sample
of tdcnn a quarter of everything. Dropout is off, so nothing but rounding tells the two ways apart.

On a GPU nothing is shared: windows are cut out of the recordings there, and computed each on its own.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kernels import host
from kernels.reference import Array
from npser.layers import LSTM, Layer, Sequential, TimeDistributed
from npser.models import Model

TOGETHER = 256  # windows whose features are in memory at once: 34 MB at the paper's sizes
ROW = 4  # frames in a row of the map behind both poolings
EDGE = 8  # frames that decide the outermost row of a window

Indices = NDArray[np.intp]


Recording = tuple[Array, Indices]  # standardised frames (N, bins), and where windows begin among them (W,)


def window_probabilities(model: Model, recordings: Iterable[Recording]) -> Array:
    """Class probabilities (windows, K) of all windows of some recordings, in their order."""
    groups = _groups(_pieces(recordings, model.input_frames))
    if model.arrays is not host:
        return np.concatenate([_each_on_its_own(model, group) for group in groups])
    return model.k.softmax(np.concatenate([_NETWORKS[model.arch](model, group) for group in groups]))


def _groups(pieces: Iterable[Recording]) -> Iterator[list[Recording]]:
    """The pieces, as many at a time as together have TOGETHER windows or more."""
    group, count = [], 0
    for piece in pieces:
        group.append(piece)
        count += len(piece[1])
        if count >= TOGETHER:
            yield group
            group, count = [], 0
    if group:
        yield group


def _pieces(recordings: Iterable[Recording], length: int) -> Iterator[Recording]:
    """The recordings, long ones cut so that no piece has more than TOGETHER windows."""
    for frames, starts in recordings:
        for at in range(0, len(starts), TOGETHER):
            part = starts[at : at + TOGETHER]
            yield frames[part[0] : part[-1] + length], part - part[0]


def _joined(group: Sequence[Recording]) -> Recording:
    """The recordings as one: their frames one after the other, and where windows begin among those."""
    before = np.cumsum([0] + [len(frames) for frames, _ in group])
    starts = np.concatenate([starts + offset for (_, starts), offset in zip(group, before, strict=False)])
    return np.concatenate([frames for frames, _ in group]), starts


def _each_on_its_own(model: Model, group: Sequence[Recording]) -> Array:
    """The probabilities (windows, K) where arrays are on a GPU."""
    frames, starts = map(model.arrays.asarray, _joined(group))
    return model.predict_proba(model.arrays.take_windows(frames, starts, model.input_frames))


# --- the three networks ------------------------------------------------------------------------------------------


def _cnn(model: Model, group: Sequence[Recording]) -> Array:
    convolutions, *rest = model.layers.layers
    x = [_features(convolutions, frames, starts, model.input_frames) for frames, starts in group]
    return Sequential(rest).infer(_stacked(x))


def _lstm(model: Model, group: Sequence[Recording]) -> Array:
    first, *rest = model.layers.layers
    assert isinstance(first, LSTM)
    frames, starts = _joined(group)
    z = first.project(frames)
    return Sequential(rest).infer(first.recur(z[starts[:, None] + np.arange(model.input_frames)]))


def _tdcnn(model: Model, group: Sequence[Recording]) -> Array:
    _, blocks, first, *rest = model.layers.layers
    assert isinstance(blocks, TimeDistributed)
    assert isinstance(first, LSTM)
    length = model.settings["bins"]
    x, places, before = [], [], 0
    for frames, starts in group:
        distinct, place = model.distinct_windows(starts)
        x.append(_features(blocks.layer, frames, distinct, length))
        places.append(place + before)
        before += len(distinct)
    z = first.project(_stacked(x))
    return Sequential(rest).infer(first.recur(z[np.concatenate(places)]))


_NETWORKS = {"cnn": _cnn, "lstm": _lstm, "tdcnn": _tdcnn}


def _stacked(x: Sequence[Array]) -> Array:
    """The features of all recordings; those of a single long one, which are large, are not copied."""
    return x[0] if len(x) == 1 else np.concatenate(x)


# --- convolutions that windows share -----------------------------------------------------------------------------


def _features(convolutions: Layer, frames: Array, starts: Indices, length: int) -> Array:
    """The output of the convolution blocks for each window of `length` frames: (N, bins), (W,) -> (W, features)."""
    if length % ROW or length < EDGE:
        return convolutions.infer(frames[starts[:, None] + np.arange(length)])
    rows = length // ROW
    x: Array | None = None
    for phase in np.unique(starts % ROW):
        which = np.flatnonzero(starts % ROW == phase)
        begins = starts[which]
        whole = frames[phase : begins[-1] + length]
        maps = convolutions.infer(whole[None]).reshape(len(whole) // ROW, -1)  # (rows of the piece, features)
        if x is None:
            x = np.empty((len(starts), rows, maps.shape[1]), maps.dtype)
        first, last = (
            convolutions.infer(frames[at[:, None] + np.arange(EDGE)]).reshape(len(at), EDGE // ROW, -1)
            for at in (begins, begins + length - EDGE)
        )
        for i, row in zip(which, (begins - phase) // ROW, strict=True):
            x[i] = maps[row : row + rows]
        x[which, 0], x[which, -1] = first[:, 0], last[:, -1]
    assert x is not None  # there is a window
    return x.reshape(len(starts), -1)
