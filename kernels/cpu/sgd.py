"""The SGD step on the CPU: of a number, of a vector in registers, of an array.

A weight that gets no gradient any more, its unit being dead, leaves its velocity to the momentum. That takes it down to
the denormal numbers, and there it stays, for 0.8 times the smallest of them is rounded to itself; and a vector that
holds such a number takes a processor many times as long as another. So a velocity nearer to 0 than TINY becomes 0. What
it would have moved is lost on any weight of more than 1e-22.

The floor of the step of an array is memory, 20 bytes for a weight; it comes to 90 % of the bandwidth (2 cores of an AMD
EPYC).
"""

import numba as nb
import numpy as np

from kernels.cpu.simd import Emitter, Ptr, Vec
from kernels.cpu.tools import Array, as_float32, check_in_place, check_shapes, compiled

TINY = 1e-30


@compiled
def velocity_after(v: np.float32, dw: np.float32, lr: np.float32, momentum: np.float32) -> np.float32:
    """momentum * v - lr * dw, of numbers."""
    v = momentum * v - lr * dw
    return np.float32(0) if abs(v) < np.float32(TINY) else v


def sgd_step(k: Emitter, w: Ptr, v: Ptr, dw: Vec, lr: Vec, momentum: Vec) -> None:
    """v <- momentum * v - lr * dw; w <- w + v, of the vectors at w and v."""
    after = momentum * k.load(v) - lr * dw
    after = k.where(abs(after) < TINY, 0.0, after)
    k.store(v, after)
    k.store(w, k.load(w) + after)


@compiled(parallel=True)
def _update(w: Array, v: Array, dw: Array, lr: np.float32, momentum: np.float32) -> None:
    for i in nb.prange(w.size):
        v[i] = velocity_after(v[i], dw[i], lr, momentum)
        w[i] += v[i]


def sgd_update(w: Array, v: Array, dw: Array, lr: float, momentum: float) -> None:
    """See `kernels.reference.sgd_update`; w and v are C-contiguous, and changed in place."""
    (dw,) = as_float32(dw=dw)
    check_in_place(w=w, v=v)
    check_shapes(w=(w, dw.shape), v=(v, dw.shape))
    _update(w.reshape(-1), v.reshape(-1), dw.reshape(-1), np.float32(lr), np.float32(momentum))
