"""3x3 convolution, ReLU and 2x2 max-pooling on the GPU, channels last.

A block of threads holds a tile of the image, with its rim, in shared memory, a few channels at a time, and their
weights. A thread owns one 2x2 cell and several output channels: for each input channel it reads the 4x4 pixels around
its cell once and uses them for nine taps. So bias, ReLU, pooling and the place of the maximum need nothing but the
thread's registers, and the map before pooling never exists.

The gradient of the input is the same convolution (see `kernels.cuda.conv_gradients`), of the gradient of that map; its
pixels, of which pooling leaves one in four, are made from dy and argmax when a tile is read.

Floor, dense: 18*B*T*F*C*O operations.
"""

import numpy as np

from kernels.cuda.device import (
    ALIGN,
    SIMULATED,
    Array,
    F,
    Flat,
    Kernel,
    P,
    S,
    check,
    cuda,
    empty,
    float32,
    index,
    int32,
    int64,
    kernel,
    load4,
    store4,
    uint8,
)
from kernels.cuda.pool import pooled_shape
from kernels.reference import DEAD

IMAGE, CELLS = "image", "cells"  # what is convolved: an image, or the gradient of one, given by pooled cells

# The convolution's tile: cells down and across, output channels of a thread and of a block.
TILE_T, TILE_F, PER_THREAD, PER_BLOCK = (2, 2, 4, 8) if SIMULATED else (8, 8, 8, 32)

MOST_BLOCKS = 65535  # of a launch, in its third dimension


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


def convolve(
    x: Array, x_argmax: Array, w: Array, b: Array, y: Array, y_argmax: Array, T: int, F: int, pooled: bool, source: str
) -> None:
    """Fill y (and y_argmax) for images of T x F pixels; operands as in `make_convolution`, one number where unused."""
    B, C, O = x.shape[0], x.shape[3], y.shape[3]
    most = max(1, MOST_BLOCKS // max(1, -(-O // PER_BLOCK)))  # images
    if most < B:
        for n in range(0, B, most):
            xs, places, ys, argmax = (a[n : n + most] if a.ndim == 4 else a for a in (x, x_argmax, y, y_argmax))
            convolve(xs, places, w, b, ys, argmax, T, F, pooled, source)
        return
    run = CONVOLUTIONS[1 if C == 1 and (1, source, pooled) in CONVOLUTIONS else CHUNK, source, pooled]
    blocks = (-(-F // (2 * TILE_F)), -(-T // (2 * TILE_T)), B * -(-O // PER_BLOCK))
    run(blocks, x, x_argmax, w, b, y, y_argmax, T, F, C, O)


# --- the operations ----------------------------------------------------------------------------------------------


def check_image(x: Array, w: Array) -> tuple[tuple[int, int, int, int], int]:
    """((B, T, F, C), O) of an image and a kernel that fit together."""
    check(x=(x, (*x.shape[:3], w.shape[2]), np.float32), w=(w, (3, 3, *w.shape[2:]), np.float32))
    B, T, F, C = x.shape
    return (B, T, F, C), w.shape[3]


def conv3x3_forward(x: Array, w: Array, b: Array) -> Array:
    """See `kernels.reference.conv3x3_forward`."""
    (B, T, F, _), O = check_image(x, w)
    check(b=(b, (O,), np.float32))
    y, none = empty((B, T, F, O)), empty((1,), np.uint8)
    convolve(x, none, w, b, y, none, T, F, False, IMAGE)
    return y


def conv_relu_pool_forward(x: Array, w: Array, b: Array) -> tuple[Array, Array]:
    """See `kernels.reference.conv_relu_pool_forward`."""
    (_, T, F, _), O = check_image(x, w)
    check(b=(b, (O,), np.float32))
    y, argmax, none = empty(pooled_shape(x.shape, O)), empty(pooled_shape(x.shape, O), np.uint8), empty((1,), np.uint8)
    if y.size:
        convolve(x, none, w, b, y, argmax, T, F, True, IMAGE)
    return y, argmax
