"""3x3 convolution, ReLU and 2x2 max-pooling on the CPU, channels last, and the three fused into one pass.

Floors for a batch of B images, C -> O channels: 2*9*B*T*F*C*O operations forward, the same for dx and for dw when done
densely. Forward, a tile of 2x2 pooling cells times 2 vectors of output channels stays in registers across all taps and
input channels, so that the arithmetic units are the limit, and bias, ReLU, pooling and argmax happen on those
registers: the T x F x O map before pooling never exists in memory.

Backward, the gradient of the unpooled map has one non-zero per cell and channel, and none where the ReLU was dead
(argmax == DEAD). With many input channels, `dw_live` and `dx_live` visit the live maxima only, a quarter of the dense
work or less; with few, vectors lie across the output channels and the four places of a cell are told apart by masks.

All kernels read a *strip*: the four image rows behind one row of pooling cells, with the zero padding around them,
copied to a scratch that stays in the first-level cache. Channels are padded with zeros to whole vectors; nothing
else in this file knows about odd sizes.
"""

from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from kernels.cpu.simd import LANES, REGISTERS, Bytes, Emitter, Int, Ptr, kernel
from kernels.cpu.tools import PARTS, Array, as_float32, as_places, check_shapes, compiled, round_up, thread_id
from kernels.reference import DEAD

OUT_VECS = 2  # vectors of output channels in a forward tile
OUT_GROUP = OUT_VECS * LANES
CELLS = 2 if REGISTERS == 32 else 1  # 2x2 cells side by side in a forward tile: 4 * CELLS * OUT_VECS accumulators
DW_VECS = REGISTERS // 16  # vectors of output channels in the masked weight gradient: 9 * DW_VECS accumulators
DW_GROUP = DW_VECS * LANES
IN_GROUP = DW_VECS * LANES  # input channels that `dw_live` and `dx_live` hold in registers, for all nine taps
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
                best, place = pixels[0], k.ints(0)
                for n in range(1, 4):
                    larger = pixels[n] > best
                    best, place = k.where(larger, pixels[n], best), k.where(larger, k.ints(n), place)
                dead = best <= 0.0
                undefined = pixels[0].unordered(pixels[1]) | pixels[2].unordered(pixels[3])
                y_at, argmax_at = y + cell * q + LANES * v, argmax + cell * q + LANES * v
                k.store(y_at, k.where(undefined, float("nan"), k.where(dead, 0.0, best)))
                k.store_bytes(argmax_at, k.where(dead, k.ints(DEAD), place))

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


@compiled
def fill_strip(x: Array, C: int, n: int, p: int, strip: Array) -> None:
    """Copy rows 2p-1 .. 2p+2 of image n of x (B, T, F*C) to strip (4, row), one pixel to the right; zeros outside.

    Loops, not slices: assigning a slice takes Numba seconds to compile.
    """
    T, width = x.shape[1:]
    for r in range(4):
        t = 2 * p - 1 + r
        inside = width if 0 <= t < T else 0
        for i in range(C):
            strip[r, i] = 0
        for i in range(inside):
            strip[r, C + i] = x[n, t, i]
        for i in range(C + inside, strip.shape[1]):
            strip[r, i] = 0


@compiled(parallel=True)
def _conv_relu_pool(
    x: Array, C: int, w: Array, bias: Array, strips: Array, y: Array, argmax: NDArray[np.uint8]
) -> None:
    """x (B, T, F*C), w (O/OUT_GROUP, C, 9, OUT_GROUP) -> y, argmax (B, P, Q, O); strips (threads, 4, (F+2)*C)."""
    P, Q, O = y.shape[1:]
    row = strips.shape[2]
    for np_ in nb.prange(y.shape[0] * P):
        n, p = np_ // P, np_ % P
        strip = strips[thread_id()]
        fill_strip(x, C, n, p, strip)
        for o in range(0, O, OUT_GROUP):
            ws, bs = w.ctypes.data + 4 * o * C * 9, bias.ctypes.data + 4 * o
            first = np_ * Q * O + o
            q = 0
            while q < Q:
                at, out = strip.ctypes.data + 4 * 2 * q * C, first + q * O
                if q + CELLS <= Q:
                    pool_wide(at, row, ws, bs, C, y.ctypes.data + 4 * out, argmax.ctypes.data + out, O)
                    q += CELLS
                else:
                    pool_one(at, row, ws, bs, C, y.ctypes.data + 4 * out, argmax.ctypes.data + out, O)
                    q += 1


