"""3x3 convolution of images with many channels, by Winograd's F(2x2, 3x3): 16 products where the definition has 36.

A 4x4 patch d of one channel and a 3x3 filter g give the 2x2 pixels of one pooling cell. Both are transformed,
multiplied number by number and summed over the channels, and the sum is transformed back (Winograd 1980; Lavin and
Gray 2016):

    Y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A

    B^T = | 1  0 -1  0 |      G = |  1   0   0  |      A^T = | 1  1  1  0 |
          | 0  1  1  0 |          | 1/2 1/2 1/2 |            | 0  1 -1 -1 |
          | 0 -1  1  0 |          | 1/2-1/2 1/2 |
          | 0  1  0 -1 |          |  0   0   1  |

For each of the 16 places of a patch, the sum over the channels is a matrix product (cells, C) x (C, O) on the tile of
`kernels.cpu.matmul`; a row of cells goes through all three stages while its numbers are in the second-level cache.

Floor: 2*16*C*O operations for a cell, against 2*36*C*O. The transforms add 32 and 24 additions for each channel, which
have no multiplications to hide behind; with 32 channels they are a third of the time. It comes to 126 % of the peak at
batch 32 and 117 % at 128 (32->32, 64x64, pooled), counted as the definition's operations.

Accuracy: sums are shorter, so that with numbers of like size the error is smaller than the direct kernel's. But the
four pixels of a cell share it: it is bounded by the largest number in the 4x4 patch, not in the pixel's own 3x3 window,

    |error| <= 1e-6 * max |d| * sum |g|

and where a number is not finite, or a product overflows, what the definition has finite beside it in the cell may not
be, and may be NaN where the definition has an infinity. `NPSER_WINOGRAD=0` in the environment keeps to the direct
kernels.
"""

import os

import numba as nb
import numpy as np
from numpy.typing import NDArray

from kernels.cpu.matmul import COLUMNS, ROWS, add_product_of_rows
from kernels.cpu.pool import store_pooled
from kernels.cpu.simd import LANES, Bytes, Emitter, Int, Ptr, Vec, kernel
from kernels.cpu.strips import BAND, fill_strip, new_strips, rows_of
from kernels.cpu.tools import LINE, Array, compiled, round_up, scratch, thread_id

PLACES = 16  # of a 4x4 patch
APART = 3 * LINE // 4  # floats between the matrices of two places: at a multiple of 4 KB they would share cache sets


def pays(channels: int) -> bool:
    """Have images of so many channels enough of them, in whole vectors, for the transforms to pay?"""
    return channels % LANES == 0 and channels >= 16 and os.environ.get("NPSER_WINOGRAD") != "0"


# --- transforms ----------------------------------------------------------------------------------------------------


