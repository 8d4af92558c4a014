"""The arrays of the reference and of the cpu: NumPy's own. `kernels.cuda.arrays` offers the same for the GPU.

A network keeps its parameters, and whatever passes between layers, as arrays of its rung: `kernels.arrays(k)` is the
module with these functions. Operations that only move numbers are here, because both rungs move them alike.

| what                         | function                                                                    |
| ---------------------------- | --------------------------------------------------------------------------- |
| into a rung and out of it    | asarray(values, dtype), asnumpy(x), zeros_like(x), assign(x, values)        |
| windows of many utterances   | take_windows(frames, starts, length)                                        |
| overlapping windows of one   | windows_forward(x, frames, hop, count), windows_backward(dy, total, hop)    |
| rows of several samples      | take_rows(z, place), add_rows(dz, place, count)                             |
| what a recurrence ends with  | last_step_forward(x), last_step_backward(dy, T)                             |
| what it had a step before    | step_before(h)                                                              |
| clipping                     | shortened(gradients, longest)                                               |
| loss and accuracy so far     | diverged(loss), Tally                                                       |
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kernels.reference import Array

WAITS = False
"""Whether reading a result (`Tally.read`) waits for work that is still under way."""


def asarray(values: NDArray[Any], dtype: DTypeLike | None = None) -> Array:
    """The values as this rung keeps them: contiguous."""
    return np.ascontiguousarray(values, dtype)


def asnumpy(x: Array) -> NDArray[Any]:
    """The values as a NumPy array; here the array itself."""
    return x


def zeros_like(x: Array) -> Array:
    return np.zeros_like(x)


def assign(x: Array, values: NDArray[Any]) -> None:
    """Put NumPy values of the same shape into x."""
    x[...] = values


def take_windows(frames: Array, starts: NDArray[Any], length: int) -> Array:
    """frames (N, F), starts (B,) -> (B, length, F): `length` rows from each start on."""
    out = np.empty((len(starts), length, frames.shape[1]), frames.dtype)
    for row, start in zip(out, starts, strict=True):
        row[...] = frames[start : start + length]
    return out


def windows_forward(x: Array, frames: int, hop: int, count: int) -> Array:
    """(B, frames + (count-1)*hop, F) -> (B, count, frames, F): overlapping windows of each sample."""
    return np.stack([x[:, hop * i : hop * i + frames] for i in range(count)], axis=1)


def windows_backward(dy: Array, total: int, hop: int) -> Array:
    """dy (B, count, frames, F) -> dx (B, total, F): where windows overlap, their gradients add up."""
    B, count, frames, F = dy.shape
    dx = np.zeros((B, total, F), dy.dtype)
    for i in range(count):
        dx[:, hop * i : hop * i + frames] += dy[:, i]
    return dx


def take_rows(z: Array, place: NDArray[Any]) -> Array:
    """z (D, N), place (B, T) -> (B, T, N): the row that every step of every sample reads."""
    return z[place]


def add_rows(dz: Array, place: NDArray[Any], count: int) -> Array:
    """dz (B*T, N), place (B, T) -> (count, N): to every row, in order, what the steps that read it send back."""
    rows = np.zeros((count, dz.shape[1]), dz.dtype)
    for row, gradient in zip(place.ravel(), dz, strict=True):
        rows[row] += gradient
    return rows


def last_step_forward(x: Array) -> Array:
    """(B, T, H) -> (B, H): the last step."""
    return np.ascontiguousarray(x[:, -1])


def last_step_backward(dy: Array, T: int) -> Array:
    """(B, H) -> (B, T, H): zeros but for the last step."""
    dx = np.zeros((len(dy), T, dy.shape[1]), dy.dtype)
    dx[:, -1] = dy
    return dx


def step_before(h: Array) -> Array:
    """(B, T, H) -> (B, T, H): h_{t-1} at step t; zeros at the first."""
    before = np.zeros_like(h)
    before[:, 1:] = h[:, :-1]
    return before


def shortened(gradients: Sequence[Array], longest: float) -> list[Array]:
    """The gradients, scaled down together where their common Euclidean norm exceeds `longest`."""
    norm = np.sqrt(sum(float(np.vdot(dw, dw)) for dw in gradients))
    if np.isinf(norm):  # of squares beyond float32
        norm = np.sqrt(sum(float(np.square(dw, dtype=np.float64).sum()) for dw in gradients))
    scale = min(1.0, longest / norm) if norm > 0 else 1.0
    return [dw * dw.dtype.type(scale) for dw in gradients]


def diverged(loss: float) -> bool:
    """Whether the loss is known not to be finite."""
    return not np.isfinite(loss)


class Tally:
    """Adds up the losses and the right answers of many batches."""

    def __init__(self) -> None:
        self.loss, self.right = 0.0, 0

    def add(self, loss: float, p: Array, targets: NDArray[Any]) -> None:
        """One more batch: its mean loss, probabilities (B, K) and targets (B,)."""
        self.loss += loss * len(targets)
        self.right += int((p.argmax(axis=1) == targets).sum())

    def read(self) -> tuple[float, int]:
        """(sum of the samples' losses, number of right answers) so far."""
        return self.loss, self.right
