"""The backward pass of `kernels.cpu.conv`: gradients of the weights, the bias and the input.

The gradient of the unpooled map has one non-zero per pooling cell and channel, and none where the ReLU was dead
(argmax == DEAD). With many input channels, `dw_live` and `dx_live` visit the live maxima only, a quarter of the dense
work or less; with few, vectors lie across the output channels and the four places of a cell are told apart by masks.

Floors with L live maxima, C input channels: 2*9*L*C operations each for dw and dx. For dw the nine taps stay in
registers and each meets a vector of x loaded from the strip; dx loads and stores one for each, at most one store a
clock, and takes twice that. Forward and backward together come to 49 % (1->32, 128x128, without dx) and 116 % of the
peak (32->32, 64x64) at batch 32, counted densely.

`dw_live` and `dx_live` do not visit a maximum whose gradient is 0: beside it, an x or w that is not finite leaves no
0 * inf = nan.
"""

from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from kernels.cpu.conv import TAPS, conv3x3_forward
from kernels.cpu.simd import LANES, REGISTERS, Bytes, Emitter, Int, Ptr, kernel
from kernels.cpu.strips import BAND, copy, fill_strip, new_strips, rows_of
from kernels.cpu.tools import PARTS, Array, as_float32, as_places, check_shapes, compiled, round_up, scratch, thread_id
from kernels.reference import DEAD

DW_VECS = REGISTERS // 16  # vectors of output channels in the masked weight gradient: 9 * DW_VECS accumulators
DW_GROUP = DW_VECS * LANES
IN_GROUP = DW_VECS * LANES  # input channels that `dw_live` and `dx_live` hold in registers, for all nine taps


def _weight_gradient_tile(pooled: bool) -> Any:
    """dw of one input channel from one row of cells; `pooled` says where the gradient of the four pixels comes from."""

    @kernel
    def tile(
        k: Emitter,
        x: Ptr,
        row: Int,
        channels: Int,
        dy: Ptr,
        argmax: Bytes,
        dy_row: Int,
        dy_column: Int,
        n: Int,
        dw: Ptr,
    ) -> None:
        """dw[tap][o] += sum over n cells and their 4 pixels of x at the tap * dy; DW_GROUP output channels."""
        acc = [[k.var(k.load(dw + (t * DW_GROUP + LANES * v))) for v in range(DW_VECS)] for t in range(9)]
        for q in k.range(n):
            for place, (r, s) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
                for v in range(DW_VECS):
                    if pooled:
                        d = k.load(dy + dy_column * q + LANES * v)
                        here = k.load_bytes(argmax + dy_column * q + LANES * v).equals(place)
                        d = k.where(here, d, 0.0)
                    else:
                        d = k.load(dy + dy_row * r + dy_column * (q * 2 + s) + LANES * v)
                    for tap, (i, j) in enumerate(TAPS):
                        acc[tap][v] += k.splat(x + row * (r + i) + channels * (q * 2 + (s + j))) * d
        for t in range(9):
            for v in range(DW_VECS):
                k.store(dw + (t * DW_GROUP + LANES * v), acc[t][v])

    return tile


dw_pooled, dw_plain = _weight_gradient_tile(True), _weight_gradient_tile(False)


@kernel
def dw_live(k: Emitter, x: Ptr, row: Int, channels: Int, values: Ptr, places: Bytes, n: Int, dw: Ptr) -> None:
    """One output channel, one row of cells: its n live maxima add dy times their 3x3 neighbourhoods to dw.

    values, places: see `list_live`. IN_GROUP of the `channels` of x; dw (9, channels) stays in registers along the row.
    """
    acc = [[k.var(k.load(dw + channels * t + LANES * v)) for v in range(DW_VECS)] for t in range(9)]
    for m in k.range(n):
        d, at = k.splat(values + m), x + k.load_int(places + m * 4)
        for t, (i, j) in enumerate(TAPS):
            for v in range(DW_VECS):
                acc[t][v] += d * k.load(at + row * i + channels * j + LANES * v)
    for t in range(9):
        for v in range(DW_VECS):
            k.store(dw + channels * t + LANES * v, acc[t][v])


@kernel
def dx_live(k: Emitter, dx: Ptr, row: Int, channels: Int, dy: Ptr, argmax: Bytes, outputs: Int, n: Int, w: Ptr) -> None:
    """One output channel, one row of n cells: every live maximum adds dy times the kernel to its neighbourhood of dx.

    The mirror image of `dw_live`: here the nine taps of w stay in registers. It waits for loads and stores, so that a
    list gained nothing.
    """
    ws = [[k.load(w + channels * t + LANES * v) for v in range(DW_VECS)] for t in range(9)]
    for q in k.range(n):
        place, d = k.load_byte(argmax + outputs * q), dy + outputs * q
        with k.when((place < DEAD) & k.nonzero(d)):
            at = dx + row * (place >> 1) + channels * ((place & 1) + q * 2)
            for t, (i, j) in enumerate(TAPS):
                for v in range(DW_VECS):
                    here = at + row * i + channels * j + LANES * v
                    k.store(here, k.load(here) + k.splat(d) * ws[t][v])


