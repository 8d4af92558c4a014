"""Strips: the image rows behind BAND rows of pooling cells, with the zero padding around them, in a scratch.

A strip stays in the cache while all kernels of a convolution read it, and nothing else knows about the image's edges
and odd sizes.
"""

from kernels.cpu.simd import LANES, Emitter, Int, Ptr, kernel
from kernels.cpu.tools import Array, compiled, scratch

BAND = 4  # rows of pooling cells that share a strip


@kernel
def copy_vectors(k: Emitter, source: Ptr, target: Ptr, vectors: Int) -> None:
    for i in k.range(vectors):
        k.store(target + i * LANES, k.load(source + i * LANES))


@kernel
def copy_floats(k: Emitter, source: Ptr, target: Ptr, n: Int) -> None:
    for i in k.range(n):
        k.store_float(target + i, k.splat(source + i))


@compiled
def copy(source: int, target: int, n: int) -> None:
    """Copy n floats between addresses. (Assigning a slice takes Numba seconds to compile; its loops copy singly.)"""
    copy_vectors(source, target, n // LANES)
    whole = n // LANES * LANES
    copy_floats(source + 4 * whole, target + 4 * whole, n - whole)


@compiled
def fill_strip(x: Array, C: int, n: int, p: int, rows: int, strip: Array) -> None:
    """Copy the image rows from 2p-1 on, of image n of x (B, T, F*C), to strip (rows, row), one pixel to the right.

    Zeros stand for what lies outside of the image.
    """
    T, width = x.shape[1:]
    for r in range(rows):
        t = 2 * p - 1 + r
        inside = width if 0 <= t < T else 0
        for i in range(C):
            strip[r, i] = 0
        copy(x.ctypes.data + 4 * (n * T + t) * width, strip.ctypes.data + 4 * (r * strip.shape[1] + C), inside)
        for i in range(C + inside, strip.shape[1]):
            strip[r, i] = 0


def rows_of(x: Array) -> Array:
    """(B, T, F, C) -> (B, T, F*C)."""
    B, T, F, C = x.shape
    return x.reshape(B, T, F * C)


def new_strips(count: int, F: int, C: int) -> Array:
    return scratch(count, 2 * BAND + 2, (F + 2 + F % 2) * C)
