"""The backward pass of `kernels.cuda.conv`: gradients of the weights, the bias and the input.

The gradient of the weights visits only the pixel of each cell that was the maximum: one lane per output channel, a
quarter of the dense arithmetic. Blocks add up their shares of the image on their own, and `add_parts` adds those in a
fixed order. The gradient of the input is a convolution with the weights turned by 180 degrees.

Floors, dense: 18*B*T*F*C*O operations for each of dw and dx.
"""

from typing import Any

import numpy as np

from kernels.cuda.conv import CELLS, IMAGE, check_image, convolve
from kernels.cuda.device import (
    ALIGN,
    SIMULATED,
    Array,
    F,
    Flat,
    I,
    Kernel,
    P,
    S,
    blocks_for,
    check,
    cuda,
    empty,
    float32,
    helper,
    index,
    int32,
    int64,
    kernel,
    load4,
    multiprocessors,
)
from kernels.cuda.matmul import add_parts
from kernels.cuda.pool import pooled_shape
from kernels.reference import DEAD

# The weight gradient's output channels (lanes), and groups of lanes of a block.
LANES, GROUPS = (4, 2) if SIMULATED else (32, 8)


# --- the gradient of the weights ---------------------------------------------------------------------------------


def make_weight_gradient(channels: int, apart: int, tile: tuple[int, int], pooled: bool, name: str) -> Kernel:
    """A part of dw (3, 3, C, O) and, behind it, of db (O): block x adds up every gridDim.x-th tile of all images.

    A thread has one output channel (its lane) and `channels` input channels; `apart` groups of lanes have different
    input channels, the others share them and split the cells. pooled: dy and argmax (B, T//2, F//2, O) tell for each
    cell where its gradient goes; else dy (B, T, F, O) is dense, and a cell is a pixel. tile: cells down and across.
    Blocks: (parts, strips of `apart * channels` input channels, strips of LANES output channels).
    """
    step = 2 if pooled else 1  # pixels from cell to cell
    tile_t, tile_f = tile
    rows, pitch = step * tile_t + 2, step * tile_f + 2
    pixels, cells, splits = rows * pitch, tile_t * tile_f, GROUPS // apart
    threads, strip, sums = LANES * GROUPS, apart * channels, 9 * channels + 1
    # Channels last; lanes read up to four neighbouring pixels at once, which four numbers behind each keep apart.
    wide = strip + 4 if channels == 4 else strip
    shared = apart > 1  # gradients that several groups use go through shared memory
    x_size, g_size = pixels * wide, cells * LANES if shared else 1
    at_once = max(1, min(threads // strip, 16 if strip == 1 else 2))  # columns that are read at once
    shared_sums = threads * sums if splits > 1 else 1
    lanes = LANES

    @helper
    def gradient(
        dy: Flat, argmax: Flat, begin: int, cell: int, inside: bool, down: int, across: int, cells_f: int, O: int
    ) -> tuple[Any, Any]:
        """A cell's gradient, and the place in x_tile where its taps begin; the tile's first cell lies at `begin`."""
        ct, cf = cell // tile_f, cell % tile_f
        value, place = float32(0), int64(0)
        if inside and ct < down and cf < across:
            at = begin + (ct * cells_f + cf) * O
            value = dy[index(at)]
            if pooled:
                place = int64(argmax[index(at)])
                if place == DEAD:
                    value, place = float32(0), int64(0)
        return value, ((step * ct + place // 2) * pitch + step * cf + place % 2) * wide

    @kernel((F, P, F, F, S, S, S, S, S), threads, name, resident=2)
    def weight_gradient(dy: Flat, argmax: Flat, x: Flat, parts: Flat, B: int, T: int, F: int, C: int, O: int) -> None:
        x_tile = cuda.shared.array(x_size, float32, ALIGN)  # (rows, pitch, wide)
        g_tile = cuda.shared.array(g_size, float32)  # (cells, lanes): gradients,
        places = cuda.shared.array(g_size, int32)  # and the places in x_tile where their taps begin
        collected = cuda.shared.array(shared_sums, float32)
        acc, taps = cuda.local.array(sums, float32), cuda.local.array(channels, float32)
        t = cuda.threadIdx.x & (threads - 1)
        lane, group = t % lanes, t // lanes
        mine, split = group % apart * channels, group // apart  # first input channel in the strip; share of the cells
        c0, o0 = cuda.blockIdx.y * strip, cuda.blockIdx.z * lanes
        cells_t, cells_f, line = T // step, F // step, int32(F * C)
        tiles_t, tiles_f = (cells_t + tile_t - 1) // tile_t, (cells_f + tile_f - 1) // tile_f
        for i in range(sums):
            acc[i] = float32(0)
        for tile in range(cuda.blockIdx.x, B * tiles_t * tiles_f, cuda.gridDim.x):
            n, first = tile // (tiles_t * tiles_f), tile % (tiles_t * tiles_f)
            ct0, cf0 = first // tiles_f * tile_t, first % tiles_f * tile_f
            cuda.syncthreads()
            c = t % strip
            corner = ((n * T + step * ct0 - 1) * F + step * cf0 - 1) * C + c0 + c
            for row in range(t // strip // at_once, rows, threads // (strip * at_once)):
                inside = c0 + c < C and step * ct0 + row > 0 and step * ct0 + row <= T
                for column in range(t // strip % at_once, pitch, at_once):
                    value = float32(0)
                    if inside and step * cf0 + column > 0 and step * cf0 + column <= F:
                        value = x[index(corner + row * line + column * C)]
                    x_tile[index((row * pitch + column) * wide + c)] = value
            if shared:
                for e in range(t, g_size, threads):
                    cell, o = e // lanes, e % lanes
                    begin = ((n * cells_t + ct0) * cells_f + cf0) * O + o0 + o
                    value, place = gradient(
                        dy, argmax, begin, cell, o0 + o < O, cells_t - ct0, cells_f - cf0, cells_f, O
                    )
                    g_tile[index(e)], places[index(e)] = value, int32(place)
            cuda.syncthreads()
            for cell in range(split, cells, splits):
                if shared:
                    g, at = g_tile[index(cell * lanes + lane)], int64(places[index(cell * lanes + lane)]) + mine
                else:
                    begin = ((n * cells_t + ct0) * cells_f + cf0) * O + o0 + lane
                    g, at = gradient(dy, argmax, begin, cell, o0 + lane < O, cells_t - ct0, cells_f - cf0, cells_f, O)
                for tap in range(9):
                    beside = at + (tap // 3 * pitch + tap % 3) * wide
                    if channels == 4:
                        taps[0], taps[1], taps[2], taps[3] = load4(x_tile, beside)
                    else:
                        for c in range(channels):
                            taps[c] = x_tile[index(beside + c)]
                    for c in range(channels):
                        acc[9 * c + tap] += g * taps[c]
                acc[9 * channels] += g
        if splits > 1:
            for i in range(sums):
                collected[index(i * threads + t)] = acc[i]
            cuda.syncthreads()
            if split == 0:
                for i in range(sums):
                    for other in range(1, splits):
                        acc[i] += collected[index(i * threads + other * apart * lanes + t)]
        if split == 0 and o0 + lane < O:
            begin = cuda.blockIdx.x * (9 * C + 1) * O + o0 + lane
            for c in range(channels):
                if c0 + mine + c < C:
                    for tap in range(9):
                        parts[index(begin + (tap * C + c0 + mine + c) * O)] = acc[9 * c + tap]
            if c0 + mine == 0:
                parts[index(begin + 9 * C * O)] = acc[9 * channels]

    return weight_gradient


DW_CHANNELS = 4
# Cells down and across: of a spectrogram with its one channel, and of eight times four channels.
SINGLE_TILE, TILE = ((2, 4), (2, 2)) if SIMULATED else ((16, 8), (8, 4))
WEIGHT_GRADIENTS = {
    (True, True): make_weight_gradient(1, 1, SINGLE_TILE, True, "conv_relu_pool_dw_1"),
    (False, True): make_weight_gradient(DW_CHANNELS, GROUPS, TILE, True, "conv_relu_pool_dw_many"),
    (False, False): make_weight_gradient(DW_CHANNELS, GROUPS, TILE, False, "conv3x3_dw"),
}


def _weight_gradient(dy: Array, argmax: Array, x: Array, O: int, pooled: bool) -> tuple[Array, Array]:
    """(dw, db)."""
    B, T, F, C = x.shape
    single = C == 1 and pooled
    strip = 1 if single else GROUPS * DW_CHANNELS
    step = 2 if pooled else 1
    tile_t, tile_f = SINGLE_TILE if single else TILE
    tiles = B * -(-(T // step) // tile_t) * -(-(F // step) // tile_f)
    count = max(1, min(tiles, 2 * multiprocessors()))
    parts, both = empty((count, (9 * C + 1) * O)), empty(((9 * C + 1) * O,))
    blocks = (count, max(1, -(-C // strip)), -(-O // LANES))  # without channels, too, there is a db
    WEIGHT_GRADIENTS[single, pooled](blocks, dy, argmax, x, parts, B, T, F, C, O)
    add_parts(parts, count, both)
    return both[: 9 * C * O].reshape(3, 3, C, O), both[9 * C * O :]


# --- the operations ----------------------------------------------------------------------------------------------


@kernel((F, F, F, I, I, I))
def _turn(w: Flat, turned: Flat, zeros: Flat, n: int, C: int, O: int) -> None:
    """turned (3, 3, O, C): w (3, 3, C, O) by 180 degrees, channels exchanged; zeros (C) is filled."""
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        c, o, tap = e % C, e // C % O, e // C // O
        turned[e] = w[((8 - tap) * C + c) * O + o]
        if e < C:
            zeros[e] = float32(0)


def conv3x3_backward(dy: Array, x: Array, w: Array, need_dx: bool = True) -> tuple[Array | None, Array, Array]:
    """See `kernels.reference.conv3x3_backward`. No network here uses it: dx is made from turned weights."""
    (B, T, F, C), O = check_image(x, w)
    check(dy=(dy, (B, T, F, O), np.float32))
    none = empty((1,), np.uint8)
    dw, db = _weight_gradient(dy, none, x, O, False)
    if not need_dx:
        return None, dw, db
    turned, zeros, dx = empty((3, 3, O, C)), empty((C,)), empty((B, T, F, C))
    _turn(blocks_for(w.size), w, turned, zeros, w.size, C, O)
    convolve(dy, none, turned, zeros, dx, none, T, F, False, IMAGE)
    return dx, dw, db


def conv_relu_pool_backward(
    dy: Array, argmax: Array, x: Array, w: Array, need_dx: bool = True
) -> tuple[Array | None, Array, Array]:
    """See `kernels.reference.conv_relu_pool_backward`."""
    (B, T, F, C), O = check_image(x, w)
    check(dy=(dy, pooled_shape(x.shape, O), np.float32), argmax=(argmax, dy.shape, np.uint8))
    dx: Array | None = None
    if need_dx:
        dx, none = empty((B, T, F, C)), empty((1,), np.uint8)
        convolve(dy, argmax, w, w, dx, none, T, F, False, CELLS)
    return (dx, *_weight_gradient(dy, argmax, x, O, True))
