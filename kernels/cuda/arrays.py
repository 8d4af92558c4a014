"""The GPU's arrays: the functions of `kernels.host`, with everything on the device. See there for what they do."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kernels.cuda import device
from kernels.cuda.device import (
    SIMULATED,
    THREADS,
    Array,
    D,
    F,
    Flat,
    I,
    N,
    asnumpy,
    blocks_for,
    check,
    cuda,
    empty,
    float32,
    float64,
    kernel,
)

__all__ = [
    "WAITS", "Tally", "add_rows", "asarray", "asnumpy", "assign", "diverged", "last_step_backward",
    "last_step_forward", "shortened", "step_before", "take_rows", "take_windows", "windows_backward",
    "windows_forward", "zeros_like",
]  # fmt: skip

WAITS = True
NORM_BLOCKS = 2 if SIMULATED else 64  # that each add up a share of a gradient's squares


# --- kernels -----------------------------------------------------------------------------------------------------


@kernel((F, I))
def _clear(x: Flat, n: int) -> None:
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        x[e] = float32(0)


@kernel((F, N, F, I, I, I))
def _take_windows(frames: Flat, starts: Flat, out: Flat, n: int, length: int, F: int) -> None:
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        out[e] = frames[starts[e // (length * F)] * F + e % (length * F)]


@kernel((F, N, F, I, I))
def _take_rows(z: Flat, place: Flat, out: Flat, n: int, width: int) -> None:
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        out[e] = z[place[e // width] * width + e % width]


@kernel((F, N, F, I, I, I))
def _add_rows(dz: Flat, place: Flat, rows: Flat, n: int, steps: int, width: int) -> None:
    """Every number of the result looks through all steps, in order: no two threads add to the same place."""
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        value = float32(0)
        for i in range(steps):
            if place[i] == e // width:
                value += dz[i * width + e % width]
        rows[e] = value


@kernel((F, F, I, I, I, I, I, I))
def _windows(x: Flat, y: Flat, n: int, count: int, frames: int, hop: int, total: int, F: int) -> None:
    """x (B, total, F), y (B, count, frames, F), n numbers."""
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        window = e // (frames * F)
        y[e] = x[(window // count * total + window % count * hop) * F + e % (frames * F)]


@kernel((F, F, I, I, I, I, I, I))
def _windows_backward(dy: Flat, dx: Flat, n: int, count: int, frames: int, hop: int, total: int, F: int) -> None:
    """dx (B, total, F), n numbers: every window that holds the frame hands its gradient on, in order."""
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        f, t, b = e % F, e // F % total, e // F // total
        value = float32(0)
        for i in range(count):
            if t >= hop * i and t < hop * i + frames:
                value += dy[((b * count + i) * frames + t - hop * i) * F + f]
        dx[e] = value


@kernel((F, F, I, I, I))
def _last_step(x: Flat, y: Flat, n: int, T: int, H: int) -> None:
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        y[e] = x[(e // H * T + T - 1) * H + e % H]


@kernel((F, F, I, I, I))
def _last_step_backward(dy: Flat, dx: Flat, n: int, T: int, H: int) -> None:
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        dx[e] = dy[e // (T * H) * H + e % H] if e // H % T == T - 1 else float32(0)


@kernel((F, F, I, I, I))
def _step_before(h: Flat, before: Flat, n: int, T: int, H: int) -> None:
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        before[e] = h[e - H] if e // H % T > 0 else float32(0)


@kernel((F, I, D, I))
def _squares(x: Flat, n: int, sums: Flat, first: int) -> None:
    """sums[first + block] = the squares of a block's share of x."""
    collected = cuda.shared.array(THREADS, float64)
    t = cuda.threadIdx.x
    total = float64(0)
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        total += float64(x[e]) * float64(x[e])
    collected[t] = total
    cuda.syncthreads()
    if t == 0:
        for other in range(1, THREADS):
            total += collected[other]
        sums[first + cuda.blockIdx.x] = total


@kernel((D, I, D, F))
def _scale(sums: Flat, n: int, longest: Flat, scale: Flat) -> None:
    """scale = min(1, longest / norm), the norm being the root of all sums; longest comes as an array of one."""
    if cuda.grid(1) == 0:
        total = float64(0)
        for i in range(n):
            total += sums[i]
        scale[0] = float32(1)
        if total > longest[0] * longest[0]:
            scale[0] = float32(longest[0] / math.sqrt(total))


@kernel((F, F, I))
def _multiply(x: Flat, scale: Flat, n: int) -> None:
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        x[e] *= scale[0]


@kernel((D, F, F, N, I, I))
def _tally(tally: Flat, loss: Flat, p: Flat, targets: Flat, B: int, K: int) -> None:
    """One block. tally: the sum of the losses, and the number of right answers."""
    collected = cuda.shared.array(THREADS, float32)
    t = cuda.threadIdx.x
    right = float32(0)
    for n in range(t, B, THREADS):
        best = 0
        for k in range(1, K):
            if p[n * K + k] > p[n * K + best]:
                best = k
        if best == targets[n]:
            right += float32(1)
    collected[t] = right
    cuda.syncthreads()
    if t == 0:
        for other in range(1, THREADS):
            right += collected[other]
        tally[0] += float64(loss[0]) * float64(B)
        tally[1] += float64(right)