@compiled
def list_live(
    dy: Array, argmax: NDArray[np.uint8], o: int, row: int, channels: int, values: Array, places: NDArray[np.int32]
) -> int:
    """The live maxima of one output channel in a row of cells, dy and argmax (Q, O): how many.

    values: their gradients; places: where their neighbourhoods begin in a strip of rows of `row` numbers. To list them
    first leaves no branch that a processor could guess wrong behind: nothing tells which cells are live.
    """
    n = 0
    for q in range(dy.shape[0]):
        place, d = np.int32(argmax[q, o]), dy[q, o]
        values[n] = d
        places[n] = row * (place >> 1) + channels * ((place & 1) + 2 * q)
        n += (place < DEAD) & (d != 0)
    return n


@compiled(parallel=True)
def _dw_few_channels(
    x: Array, C: int, dy: Array, argmax: NDArray[np.uint8], pooled: bool, strips: Array, dw: Array, db: Array
) -> None:
    """dw (PARTS, O/DW_GROUP, C, 9, DW_GROUP) and db (PARTS, O), from dy (B, P, Q, O), or (B, 2P, 2Q, O) unpooled."""
    B, O = dy.shape[0], dy.shape[3]
    P, Q = (dy.shape[1], dy.shape[2]) if pooled else (dy.shape[1] // 2, dy.shape[2] // 2)
    row = strips.shape[2]
    for part in nb.prange(dw.shape[0]):
        strip = strips[part]
        for n in range(part, B, dw.shape[0]):
            for p in range(P):
                if p % BAND == 0:
                    fill_strip(x, C, n, p, 2 * min(BAND, P - p) + 2, strip)
                for g in range(O // DW_GROUP):
                    for c in range(C):
                        at = strip.ctypes.data + 4 * (2 * (p % BAND) * row + c)
                        out = dw.ctypes.data + 4 * ((part * O + g * DW_GROUP) * C + c * DW_GROUP) * 9
                        if pooled:
                            d = (n * P + p) * Q * O + g * DW_GROUP
                            dw_pooled(at, row, C, dy.ctypes.data + 4 * d, argmax.ctypes.data + d, 0, O, Q, out)
                        else:
                            d = (n * 2 * P + 2 * p) * 2 * Q * O + g * DW_GROUP
                            dw_plain(at, row, C, dy.ctypes.data + 4 * d, 0, 2 * Q * O, O, Q, out)
                if pooled:
                    _add_live(dy[n, p], argmax[n, p], db[part])


@compiled
def _add_live(dy: Array, argmax: NDArray[np.uint8], db: Array) -> None:
    """db[o] += sum over the cells of a row of dy where the cell is live."""
    for q in range(dy.shape[0]):
        for o in range(dy.shape[1]):
            if argmax[q, o] != DEAD:
                db[o] += dy[q, o]


@compiled(parallel=True)
def _dw_many_channels(
    x: Array, C: int, dy: Array, argmax: NDArray[np.uint8], strips: Array, live: Array, dw: Array, db: Array
) -> None:
    """dw (PARTS, O, 9, C) and db (PARTS, O); C is a whole number of IN_GROUPs. live (PARTS, 2, Q): scratch."""
    B, P, _, O = dy.shape
    row = strips.shape[2]
    for part in nb.prange(dw.shape[0]):
        strip, values, places = strips[part], live[part, 0], live[part, 1].view(np.int32)
        for n in range(part, B, dw.shape[0]):
            for p in range(P):
                if p % BAND == 0:
                    fill_strip(x, C, n, p, 2 * min(BAND, P - p) + 2, strip)
                for o in range(O):
                    count = list_live(dy[n, p], argmax[n, p], o, row, C, values, places)
                    for c in range(0, C, IN_GROUP):
                        dw_live(
                            strip.ctypes.data + 4 * (2 * (p % BAND) * row + c), row, C,
                            values.ctypes.data, places.ctypes.data, count,
                            dw.ctypes.data + 4 * ((part * O + o) * 9 * C + c),
                        )  # fmt: skip
                _add_live(dy[n, p], argmax[n, p], db[part])


@compiled(parallel=True)
def _dx(dy: Array, argmax: NDArray[np.uint8], w: Array, strips: Array, dx: Array) -> None:
    """w (O, 9, channels) -> dx (B, T, F*C); strips (threads, 4, (F+2)*channels) collect it for a row of cells."""
    B, P, Q, O = dy.shape
    T, width = dx.shape[1:]
    channels = w.shape[2]
    C = width // (strips.shape[2] // channels - 2)
    for n in nb.prange(B):
        strip = strips[thread_id()]
        clear(strip, 0)
        clear(strip, 2)
        for p in range(P + 1):
            if p < P:
                for o in range(O):
                    d = (n * P + p) * Q * O + o
                    for c in range(0, channels, IN_GROUP):
                        dx_live(
                            strip.ctypes.data + 4 * c, strip.shape[1], channels,
                            dy.ctypes.data + 4 * d, argmax.ctypes.data + d, O, Q,
                            w.ctypes.data + 4 * (o * 9 * channels + c),
                        )  # fmt: skip
            for r in range(2):  # image rows 2p-1 and 2p are done; the two below them become the first of the next
                t = 2 * p - 1 + r
                if 0 <= t < T:
                    take_row(strip[r], channels, dx[n, t], C)
            copy(strip[2].ctypes.data, strip.ctypes.data, 2 * strip.shape[1])
            clear(strip, 2)


@compiled
def clear(strip: Array, first: int) -> None:
    """Rows first and first + 1 of a strip become 0."""
    for r in range(first, first + 2):
        for i in range(strip.shape[1]):
            strip[r, i] = 0


@compiled
def take_row(row: Array, channels: int, x: Array, C: int) -> None:
    """x (F*C) = what stands inside of a padded row ((F+2)*channels)."""
    if channels == C:
        copy(row.ctypes.data + 4 * C, x.ctypes.data, x.size)
    else:
        for f in range(x.size // C):
            for c in range(C):
                x[f * C + c] = row[(f + 1) * channels + c]


def _pad_last(x: NDArray[Any], multiple: int) -> NDArray[Any]:
    """x with its last axis padded with zeros to a whole number of `multiple`; x itself where it is one already."""
    missing = -x.shape[-1] % multiple
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def _dw_by_outputs(x: Array, dy: Array, argmax: NDArray[np.uint8], pooled: bool, O: int) -> tuple[Array, Array]:
    """(dw (3, 3, C, O), db (O,), the latter only of live cells): vectors across the output channels."""
    B, _, F, C = x.shape
    dy, argmax = _pad_last(dy, DW_GROUP), _pad_last(argmax, DW_GROUP)
    parts, groups = min(B, PARTS), dy.shape[3] // DW_GROUP
    dw = np.zeros((parts, groups, C, 9, DW_GROUP), np.float32)
    db = np.zeros((parts, dy.shape[3]), np.float32)
    _dw_few_channels(rows_of(x), C, dy, argmax, pooled, new_strips(parts, F, C), dw, db)
    by_tap = dw.sum(axis=0).transpose(2, 1, 0, 3).reshape(3, 3, C, -1)
    return np.ascontiguousarray(by_tap[..., :O]), db.sum(axis=0)[:O]


def conv3x3_backward(dy: Array, x: Array, w: Array, need_dx: bool = True) -> tuple[Array | None, Array, Array]:
    """See `kernels.reference.conv3x3_backward`."""
    dy, x, w = as_float32(dy=dy, x=x, w=w)
    T, F, C, O = *x.shape[1:], w.shape[3]
    check_shapes(dy=(dy, (len(x), T, F, O)), w=(w, (3, 3, C, O)))
    turned = np.ascontiguousarray(w[::-1, ::-1].swapaxes(2, 3))
    dx = conv3x3_forward(dy, turned, np.zeros(C, np.float32)) if need_dx else None
    even = np.pad(dy, ((0, 0), (0, T % 2), (0, F % 2), (0, 0))) if T % 2 or F % 2 else dy
    dw, _ = _dw_by_outputs(x, even, np.empty((1, 1, 1, O), np.uint8), False, O)
    return dx, dw, dy.sum(axis=(0, 1, 2))


def conv_relu_pool_backward(
    dy: Array, argmax: NDArray[np.uint8], x: Array, w: Array, need_dx: bool = True
) -> tuple[Array | None, Array, Array]:
    """See `kernels.reference.conv_relu_pool_backward`."""
    dy, x, w = as_float32(dy=dy, x=x, w=w)
    argmax = as_places(argmax)
    B, T, F, C = x.shape
    O = w.shape[3]
    check_shapes(dy=(dy, (B, T // 2, F // 2, O)), argmax=(argmax, dy.shape), w=(w, (3, 3, C, O)))
    channels = round_up(C, IN_GROUP)
    if C < LANES:
        dw, db = _dw_by_outputs(x, dy, argmax, True, O)
    else:
        parts = min(B, PARTS)
        dw_parts, db_parts = np.zeros((parts, O, 9, channels), np.float32), np.zeros((parts, O), np.float32)
        padded = _pad_last(x, IN_GROUP)
        strips, live = new_strips(parts, F, channels), scratch(parts, 2, F // 2)
        _dw_many_channels(rows_of(padded), channels, dy, argmax, strips, live, dw_parts, db_parts)
        dw = np.ascontiguousarray(dw_parts.sum(axis=0)[..., :C].reshape(O, 3, 3, C).transpose(1, 2, 3, 0))
        db = db_parts.sum(axis=0)
    if not need_dx:
        return None, dw, db
    by_output = np.ascontiguousarray(_pad_last(w.transpose(3, 0, 1, 2).reshape(O, 9, C), IN_GROUP))
    dx = np.empty_like(x)
    strips = scratch(nb.get_num_threads(), 4, (F + 2) * channels)
    _dx(dy, argmax, by_output, strips, rows_of(dx))
    return dx, dw, db
