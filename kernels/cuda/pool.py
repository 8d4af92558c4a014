"""2x2 max-pooling on its own, on the GPU. (In the networks, the convolution pools what is in its registers.)

Its floor is memory: 5.25 bytes for an element of x forward, and 5.25 backward.
"""

import numpy as np

from kernels.cuda.device import (
    Array,
    F,
    Flat,
    I,
    P,
    blocks_for,
    check,
    cuda,
    empty,
    float32,
    kernel,
)


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


def maxpool2x2_forward(x: Array) -> tuple[Array, Array]:
    """See `kernels.reference.maxpool2x2_forward`."""
    check(x=(x, x.shape, np.float32))
    _, T, F, C = x.shape
    y, argmax = empty(pooled_shape(x.shape, C)), empty(pooled_shape(x.shape, C), np.uint8)
    if y.size:
        _maxpool(blocks_for(y.size), x, y, argmax, y.size, T, F, C)
    return y, argmax


def maxpool2x2_backward(dy: Array, argmax: Array, x_shape: tuple[int, ...]) -> Array:
    """See `kernels.reference.maxpool2x2_backward`."""
    _, T, F, C = x_shape
    check(dy=(dy, pooled_shape(x_shape, C), np.float32), argmax=(argmax, dy.shape, np.uint8))
    dx = empty(x_shape)
    _maxpool_backward(blocks_for(dx.size), dy, argmax, dx, dx.size, T, F, C)
    return dx


def pooled_shape(shape: tuple[int, ...], channels: int) -> tuple[int, int, int, int]:
    """Of an image (B, T, F, .) behind pooling: (B, T//2, F//2, channels)."""
    return shape[0], shape[1] // 2, shape[2] // 2, channels
