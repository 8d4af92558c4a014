"""The SGD step on the GPU.

Its floor is memory: 20 bytes for a weight. (A layer's own step is fused behind the product that makes its gradient.)
"""

import numpy as np

from kernels.cuda.device import (
    Array,
    F,
    Flat,
    I,
    R,
    blocks_for,
    check,
    cuda,
    kernel,
)


@kernel((F, F, F, I, R, R))
def _sgd(w: Flat, v: Flat, dw: Flat, n: int, lr: float, momentum: float) -> None:
    for e in range(cuda.grid(1), n, cuda.gridsize(1)):
        change = momentum * v[e] - lr * dw[e]
        v[e] = change
        w[e] += change


def sgd_update(w: Array, v: Array, dw: Array, lr: float, momentum: float) -> None:
    """See `kernels.reference.sgd_update`."""
    check(w=(w, w.shape, np.float32), v=(v, w.shape, np.float32), dw=(dw, w.shape, np.float32))
    _sgd(blocks_for(w.size), w, v, dw, w.size, lr, momentum)
