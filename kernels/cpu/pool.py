"""2x2 max-pooling: on its own, and of the registers of a fused convolution, as the networks use it.

On its own its floor is memory, 5.25 bytes for an element of x, and it comes to 64 % of the bandwidth forward and 25 %
backward, where dx is filled with zeros first (2 cores of an AMD EPYC); the networks never call it.
"""

import numba as nb
import numpy as np
from numpy.typing import NDArray

from kernels.cpu.simd import Bytes, Emitter, Ptr, Vec
from kernels.cpu.tools import Array, as_float32, as_places, check_shapes, compiled
from kernels.reference import DEAD


def store_pooled(k: Emitter, pixels: list[Vec], y: Ptr, argmax: Bytes) -> None:
    """ReLU and the maximum of a cell's four pixels, a vector of channels each, for the fused convolutions.

    Of a cell with a NaN, which the reference names as its maximum, argmax may name another pixel.
    """
    best, place = pixels[0], k.ints(0)
    for n in range(1, 4):
        larger = pixels[n] > best
        best, place = k.where(larger, pixels[n], best), k.where(larger, k.ints(n), place)
    dead = best <= 0.0
    undefined = pixels[0].unordered(pixels[1]) | pixels[2].unordered(pixels[3])
    k.store(y, k.where(undefined, float("nan"), k.where(dead, 0.0, best)))
    k.store_bytes(argmax, k.where(undefined, place, k.where(dead, k.ints(DEAD), place)))  # a NaN is never dead


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
