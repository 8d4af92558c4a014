"""Dense layers on the GPU.

Each product is one call of `kernels.cuda.matmul`, which says how it is computed and what its floors are.
"""

import numpy as np

from kernels.cuda.device import (
    Array,
    F,
    Flat,
    I,
    check,
    cuda,
    empty,
    float32,
    kernel,
    multiprocessors,
)
from kernels.cuda.matmul import (
    ACROSS,
    BIAS,
    DOWN,
    PLAIN,
    SUM_THREADS,
    TURNED_A,
    TURNED_B,
    UPDATE,
    add_parts,
    product,
    whole,
)


@kernel((F, F, I, I, I), SUM_THREADS)
def _sum_rows(x: Flat, parts: Flat, rows: int, columns: int, part: int) -> None:
    """The sum of rows y*part to (y+1)*part of x, behind y*columns: ACROSS columns in a block, DOWN rows at a time."""
    collected = cuda.shared.array(SUM_THREADS, float32)
    t = cuda.threadIdx.x & (SUM_THREADS - 1)
    j = cuda.blockIdx.x * ACROSS + t % ACROSS
    first = cuda.blockIdx.y * part
    total = float32(0)
    if j < columns:
        for r in range(first + t // ACROSS, min(rows, first + part), DOWN):
            total += x[r * columns + j]
    collected[t] = total
    cuda.syncthreads()
    if t < ACROSS and j < columns:
        for other in range(1, DOWN):
            total += collected[other * ACROSS + t]
        parts[cuda.blockIdx.y * columns + j] = total


def dense_forward(x: Array, w: Array, b: Array) -> Array:
    """See `kernels.reference.dense_forward`."""
    N, I, J = *x.shape, w.shape[1]
    check(x=(x, (N, I), np.float32), w=(w, (I, J), np.float32), b=(b, (J,), np.float32))
    return product(whole(x), whole(w), N, J, I, PLAIN, BIAS, extra=b)


def dense_backward_input(dy: Array, w: Array, alive: Array | None = None) -> Array:
    """See `kernels.reference.dense_backward_input`."""
    N, I, J = dy.shape[0], *w.shape
    check(dy=(dy, (N, J), np.float32), w=(w, (I, J), np.float32))
    return product(whole(dy), whole(w), N, I, J, TURNED_B)


def dense_backward_weights(x: Array, dy: Array) -> Array:
    """See `kernels.reference.dense_backward_weights`."""
    N, I, J = *x.shape, dy.shape[1]
    check(x=(x, (N, I), np.float32), dy=(dy, (N, J), np.float32))
    return product(whole(x), whole(dy), I, J, N, TURNED_A)


def dense_backward_bias(dy: Array) -> Array:
    """See `kernels.reference.dense_backward_bias`."""
    N, J = dy.shape
    check(dy=(dy, (N, J), np.float32))
    strips = max(1, -(-J // ACROSS))
    count = max(1, min(4 * multiprocessors() // strips, N // (4 * DOWN)))
    part = -(-N // count)
    parts, db = empty((count, J)), empty((J,))
    _sum_rows((strips, count, 1), dy, parts, N, J, part)
    add_parts(parts, count, db)
    return db


def dense_update_weights(x: Array, dy: Array, w: Array, v: Array, lr: float, momentum: float) -> None:
    """See `kernels.reference.dense_update_weights`."""
    N, I, J = *x.shape, dy.shape[1]
    check(x=(x, (N, I), np.float32), dy=(dy, (N, J), np.float32), w=(w, (I, J), np.float32), v=(v, (I, J), np.float32))
    product(whole(x), whole(dy), I, J, N, TURNED_A, UPDATE, out=w, extra=v, lr=lr, momentum=momentum)
