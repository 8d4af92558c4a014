"""Dropout, ReLU and the softmax cross-entropy on the GPU.

The floor of the first two is memory, 8 bytes per element, 12 for ReLU's gradient. The loss is a handful of classes: one
small block.
"""

import math

import numpy as np

from kernels import reference
from kernels.cuda.device import (
    SIMULATED,
    Array,
    F,
    Flat,
    I,
    N,
    R,
    blocks_for,
    check,
    cuda,
    empty,
    float32,
    helper,
    kernel,
)
from kernels.reference import dropout_key

__all__ = [
    "cross_entropy_backward",
    "cross_entropy_forward",
    "dropout",
    "dropout_key",
    "relu_backward",
    "relu_forward",
    "softmax",
]

LOSS_THREADS = 4 if SIMULATED else 128


@helper
def hash32(x: int) -> int:
    """See `kernels.reference._hash32`; in 64-bit integers, of whose products the lower 32 bits are right."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


@kernel((F, F, I, I, I, I, R))
def _dropout(x: Flat, y: Flat, n: int, key0: int, key1: int, threshold: int, scale: float) -> None:
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        word = hash32((hash32((e & 0xFFFFFFFF) ^ key0) + key1) & 0xFFFFFFFF)
        y[e] = x[e] * scale if word >= threshold else float32(0)


@helper
def softmax_row(logits: Flat, p: Flat, at: int, K: int, target: int, smoothing: float) -> float:
    """p of the row that begins at `at`; returns the loss of this target: differences first, so that nothing cancels."""
    largest = logits[at]
    for k in range(1, K):
        largest = max(largest, logits[at + k])
    total = float32(0)
    for k in range(K):
        total += math.exp(logits[at + k] - largest)
    for k in range(K):
        p[at + k] = math.exp(logits[at + k] - largest) / total
    below = largest - logits[at + target]
    if smoothing > float32(0):
        sum_below = float32(0)
        for k in range(K):
            sum_below += largest - logits[at + k]
        below = (float32(1) - smoothing) * below + smoothing * (sum_below / float32(K))
    return below + math.log(total)


@kernel((F, F, I, I))
def _softmax(logits: Flat, p: Flat, B: int, K: int) -> None:
    for n in range(cuda.grid(1), B, cuda.gridsize(1)):
        softmax_row(logits, p, n * K, K, 0, float32(0))


@kernel((F, N, F, F, I, I, R), LOSS_THREADS)
def _cross_entropy(logits: Flat, targets: Flat, p: Flat, loss: Flat, B: int, K: int, smoothing: float) -> None:
    """One block: every thread takes every LOSS_THREADS-th row, and the first adds up what they have."""
    collected = cuda.shared.array(LOSS_THREADS, float32)
    t = cuda.threadIdx.x
    mine = float32(0)
    for n in range(t, B, LOSS_THREADS):
        mine += softmax_row(logits, p, n * K, K, targets[n], smoothing)
    collected[t] = mine
    cuda.syncthreads()
    if t == 0:
        total = float32(0)
        for other in range(LOSS_THREADS):
            total += collected[other]
        loss[0] = total / float32(B)


@kernel((F, N, F, I, I, R))
def _cross_entropy_backward(p: Flat, targets: Flat, dlogits: Flat, B: int, K: int, smoothing: float) -> None:
    for e in range(cuda.grid(1), B * K, cuda.gridsize(1)):
        wanted = smoothing / float32(K)
        if e % K == targets[e // K]:
            wanted += float32(1) - smoothing
        dlogits[e] = (p[e] - wanted) / float32(B)


@kernel((F, F, I))
def _relu(x: Flat, y: Flat, n: int) -> None:
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        y[e] = float32(0) if x[e] < 0 else x[e]


@kernel((F, F, F, I))
def _relu_backward(dy: Flat, y: Flat, dx: Flat, n: int) -> None:
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        dx[e] = dy[e] if y[e] > 0 else float32(0)


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


def dropout(x: Array, rate: float, key: tuple[int, int]) -> Array:
    """See `kernels.reference.dropout`."""
    check(x=(x, x.shape, np.float32))
    y = empty(x.shape)
    threshold = reference.dropout_threshold(rate)
    _dropout(blocks_for(x.size), x, y, x.size, key[0], key[1], threshold, 1 / (1 - rate))
    return y


def softmax(logits: Array) -> Array:
    """See `kernels.reference.softmax`."""
    B, K = logits.shape
    check(logits=(logits, (B, K), np.float32))
    p = empty((B, K))
    _softmax(blocks_for(B), logits, p, B, K)
    return p


def cross_entropy_forward(logits: Array, targets: Array, smoothing: float = 0.0) -> tuple[Array, Array]:
    """See `kernels.reference.cross_entropy_forward`; the loss stays on the device: `float` waits for it."""
    B, K = logits.shape
    check(logits=(logits, (B, K), np.float32), targets=(targets, (B,), np.int32))
    loss, p = empty(()), empty((B, K))
    _cross_entropy(1, logits, targets, p, loss, B, K, smoothing)
    return loss, p


def cross_entropy_backward(p: Array, targets: Array, smoothing: float = 0.0) -> Array:
    """See `kernels.reference.cross_entropy_backward`."""
    B, K = p.shape
    check(p=(p, (B, K), np.float32), targets=(targets, (B,), np.int32))
    dlogits = empty((B, K))
    _cross_entropy_backward(blocks_for(B * K), p, targets, dlogits, B, K, smoothing)
    return dlogits
