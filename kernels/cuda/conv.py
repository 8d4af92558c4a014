"""3x3 convolution, ReLU and 2x2 max-pooling on the GPU, channels last.

Forward, a block of threads holds a tile of the image, with its rim, in shared memory, a few channels at a time, and
their weights. A thread owns one 2x2 cell and several output channels: for each input channel it reads the 4x4 pixels
around its cell once and uses them for nine taps. So bias, ReLU, pooling and the place of the maximum need nothing but
the thread's registers, and the map before pooling never exists. The gradient of the input is the same convolution, of
the gradient of that map; its pixels, of which pooling leaves one in four, are made from dy and argmax when a tile is
read.

The gradient of the weights visits only the pixel of each cell that was the maximum: one lane per output channel, a
quarter of the dense arithmetic. Blocks add up their shares of the image on their own, and `add_parts` adds those in a
fixed order.

Floors, dense: 18*B*T*F*C*O operations for each of forward, dx and dw.
"""

from typing import Any

import numpy as np

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
    store4,
    uint8,
)
from kernels.cuda.matmul import add_parts
from kernels.reference import DEAD

IMAGE, CELLS = "image", "cells"  # what is convolved: an image, or the gradient of one, given by pooled cells

# The convolution's tile: cells down and across, output channels of a thread and of a block.
TILE_T, TILE_F, PER_THREAD, PER_BLOCK = (2, 2, 4, 8) if SIMULATED else (8, 8, 8, 32)
# The weight gradient's output channels (lanes), and groups of lanes of a block.
LANES, GROUPS = (4, 2) if SIMULATED else (32, 8)


# --- the convolution ---------------------------------------------------------------------------------------------


