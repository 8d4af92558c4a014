"""Dropout, ReLU and the softmax cross-entropy on the CPU.

The floor is memory: 8 bytes per element, 12 for ReLU's gradient. Dropout's mask costs two hashes, computed in vectors;
it comes to 40 % of the bandwidth, ReLU and its gradient to 64 and 66 % (2 cores of an AMD EPYC). The softmax is over a
handful of classes and takes no time that matters; it is the reference's own code, in float32.
"""

import numba as nb
import numpy as np

from kernels import reference
from kernels.cpu.tools import Array, as_float32, check_shapes, compiled
from kernels.reference import cross_entropy_backward, cross_entropy_forward, dropout_key, softmax

__all__ = [
    "cross_entropy_backward",
    "cross_entropy_forward",
    "dropout",
    "dropout_key",
    "relu_backward",
    "relu_forward",
    "softmax",
]


@compiled
def _hash32(x: np.uint32) -> np.uint32:
    """See `kernels.reference._hash32`."""
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@compiled(parallel=True)
def _dropout(x: Array, y: Array, key0: np.uint32, key1: np.uint32, threshold: np.uint32, scale: np.float32) -> None:
    for e in nb.prange(x.size):
        word = _hash32(np.uint32(_hash32(np.uint32(np.uint32(e) ^ key0)) + key1))
        y[e] = x[e] * scale if word >= threshold else np.float32(0)


def dropout(x: Array, rate: float, key: tuple[int, int]) -> Array:
    """See `kernels.reference.dropout`."""
    (x,) = as_float32(x=x)
    y = np.empty_like(x)
    threshold, scale = np.uint32(reference.dropout_threshold(rate)), np.float32(1 / (1 - rate))
    _dropout(x.reshape(-1), y.reshape(-1), np.uint32(key[0]), np.uint32(key[1]), threshold, scale)
    return y


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