# --- functions ---------------------------------------------------------------------------------------------------


def asarray(values: Array | NDArray[Any], dtype: DTypeLike | None = None) -> Array:
    """The values on the device, reals as float32, whole numbers as int32."""
    return device.asarray(values)


def zeros_like(x: Array) -> Array:
    zeros = empty(x.shape)
    _clear(blocks_for(x.size), zeros, x.size)
    return zeros


def assign(x: Array, values: NDArray[Any]) -> None:
    host = np.ascontiguousarray(values, x.dtype).reshape(-1)
    x.flat.copy_to_device(host, stream=device.stream())
    device.synchronise()  # the copy may still be reading `host`, which ends here


def take_windows(frames: Array, starts: Array, length: int) -> Array:
    B, F = len(starts), frames.shape[1]
    check(frames=(frames, frames.shape, np.float32), starts=(starts, (B,), np.int32))
    out = empty((B, length, F))
    _take_windows(blocks_for(out.size), frames, starts, out, out.size, length, F)
    return out


def windows_forward(x: Array, frames: int, hop: int, count: int) -> Array:
    B, total, F = x.shape
    check(x=(x, (B, frames + (count - 1) * hop, F), np.float32))
    y = empty((B, count, frames, F))
    _windows(blocks_for(y.size), x, y, y.size, count, frames, hop, total, F)
    return y


def windows_backward(dy: Array, total: int, hop: int) -> Array:
    B, count, frames, F = dy.shape
    check(dy=(dy, dy.shape, np.float32))
    dx = empty((B, total, F))
    _windows_backward(blocks_for(dx.size), dy, dx, dx.size, count, frames, hop, total, F)
    return dx


def take_rows(z: Array, place: Array) -> Array:
    (D, width), (B, T) = z.shape, place.shape
    check(z=(z, (D, width), np.float32), place=(place, (B, T), np.int32))
    out = empty((B, T, width))
    _take_rows(blocks_for(out.size), z, place, out, out.size, width)
    return out


def add_rows(dz: Array, place: Array, count: int) -> Array:
    B, T = place.shape
    width = dz.shape[1]
    check(dz=(dz, (B * T, width), np.float32), place=(place, (B, T), np.int32))
    rows = empty((count, width))
    _add_rows(blocks_for(rows.size), dz, place, rows, rows.size, B * T, width)
    return rows


def last_step_forward(x: Array) -> Array:
    B, T, H = x.shape
    check(x=(x, (B, T, H), np.float32))
    y = empty((B, H))
    _last_step(blocks_for(y.size), x, y, y.size, T, H)
    return y


def last_step_backward(dy: Array, T: int) -> Array:
    B, H = dy.shape
    check(dy=(dy, (B, H), np.float32))
    dx = empty((B, T, H))
    _last_step_backward(blocks_for(dx.size), dy, dx, dx.size, T, H)
    return dx


def step_before(h: Array) -> Array:
    _, T, H = h.shape
    check(h=(h, h.shape, np.float32))
    before = empty(h.shape)
    _step_before(blocks_for(h.size), h, before, h.size, T, H)
    return before


def shortened(gradients: Sequence[Array], longest: float) -> list[Array]:
    """Changes the gradients themselves; the norm is not asked for, so nothing waits."""
    sums, scale = empty((len(gradients) * NORM_BLOCKS,), np.float64), empty((1,))
    for i, dw in enumerate(gradients):
        _squares(NORM_BLOCKS, dw, dw.size, sums, i * NORM_BLOCKS)
    _scale(1, sums, sums.size, _constant(longest), scale)
    for dw in gradients:
        _multiply(blocks_for(dw.size), dw, scale, dw.size)
    return list(gradients)


def _constant(value: float) -> Array:
    """A float64 on the device, copied there once."""
    if value not in _constants:
        _constants[value] = empty((1,), np.float64)
        assign(_constants[value], np.array([value]))
    return _constants[value]


_constants: dict[float, Array] = {}


def diverged(loss: Array) -> bool:
    """Never known here without waiting: a loss that is not finite shows when the tally is read."""
    return False


class Tally:
    """The sums are on the device: `add` waits for nothing, `read` for everything launched."""

    def __init__(self) -> None:
        self.sums = empty((2,), np.float64)
        assign(self.sums, np.zeros(2))

    def add(self, loss: Array, p: Array, targets: Array) -> None:
        B, K = p.shape
        _tally(1, self.sums, loss, p, targets, B, K)

    def read(self) -> tuple[float, int]:
        loss, right = asnumpy(self.sums)
        return float(loss), int(right)
