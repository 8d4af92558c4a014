"""3x3 convolution on the CPU, channels last, alone and with bias, ReLU and 2x2 max-pooling in one pass.

Floor for a batch of B images, C -> O channels: 2*9*B*T*F*C*O operations. A tile of 2x2 pooling cells times 2 vectors of
output channels stays in registers across all taps and input channels, so that the arithmetic units are the limit, and
bias, ReLU, pooling and argmax happen on those registers: the T x F x O map before pooling never exists in memory.
With one input channel a tile has 9 products to hide its pooling behind, and comes to 54 % of the peak at batch 32, 58 %
at 128 (1->32, 128x128).

All kernels read strips (`kernels.cpu.strips`), and output channels are padded with zeros to whole vectors. Images with
whole vectors of channels are left to `kernels.cpu.winograd`, which multiplies less. The backward pass is in
conv_gradients.py.
"""

from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from kernels.cpu import winograd
from kernels.cpu.pool import store_pooled
from kernels.cpu.simd import LANES, REGISTERS, Bytes, Emitter, Int, Ptr, kernel
from kernels.cpu.strips import BAND, fill_strip, new_strips, rows_of
from kernels.cpu.tools import Array, as_float32, check_shapes, compiled, round_up, thread_id

OUT_VECS = 2  # vectors of output channels in a forward tile
OUT_GROUP = OUT_VECS * LANES
CELLS = 2 if REGISTERS == 32 else 1  # 2x2 cells side by side in a forward tile: 4 * CELLS * OUT_VECS accumulators
TAPS = [(i, j) for i in range(3) for j in range(3)]


# --- forward -----------------------------------------------------------------------------------------------------


def _convolve_cells(
    k: Emitter, cells: int, strip: Ptr, row: Int, w: Ptr, bias: Ptr, channels: Int
) -> list[list[list[Any]]]:
    """Accumulators [row 0..1][column 0..2*cells-1][vector] = bias + sum over channels and taps of x * w."""
    biases = [k.load(bias + LANES * v) for v in range(OUT_VECS)]
    acc = [[[k.var(b) for b in biases] for _ in range(2 * cells)] for _ in range(2)]
    for c in k.range(channels):
        for tap, (i, j) in enumerate(TAPS):
            ws = [k.load(w + c * (9 * OUT_GROUP) + (tap * OUT_GROUP + LANES * v)) for v in range(OUT_VECS)]
            for r in range(2):
                for q in range(2 * cells):
                    x = k.splat(strip + row * (r + i) + channels * (q + j) + c)
                    for v in range(OUT_VECS):
                        acc[r][q][v] += x * ws[v]
    return acc


def _pooling_tile(cells: int) -> Any:
    @kernel
    def tile(
        k: Emitter, strip: Ptr, row: Int, w: Ptr, bias: Ptr, channels: Int, y: Ptr, argmax: Bytes, cell: Int
    ) -> None:
        """cells x OUT_GROUP values of y and argmax; cell = distance between neighbouring cells in both."""
        acc = _convolve_cells(k, cells, strip, row, w, bias, channels)
        for q in range(cells):
            for v in range(OUT_VECS):
                pixels = [acc[r][2 * q + s][v].get() for r in range(2) for s in range(2)]
                store_pooled(k, pixels, y + cell * q + LANES * v, argmax + cell * q + LANES * v)

    return tile


def _plain_tile(cells: int) -> Any:
    @kernel
    def tile(
        k: Emitter, strip: Ptr, row: Int, w: Ptr, bias: Ptr, channels: Int, y: Ptr, y_row: Int, y_column: Int
    ) -> None:
        """2 rows x 2*cells columns x OUT_GROUP values of y."""
        acc = _convolve_cells(k, cells, strip, row, w, bias, channels)
        for r in range(2):
            for q in range(2 * cells):
                for v in range(OUT_VECS):
                    k.store(y + y_row * r + y_column * q + LANES * v, acc[r][q][v])

    return tile


pool_wide, pool_one = _pooling_tile(CELLS), _pooling_tile(1)
conv_wide, conv_one = _plain_tile(CELLS), _plain_tile(1)