@compiled(parallel=True)
def _conv3x3(x: Array, C: int, w: Array, bias: Array, strips: Array, y: Array) -> None:
    """x (B, T, F*C), w as in `_conv_relu_pool` -> y (B, 2P, 2Q, O), T and F rounded up to even."""
    P, Q, O = y.shape[1] // 2, y.shape[2] // 2, y.shape[3]
    row = strips.shape[2]
    for np_ in nb.prange(y.shape[0] * P):
        n, p = np_ // P, np_ % P
        strip = strips[thread_id()]
        fill_strip(x, C, n, p, strip)
        for o in range(0, O, OUT_GROUP):
            ws, bs = w.ctypes.data + 4 * o * C * 9, bias.ctypes.data + 4 * o
            first = y.ctypes.data + 4 * (np_ * 2 * (2 * Q) * O + o)
            q = 0
            while q < Q:
                at, out = strip.ctypes.data + 4 * 2 * q * C, first + 4 * 2 * q * O
                if q + CELLS <= Q:
                    conv_wide(at, row, ws, bs, C, out, 2 * Q * O, O)
                    q += CELLS
                else:
                    conv_one(at, row, ws, bs, C, out, 2 * Q * O, O)
                    q += 1


def _pack(w: Array, b: Array) -> tuple[Array, Array]:
    """(3, 3, C, O), (O,) -> (O/OUT_GROUP, C, 9, OUT_GROUP) in the order of use, and b, O padded to whole groups."""
    C, O = w.shape[2:]
    groups = -(-O // OUT_GROUP)
    padded = np.zeros((9, C, groups * OUT_GROUP), np.float32)
    padded[..., :O] = w.reshape(9, C, O)
    bias = np.zeros(groups * OUT_GROUP, np.float32)
    bias[:O] = b
    return np.ascontiguousarray(padded.reshape(9, C, groups, OUT_GROUP).transpose(2, 1, 0, 3)), bias


def _rows(x: Array) -> Array:
    """(B, T, F, C) -> (B, T, F*C)."""
    B, T, F, C = x.shape
    return x.reshape(B, T, F * C)


def _strips(count: int, F: int, C: int) -> Array:
    return np.empty((count, 4, (F + 2 + F % 2) * C), np.float32)


def conv3x3_forward(x: Array, w: Array, b: Array) -> Array:
    """See `kernels.reference.conv3x3_forward`."""
    x, w, b = as_float32(x=x, w=w, b=b)
    B, T, F, C = x.shape
    O = w.shape[3]
    check_shapes(w=(w, (3, 3, C, O)), b=(b, (O,)))
    packed, bias = _pack(w, b)
    y = np.empty((B, round_up(T, 2), round_up(F, 2), len(bias)), np.float32)
    _conv3x3(_rows(x), C, packed, bias, _strips(nb.get_num_threads(), F, C), y)
    return np.ascontiguousarray(y[:, :T, :F, :O])


def conv_relu_pool_forward(x: Array, w: Array, b: Array) -> tuple[Array, NDArray[np.uint8]]:
    """See `kernels.reference.conv_relu_pool_forward`."""
    x, w, b = as_float32(x=x, w=w, b=b)
    B, T, F, C = x.shape
    O = w.shape[3]
    check_shapes(w=(w, (3, 3, C, O)), b=(b, (O,)))
    packed, bias = _pack(w, b)
    y = np.empty((B, T // 2, F // 2, len(bias)), np.float32)
    argmax = np.empty(y.shape, np.uint8)
    _conv_relu_pool(_rows(x), C, packed, bias, _strips(nb.get_num_threads(), F, C), y, argmax)
    return np.ascontiguousarray(y[..., :O]), np.ascontiguousarray(argmax[..., :O])


# --- backward ----------------------------------------------------------------------------------------------------


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
def dw_live(k: Emitter, x: Ptr, row: Int, channels: Int, dy: Ptr, argmax: Bytes, outputs: Int, n: Int, dw: Ptr) -> None:
    """One output channel, one row of n cells: every live maximum adds dy times its 3x3 neighbourhood to dw.

    IN_GROUP of the `channels` of x; dw (9, channels) of this output channel stays in registers along the row.
    """
    acc = [[k.var(k.load(dw + channels * t + LANES * v)) for v in range(DW_VECS)] for t in range(9)]
    for q in k.range(n):
        place, d = k.load_byte(argmax + outputs * q), dy + outputs * q
        with k.when((place < DEAD) & k.nonzero(d)):
            at = x + row * (place >> 1) + channels * ((place & 1) + q * 2)
            for t, (i, j) in enumerate(TAPS):
                for v in range(DW_VECS):
                    acc[t][v] += k.splat(d) * k.load(at + row * i + channels * j + LANES * v)
    for t in range(9):
        for v in range(DW_VECS):
            k.store(dw + channels * t + LANES * v, acc[t][v])


@kernel
def dx_live(k: Emitter, dx: Ptr, row: Int, channels: Int, dy: Ptr, argmax: Bytes, outputs: Int, n: Int, w: Ptr) -> None:
    """One output channel, one row of n cells: every live maximum adds dy times the kernel to its neighbourhood of dx.

    The mirror image of `dw_live`: here the nine taps of w stay in registers.
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
                fill_strip(x, C, n, p, strip)
                for g in range(O // DW_GROUP):
                    for c in range(C):
                        at = strip.ctypes.data + 4 * c
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
    x: Array, C: int, dy: Array, argmax: NDArray[np.uint8], strips: Array, dw: Array, db: Array
) -> None:
    """dw (PARTS, O, 9, C) and db (PARTS, O); C is a whole number of IN_GROUPs."""
    B, P, Q, O = dy.shape
    row = strips.shape[2]
    for part in nb.prange(dw.shape[0]):
        strip = strips[part]
        for n in range(part, B, dw.shape[0]):
            for p in range(P):
                fill_strip(x, C, n, p, strip)
                for o in range(O):
                    d = (n * P + p) * Q * O + o
                    for c in range(0, C, IN_GROUP):
                        dw_live(
                            strip.ctypes.data + 4 * c, row, C,
                            dy.ctypes.data + 4 * d, argmax.ctypes.data + d, O, Q,
                            dw.ctypes.data + 4 * ((part * O + o) * 9 * C + c),
                        )  # fmt: skip
                _add_live(dy[n, p], argmax[n, p], db[part])


@compiled(parallel=True)
def _dx(dy: Array, argmax: NDArray[np.uint8], w: Array, images: Array, dx: Array) -> None:
    """w (O, 9, channels) -> dx (B, T, F, C), by way of one padded image per thread: (threads, T+2, F+2, channels)."""
    B, P, Q, O = dy.shape
    T, F, C = dx.shape[1:]
    channels = images.shape[3]
    row = images.shape[2] * channels
    for n in nb.prange(B):
        image = images[thread_id()]
        for t in range(T + 2):
            for f in range(F + 2):
                for c in range(channels):
                    image[t, f, c] = 0
        for p in range(P):
            for o in range(O):
                d = (n * P + p) * Q * O + o
                for c in range(0, channels, IN_GROUP):
                    dx_live(
                        image.ctypes.data + 4 * (2 * p * row + c), row, channels,
                        dy.ctypes.data + 4 * d, argmax.ctypes.data + d, O, Q,
                        w.ctypes.data + 4 * (o * 9 * channels + c),
                    )  # fmt: skip
        for t in range(T):
            for f in range(F):
                for c in range(C):
                    dx[n, t, f, c] = image[t + 1, f + 1, c]


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
    _dw_few_channels(_rows(x), C, dy, argmax, pooled, _strips(parts, F, C), dw, db)
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
        _dw_many_channels(_rows(padded), channels, dy, argmax, _strips(parts, F, channels), dw_parts, db_parts)
        dw = np.ascontiguousarray(dw_parts.sum(axis=0)[..., :C].reshape(O, 3, 3, C).transpose(1, 2, 3, 0))
        db = db_parts.sum(axis=0)
    if not need_dx:
        return None, dw, db
    by_output = np.ascontiguousarray(_pad_last(w.transpose(3, 0, 1, 2).reshape(O, 9, C), IN_GROUP))
    images = np.empty((nb.get_num_threads(), T + 2, F + 2, channels), np.float32)
    dx = np.empty_like(x)
    _dx(dy, argmax, by_output, images, dx)
    return dx, dw, db


# --- the parts on their own --------------------------------------------------------------------------------------


@compiled(parallel=True)
def _relu(x: Array, y: Array) -> None:
    for i in nb.prange(x.size):
        y[i] = np.float32(0) if x[i] < 0 else x[i]


@compiled(parallel=True)
def _relu_gradient(dy: Array, y: Array, dx: Array) -> None:
    for i in nb.prange(y.size):
        dx[i] = dy[i] if y[i] > 0 else np.float32(0)


def relu_forward(x: Array) -> Array:
    """See `kernels.reference.relu_forward`."""
    (x,) = as_float32(x=x)
    y = np.empty_like(x)
    _relu(x.ravel(), y.ravel())
    return y


def relu_backward(dy: Array, y: Array) -> Array:
    """See `kernels.reference.relu_backward`."""
    dy, y = as_float32(dy=dy, y=y)
    check_shapes(y=(y, dy.shape))
    dx = np.empty_like(dy)
    _relu_gradient(dy.ravel(), y.ravel(), dx.ravel())
    return dx


@compiled(parallel=True)
def _maxpool(x: Array, y: Array, argmax: NDArray[np.uint8]) -> None:
    B, P, Q, C = y.shape
    for n in nb.prange(B):
        for p in range(P):
            for q in range(Q):
                for c in range(C):
                    best, place = x[n, 2 * p, 2 * q, c], 0
                    for m in range(1, 4):
                        value = x[n, 2 * p + m // 2, 2 * q + m % 2, c]
                        if value > best or (value != value and best == best):
                            best, place = value, m
                    y[n, p, q, c], argmax[n, p, q, c] = best, place


@compiled(parallel=True)
def _maxpool_gradient(dy: Array, argmax: NDArray[np.uint8], dx: Array) -> None:
    B, P, Q, C = dy.shape
    for n in nb.prange(B):
        for p in range(P):
            for q in range(Q):
                for c in range(C):
                    place = argmax[n, p, q, c]
                    if place < DEAD:
                        dx[n, 2 * p + place // 2, 2 * q + place % 2, c] = dy[n, p, q, c]


def maxpool2x2_forward(x: Array) -> tuple[Array, NDArray[np.uint8]]:
    """See `kernels.reference.maxpool2x2_forward`."""
    (x,) = as_float32(x=x)
    B, T, F, C = x.shape
    y = np.empty((B, T // 2, F // 2, C), np.float32)
    argmax = np.empty(y.shape, np.uint8)
    _maxpool(x, y, argmax)
    return y, argmax


def maxpool2x2_backward(dy: Array, argmax: NDArray[np.uint8], x_shape: tuple[int, ...]) -> Array:
    """See `kernels.reference.maxpool2x2_backward`."""
    (dy,) = as_float32(dy=dy)
    dx = np.zeros(x_shape, np.float32)
    check_shapes(dy=(dy, (x_shape[0], x_shape[1] // 2, x_shape[2] // 2, x_shape[3])), argmax=(argmax, dy.shape))
    _maxpool_gradient(dy, as_places(argmax), dx)
    return dx