def _turned(rows: list[list[Vec]]) -> list[list[Vec]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _times_b(d: list[Vec]) -> list[Vec]:
    """B^T d of one column."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _times_a(m: list[Vec]) -> list[Vec]:
    """A^T m of one column."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


@kernel
def transform_cells(k: Emitter, strip: Ptr, row: Int, channels: Int, cells: Int, patches: Ptr, place: Int) -> None:
    """B^T d B of a row of cells: (cells, channels) for every place, `place` numbers from one to the next."""
    for q in k.range(cells):
        for c in k.range(channels >> (LANES.bit_length() - 1)):
            at = strip + channels * (q * 2) + c * LANES
            d = [[k.load(at + row * i + channels * j) for j in range(4)] for i in range(4)]
            d = [_times_b(line) for line in _turned([_times_b(column) for column in _turned(d)])]
            for i in range(4):
                for j in range(4):
                    k.store(patches + place * (4 * i + j) + channels * q + c * LANES, d[i][j])


def _pixels(k: Emitter, sums: Ptr, place: Int, bias: Ptr) -> list[Vec]:
    """The four pixels A^T m A + bias of a cell, for a vector of output channels."""
    m = [[k.load(sums + place * (4 * i + j)) for j in range(4)] for i in range(4)]
    y = [_times_a(line) for line in _turned([_times_a(column) for column in _turned(m)])]
    return [pixel + k.load(bias) for line in y for pixel in line]


@kernel
def pool_cells(k: Emitter, sums: Ptr, place: Int, outputs: Int, cells: Int, bias: Ptr, y: Ptr, argmax: Bytes) -> None:
    """y and argmax (cells, outputs) of a row of cells."""
    for q in k.range(cells):
        for o in k.range(outputs >> (LANES.bit_length() - 1)):
            at = outputs * q + o * LANES
            store_pooled(k, _pixels(k, sums + at, place, bias + o * LANES), y + at, argmax + at)


@kernel
def store_cells(k: Emitter, sums: Ptr, place: Int, outputs: Int, cells: Int, bias: Ptr, y: Ptr, y_row: Int) -> None:
    """y (2, 2*cells, outputs), y_row numbers from one row to the next."""
    for q in k.range(cells):
        for o in k.range(outputs >> (LANES.bit_length() - 1)):
            pixels = _pixels(k, sums + outputs * q + o * LANES, place, bias + o * LANES)
            for n, pixel in enumerate(pixels):
                k.store(y + y_row * (n // 2) + outputs * (q * 2 + n % 2) + o * LANES, pixel)


@compiled
def _transform_filters(w: Array, packed: Array) -> None:
    """packed (groups, PLACES, C, COLUMNS) = G g G^T of w (3, 3, C, O), computed in float64; zeros behind O."""
    C, O = w.shape[2:]
    columns = np.zeros((4, 3, COLUMNS))  # G g of a group of filters
    for group in range(packed.shape[0]):
        columns[...] = 0
        for c in range(C):
            for j in range(3):
                for o in range(min(COLUMNS, O - group * COLUMNS)):
                    at = group * COLUMNS + o
                    top, middle, bottom = np.float64(w[0, j, c, at]), np.float64(w[1, j, c, at]), w[2, j, c, at]
                    columns[0, j, o], columns[3, j, o] = top, bottom
                    columns[1, j, o] = 0.5 * (top + middle + bottom)
                    columns[2, j, o] = 0.5 * (top - middle + bottom)
            for i in range(4):
                for o in range(COLUMNS):
                    left, middle, right = columns[i, 0, o], columns[i, 1, o], columns[i, 2, o]
                    packed[group, 4 * i, c, o], packed[group, 4 * i + 3, c, o] = left, right
                    packed[group, 4 * i + 1, c, o] = 0.5 * (left + middle + right)
                    packed[group, 4 * i + 2, c, o] = 0.5 * (left - middle + right)


# --- the convolution -----------------------------------------------------------------------------------------------


@compiled(parallel=True)
def _convolve(
    x: Array, C: int, w: Array, bias: Array, zeros: Array, strips: Array, patches: Array, sums: Array, pooled: bool,
    y: Array, argmax: NDArray[np.uint8],
) -> None:  # fmt: skip
    """x (B, T, F*C), w (groups, PLACES, C, COLUMNS) -> y, argmax (B, P, Q, O) if pooled, else y (B, 2P, 2Q, O).

    O is a multiple of COLUMNS; zeros (COLUMNS,). Scratch: strips (threads, rows, (F+2+F%2)*C); patches and sums
    (threads, .).
    """
    B, P, Q, O = y.shape if pooled else (y.shape[0], y.shape[1] // 2, y.shape[2] // 2, y.shape[3])
    row = strips.shape[2]
    cells = -(-Q // ROWS) * ROWS
    place, place_sum = cells * C + APART, cells * O + APART
    bands = -(-P // BAND)
    for task in nb.prange(B * bands):
        n, first = task // bands, task % bands * BAND
        last = min(P, first + BAND)
        strip, patch, total = strips[thread_id()], patches[thread_id()], sums[thread_id()]
        fill_strip(x, C, n, first, 2 * (last - first) + 2, strip)
        for p in range(first, last):
            at = strip.ctypes.data + 4 * 2 * (p - first) * row
            transform_cells(at, row, C, Q, patch.ctypes.data, place)
            for m in range(PLACES):
                for group in range(w.shape[0]):
                    for q in range(0, cells, ROWS):
                        add_product_of_rows(
                            patch.ctypes.data + 4 * (m * place + q * C), C,
                            w.ctypes.data + 4 * (group * PLACES + m) * C * COLUMNS, C, zeros.ctypes.data, 0,
                            total.ctypes.data + 4 * (m * place_sum + q * O + group * COLUMNS), O,
                        )  # fmt: skip
            if pooled:
                to = (n * P + p) * Q * O
                pool_cells(
                    total.ctypes.data, place_sum, O, Q, bias.ctypes.data, y.ctypes.data + 4 * to,
                    argmax.ctypes.data + to,
                )  # fmt: skip
            else:
                to = (n * P + p) * 2 * (2 * Q) * O
                store_cells(total.ctypes.data, place_sum, O, Q, bias.ctypes.data, y.ctypes.data + 4 * to, 2 * Q * O)


def _run(x: Array, w: Array, b: Array, pooled: bool, y: Array, argmax: NDArray[np.uint8]) -> None:
    """Fill y and argmax (output channels rounded up); operands as in `kernels.reference.conv3x3_forward`."""
    F, C = x.shape[2:]
    width = y.shape[3]
    packed = scratch(width // COLUMNS, PLACES, C, COLUMNS)
    _transform_filters(w, packed)
    bias = np.zeros(width, np.float32)
    bias[: len(b)] = b
    threads, cells = nb.get_num_threads(), round_up(-(-F // 2), ROWS)
    patches, sums = (scratch(threads, PLACES * (cells * channels + APART)) for channels in (C, width))
    strips, zeros = new_strips(threads, F, C), np.zeros(COLUMNS, np.float32)
    _convolve(rows_of(x), C, packed, bias, zeros, strips, patches, sums, pooled, y, argmax)


def conv3x3_forward(x: Array, w: Array, b: Array) -> Array:
    """`kernels.reference.conv3x3_forward` for checked, contiguous operands."""
    B, T, F, _ = x.shape
    O = w.shape[3]
    y = np.empty((B, round_up(T, 2), round_up(F, 2), round_up(O, COLUMNS)), np.float32)
    _run(x, w, b, False, y, np.empty((0, 0, 0, 0), np.uint8))
    return np.ascontiguousarray(y[:, :T, :F, :O])


def conv_relu_pool_forward(x: Array, w: Array, b: Array) -> tuple[Array, NDArray[np.uint8]]:
    """`kernels.reference.conv_relu_pool_forward` for checked, contiguous operands."""
    B, T, F, _ = x.shape
    O = w.shape[3]
    y = np.empty((B, T // 2, F // 2, round_up(O, COLUMNS)), np.float32)
    argmax = np.empty(y.shape, np.uint8)
    _run(x, w, b, True, y, argmax)
    return np.ascontiguousarray(y[..., :O]), np.ascontiguousarray(argmax[..., :O])