@compiled(parallel=True)
def _conv_relu_pool(
    x: Array, C: int, w: Array, bias: Array, strips: Array, y: Array, argmax: NDArray[np.uint8]
) -> None:
    """x (B, T, F*C), w (O/OUT_GROUP, C, 9, OUT_GROUP) -> y, argmax (B, P, Q, O).

    Scratch: strips (threads, rows, (F+2+F%2)*C).
    """
    P, Q, O = y.shape[1:]
    row = strips.shape[2]
    bands = -(-P // BAND)
    for task in nb.prange(y.shape[0] * bands):
        n, first = task // bands, task % bands * BAND
        last = min(P, first + BAND)
        strip = strips[thread_id()]
        fill_strip(x, C, n, first, 2 * (last - first) + 2, strip)
        for p in range(first, last):
            for o in range(0, O, OUT_GROUP):
                ws, bs = w.ctypes.data + 4 * o * C * 9, bias.ctypes.data + 4 * o
                at, out = strip.ctypes.data + 4 * 2 * (p - first) * row, (n * P + p) * Q * O + o
                for q in range(0, Q - CELLS + 1, CELLS):
                    to = out + q * O
                    pool_wide(at + 8 * q * C, row, ws, bs, C, y.ctypes.data + 4 * to, argmax.ctypes.data + to, O)
                for q in range(Q // CELLS * CELLS, Q):
                    to = out + q * O
                    pool_one(at + 8 * q * C, row, ws, bs, C, y.ctypes.data + 4 * to, argmax.ctypes.data + to, O)


@compiled(parallel=True)
def _conv3x3(x: Array, C: int, w: Array, bias: Array, strips: Array, y: Array) -> None:
    """x (B, T, F*C), w as in `_conv_relu_pool` -> y (B, 2P, 2Q, O), T and F rounded up to even."""
    P, Q, O = y.shape[1] // 2, y.shape[2] // 2, y.shape[3]
    row = strips.shape[2]
    bands = -(-P // BAND)
    for task in nb.prange(y.shape[0] * bands):
        n, first = task // bands, task % bands * BAND
        last = min(P, first + BAND)
        strip = strips[thread_id()]
        fill_strip(x, C, n, first, 2 * (last - first) + 2, strip)
        for p in range(first, last):
            for o in range(0, O, OUT_GROUP):
                ws, bs = w.ctypes.data + 4 * o * C * 9, bias.ctypes.data + 4 * o
                at = strip.ctypes.data + 4 * 2 * (p - first) * row
                out = y.ctypes.data + 4 * ((n * P + p) * 2 * (2 * Q) * O + o)
                for q in range(0, Q - CELLS + 1, CELLS):
                    conv_wide(at + 8 * q * C, row, ws, bs, C, out + 8 * q * O, 2 * Q * O, O)
                for q in range(Q // CELLS * CELLS, Q):
                    conv_one(at + 8 * q * C, row, ws, bs, C, out + 8 * q * O, 2 * Q * O, O)


def _pack(w: Array, b: Array) -> tuple[Array, Array]:
    """(3, 3, C, O), (O,) -> (O/OUT_GROUP, C, 9, OUT_GROUP) in the order of use, and b, O padded to whole groups."""
    C, O = w.shape[2:]
    groups = -(-O // OUT_GROUP)
    padded = np.zeros((9, C, groups * OUT_GROUP), np.float32)
    padded[..., :O] = w.reshape(9, C, O)
    bias = np.zeros(groups * OUT_GROUP, np.float32)
    bias[:O] = b
    return np.ascontiguousarray(padded.reshape(9, C, groups, OUT_GROUP).transpose(2, 1, 0, 3)), bias


def conv3x3_forward(x: Array, w: Array, b: Array) -> Array:
    """See `kernels.reference.conv3x3_forward`."""
    x, w, b = as_float32(x=x, w=w, b=b)
    B, T, F, C = x.shape
    O = w.shape[3]
    check_shapes(w=(w, (3, 3, C, O)), b=(b, (O,)))
    if winograd.pays(C):
        return winograd.conv3x3_forward(x, w, b)
    packed, bias = _pack(w, b)
    y = np.empty((B, round_up(T, 2), round_up(F, 2), len(bias)), np.float32)
    _conv3x3(rows_of(x), C, packed, bias, new_strips(nb.get_num_threads(), F, C), y)
    return np.ascontiguousarray(y[:, :T, :F, :O])


def conv_relu_pool_forward(x: Array, w: Array, b: Array) -> tuple[Array, NDArray[np.uint8]]:
    """See `kernels.reference.conv_relu_pool_forward`."""
    x, w, b = as_float32(x=x, w=w, b=b)
    B, T, F, C = x.shape
    O = w.shape[3]
    check_shapes(w=(w, (3, 3, C, O)), b=(b, (O,)))
    if winograd.pays(C):
        return winograd.conv_relu_pool_forward(x, w, b)
    packed, bias = _pack(w, b)
    y = np.empty((B, T // 2, F // 2, len(bias)), np.float32)
    argmax = np.empty(y.shape, np.uint8)
    _conv_relu_pool(rows_of(x), C, packed, bias, new_strips(nb.get_num_threads(), F, C), y, argmax)
    return np.ascontiguousarray(y[..., :O]), np.ascontiguousarray(argmax[..., :O])