def make_convolution(chunk: int, source: str, pooled: bool, name: str) -> Kernel:
    """y = conv3x3(x, w) + b, ReLU and pooling behind it if `pooled`; `chunk` input channels at a time.

    source IMAGE: x (B, T, F, C), w (3, 3, C, O). source CELLS: x (B, T//2, F//2, C) and argmax stand for the map
    (B, T, F, C) that they are the gradient of; w (3, 3, O, C) is turned by 180 degrees, its channels exchanged, and
    there is no bias. Blocks: (tiles across, tiles down, B * tiles of output channels).
    """
    rows, pitch = 2 * TILE_T + 2, 2 * TILE_F + 2
    plane, cells, groups = rows * pitch, TILE_T * TILE_F, PER_BLOCK // PER_THREAD
    threads, x_size, w_size, sums = cells * groups, chunk * plane, 9 * chunk * PER_BLOCK, 4 * PER_THREAD
    from_cells, quads = source == CELLS, PER_THREAD // 4
    per_thread, per_block, tile_t, tile_f = PER_THREAD, PER_BLOCK, TILE_T, TILE_F
    rim_cells = (TILE_T + 2) * (TILE_F + 2)
    at_once = max(1, min(threads // chunk, 32 if chunk == 1 else 8))  # columns that are read at once

    @kernel((F, P, F, F, F, P, S, S, S, S), threads, name, resident=2)
    def convolution(
        x: Flat, x_argmax: Flat, w: Flat, b: Flat, y: Flat, y_argmax: Flat, T: int, F: int, C: int, O: int
    ) -> None:
        x_tile = cuda.shared.array(x_size, float32, ALIGN)  # (chunk, rows, pitch)
        w_tile = cuda.shared.array(w_size, float32, ALIGN)  # (chunk, 9, per_block)
        acc = cuda.local.array(sums, float32)  # (2x2 pixels, per_thread)
        patch, taps = cuda.local.array(16, float32), cuda.local.array(per_thread, float32)
        bests, places = cuda.local.array(4, float32), cuda.local.array(4, uint8)
        t = cuda.threadIdx.x & (threads - 1)
        # Groups of output channels are neighbours: what a warp writes lies together in memory.
        cell, group = t // groups, t % groups
        ct, cf = cell // tile_f, cell % tile_f
        strips = (O + per_block - 1) // per_block
        n, o0 = cuda.blockIdx.z // strips, cuda.blockIdx.z % strips * per_block
        t0, f0 = cuda.blockIdx.y * 2 * tile_t, cuda.blockIdx.x * 2 * tile_f
        line = int32(F * C)
        for i in range(sums):
            acc[i] = float32(0)
        for c0 in range(0, C, chunk):
            cuda.syncthreads()
            if from_cells:  # a cell's gradient goes to one of its four pixels
                for e in range(t, rim_cells * chunk, threads):
                    c, row, column = e % chunk, e // chunk // (tile_f + 2) - 1, e // chunk % (tile_f + 2) - 1
                    value, place = float32(0), DEAD
                    if (
                        c0 + c < C
                        and t0 // 2 + row >= 0 and t0 // 2 + row < T // 2
                        and f0 // 2 + column >= 0 and f0 // 2 + column < F // 2
                    ):  # fmt: skip
                        at = ((n * (T // 2) + t0 // 2 + row) * (F // 2) + f0 // 2 + column) * C + c0 + c
                        value, place = x[index(at)], int64(x_argmax[index(at)])
                    for p in range(4):
                        tt, ff = 2 * row + 1 + p // 2, 2 * column + 1 + p % 2
                        if tt >= 0 and tt < rows and ff >= 0 and ff < pitch:
                            x_tile[index(c * plane + tt * pitch + ff)] = value if place == p else float32(0)
            else:
                c = t % chunk  # channels are neighbours in memory, pixels in the tile
                corner = ((n * T + t0 - 1) * F + f0 - 1) * C + c0 + c
                for row in range(t // chunk // at_once, rows, threads // (chunk * at_once)):
                    inside = c0 + c < C and t0 + row > 0 and t0 + row <= T
                    for column in range(t // chunk % at_once, pitch, at_once):
                        value = float32(0)
                        if inside and f0 + column > 0 and f0 + column <= F:
                            value = x[index(corner + row * line + column * C)]
                        x_tile[index(c * plane + row * pitch + column)] = value
            o = t % per_block
            for c in range(t // per_block, chunk, threads // per_block):
                for tap in range(9):
                    value = float32(0)
                    if c0 + c < C and o0 + o < O:
                        if from_cells:
                            value = w[index(((8 - tap) * O + o0 + o) * C + c0 + c)]
                        else:
                            value = w[index((tap * C + c0 + c) * O + o0 + o)]
                    w_tile[index((c * 9 + tap) * per_block + o)] = value
            cuda.syncthreads()
            for c in range(chunk):
                for i in range(16):
                    patch[i] = x_tile[index(c * plane + (2 * ct + i // 4) * pitch + 2 * cf + i % 4)]
                for tap in range(9):
                    for q in range(quads):
                        at = (c * 9 + tap) * per_block + 4 * (groups * q + group)
                        taps[4 * q], taps[4 * q + 1], taps[4 * q + 2], taps[4 * q + 3] = load4(w_tile, at)
                    for p in range(4):
                        for j in range(per_thread):
                            acc[p * per_thread + j] += patch[(p // 2 + tap // 3) * 4 + p % 2 + tap % 3] * taps[j]
        for q in range(quads):
            o = o0 + 4 * (groups * q + group)
            if not from_cells:
                for l in range(4):
                    if o + l < O:
                        bias = b[index(o + l)]
                        for p in range(4):
                            acc[p * per_thread + 4 * q + l] += bias
            if pooled:
                if t0 // 2 + ct < T // 2 and f0 // 2 + cf < F // 2:
                    for l in range(4):
                        best, place = acc[4 * q + l], 0
                        for p in range(1, 4):
                            value = acc[p * per_thread + 4 * q + l]
                            if value > best or (value != value and best == best):  # not-a-number wins, as in NumPy
                                best, place = value, p
                        if best <= 0:
                            best, place = float32(0), DEAD
                        bests[l], places[l] = best, uint8(place)
                    at = ((n * (T // 2) + t0 // 2 + ct) * (F // 2) + f0 // 2 + cf) * O + o
                    if O % 4 == 0:
                        if o < O:
                            store4(y, at, bests[0], bests[1], bests[2], bests[3])
                            store4(y_argmax, at, places[0], places[1], places[2], places[3])
                    else:
                        for l in range(4):
                            if o + l < O:
                                y[index(at + l)] = bests[l]
                                y_argmax[index(at + l)] = places[l]
            else:
                for p in range(4):
                    tt, ff, e = t0 + 2 * ct + p // 2, f0 + 2 * cf + p % 2, p * per_thread + 4 * q
                    if tt < T and ff < F:
                        at = ((n * T + tt) * F + ff) * O + o
                        if O % 4 == 0:
                            if o < O:
                                store4(y, at, acc[e], acc[e + 1], acc[e + 2], acc[e + 3])
                        else:
                            for l in range(4):
                                if o + l < O:
                                    y[index(at + l)] = acc[e + l]

    return convolution


# A spectrogram has one channel; everything else is read eight channels at a time.
CHUNK = 2 if SIMULATED else 8
CONVOLUTIONS = {
    (1, IMAGE, True): make_convolution(1, IMAGE, True, "conv_relu_pool_1"),
    (CHUNK, IMAGE, True): make_convolution(CHUNK, IMAGE, True, "conv_relu_pool_many"),
    (CHUNK, IMAGE, False): make_convolution(CHUNK, IMAGE, False, "conv3x3"),
    (CHUNK, CELLS, False): make_convolution(CHUNK, CELLS, False, "conv_relu_pool_dx"),
}


def _convolve(
    x: Array, x_argmax: Array, w: Array, b: Array, y: Array, y_argmax: Array, T: int, F: int, pooled: bool, source: str
) -> None:
    B, C, O = x.shape[0], x.shape[3], y.shape[3]
    run = CONVOLUTIONS[1 if C == 1 and (1, source, pooled) in CONVOLUTIONS else CHUNK, source, pooled]
    blocks = (-(-F // (2 * TILE_F)), -(-T // (2 * TILE_T)), B * -(-O // PER_BLOCK))
    run(blocks, x, x_argmax, w, b, y, y_argmax, T, F, C, O)


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
    blocks = (count, -(-C // strip), -(-O // LANES))
    WEIGHT_GRADIENTS[single, pooled](blocks, dy, argmax, x, parts, B, T, F, C, O)
    add_parts(parts, count, both)
    return both[: 9 * C * O].reshape(3, 3, C, O), both[9 * C * O :]


# --- ReLU and pooling on their own -------------------------------------------------------------------------------


@kernel((F, F, I))
def _relu(x: Flat, y: Flat, n: int) -> None:
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        y[e] = float32(0) if x[e] < 0 else x[e]


@kernel((F, F, F, I))
def _relu_backward(dy: Flat, y: Flat, dx: Flat, n: int) -> None:
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        dx[e] = dy[e] if y[e] > 0 else float32(0)


@kernel((F, F, P, I, I, I, I))
def _maxpool(x: Flat, y: Flat, argmax: Flat, n: int, T: int, F: int, C: int) -> None:
    """n = B * T//2 * F//2 * C results."""
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        c, cell = e % C, e // C
        cf, row = cell % (F // 2), cell // (F // 2)
        first = ((row // (T // 2) * T + 2 * (row % (T // 2))) * F + 2 * cf) * C + c
        best, place = x[first], 0
        for p in range(1, 4):
            value = x[first + (p // 2 * F + p % 2) * C]
            if value > best or (value != value and best == best):
                best, place = value, p
        y[e] = best
        argmax[e] = place


@kernel((F, P, F, I, I, I, I))
def _maxpool_backward(dy: Flat, argmax: Flat, dx: Flat, n: int, T: int, F: int, C: int) -> None:
    """n = B * T * F * C results."""
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        c, pixel = e % C, e // C
        f, row = pixel % F, pixel // F
        t, b = row % T, row // T
        value = float32(0)
        if t // 2 < T // 2 and f // 2 < F // 2:
            at = ((b * (T // 2) + t // 2) * (F // 2) + f // 2) * C + c
            if argmax[at] == t % 2 * 2 + f % 2:
                value = dy[at]
        dx[e] = value


# --- the operations ----------------------------------------------------------------------------------------------


def _check_image(x: Array, w: Array) -> tuple[tuple[int, int, int, int], int]:
    """((B, T, F, C), O) of an image and a kernel that fit together."""
    check(x=(x, (*x.shape[:3], w.shape[2]), np.float32), w=(w, (3, 3, *w.shape[2:]), np.float32))
    B, T, F, C = x.shape
    return (B, T, F, C), w.shape[3]


def _halved(shape: tuple[int, ...], channels: int) -> tuple[int, int, int, int]:
    return shape[0], shape[1] // 2, shape[2] // 2, channels


def conv3x3_forward(x: Array, w: Array, b: Array) -> Array:
    """See `kernels.reference.conv3x3_forward`."""
    (B, T, F, _), O = _check_image(x, w)
    check(b=(b, (O,), np.float32))
    y, none = empty((B, T, F, O)), empty((1,), np.uint8)
    _convolve(x, none, w, b, y, none, T, F, False, IMAGE)
    return y


def conv3x3_backward(dy: Array, x: Array, w: Array, need_dx: bool = True) -> tuple[Array | None, Array, Array]:
    """See `kernels.reference.conv3x3_backward`. No network here uses it: dx is made from turned weights."""
    (B, T, F, C), O = _check_image(x, w)
    check(dy=(dy, (B, T, F, O), np.float32))
    none = empty((1,), np.uint8)
    dw, db = _weight_gradient(dy, none, x, O, False)
    if not need_dx:
        return None, dw, db
    turned, zeros, dx = empty((3, 3, O, C)), empty((C,)), empty((B, T, F, C))
    _turn(blocks_for(w.size), w, turned, zeros, w.size, C, O)
    _convolve(dy, none, turned, zeros, dx, none, T, F, False, IMAGE)
    return dx, dw, db


@kernel((F, F, F, I, I, I))
def _turn(w: Flat, turned: Flat, zeros: Flat, n: int, C: int, O: int) -> None:
    """turned (3, 3, O, C): w (3, 3, C, O) by 180 degrees, channels exchanged; zeros (C) is filled."""
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        c, o, tap = e % C, e // C % O, e // C // O
        turned[e] = w[((8 - tap) * C + c) * O + o]
        if e < C:
            zeros[e] = float32(0)


def relu_forward(x: Array) -> Array:
    """See `kernels.reference.relu_forward`."""
    check(x=(x, x.shape, np.float32))
    y = empty(x.shape)
    _relu(blocks_for(x.size), x, y, x.size)
    return y


def relu_backward(dy: Array, y: Array) -> Array:
    """See `kernels.reference.relu_backward`."""
    check(dy=(dy, y.shape, np.float32), y=(y, y.shape, np.float32))
    dx = empty(y.shape)
    _relu_backward(blocks_for(y.size), dy, y, dx, y.size)
    return dx


def maxpool2x2_forward(x: Array) -> tuple[Array, Array]:
    """See `kernels.reference.maxpool2x2_forward`."""
    check(x=(x, x.shape, np.float32))
    _, T, F, C = x.shape
    y, argmax = empty(_halved(x.shape, C)), empty(_halved(x.shape, C), np.uint8)
    if y.size:
        _maxpool(blocks_for(y.size), x, y, argmax, y.size, T, F, C)
    return y, argmax


def maxpool2x2_backward(dy: Array, argmax: Array, x_shape: tuple[int, ...]) -> Array:
    """See `kernels.reference.maxpool2x2_backward`."""
    _, T, F, C = x_shape
    check(dy=(dy, _halved(x_shape, C), np.float32), argmax=(argmax, dy.shape, np.uint8))
    dx = empty(x_shape)
    _maxpool_backward(blocks_for(dx.size), dy, argmax, dx, dx.size, T, F, C)
    return dx


def conv_relu_pool_forward(x: Array, w: Array, b: Array) -> tuple[Array, Array]:
    """See `kernels.reference.conv_relu_pool_forward`."""
    (_, T, F, _), O = _check_image(x, w)
    check(b=(b, (O,), np.float32))
    y, argmax, none = empty(_halved(x.shape, O)), empty(_halved(x.shape, O), np.uint8), empty((1,), np.uint8)
    if y.size:
        _convolve(x, none, w, b, y, argmax, T, F, True, IMAGE)
    return y, argmax


def conv_relu_pool_backward(
    dy: Array, argmax: Array, x: Array, w: Array, need_dx: bool = True
) -> tuple[Array | None, Array, Array]:
    """See `kernels.reference.conv_relu_pool_backward`."""
    (B, T, F, C), O = _check_image(x, w)
    check(dy=(dy, _halved(x.shape, O), np.float32), argmax=(argmax, dy.shape, np.uint8))
    dx: Array | None = None
    if need_dx:
        dx, none = empty((B, T, F, C)), empty((1,), np.uint8)
        _convolve(dy, argmax, w, w, dx, none, T, F, False, CELLS)
    return (dx, *_weight_gradient(dy, argmax, x, O, True))
