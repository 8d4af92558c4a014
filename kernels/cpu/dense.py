"""Dense layers on the CPU.

Floors for x (N, I) and w (I, J): 2*N*I*J operations for each of the three products. With few rows and many weights
(the first LSTM of tdcnn: N = 128, I*J = 134 million) the weights themselves are the traffic: forward and dx read them
once, 4*I*J bytes; an update reads and writes w and v, 16*I*J bytes, and would move another 8*I*J for a gradient
written to memory and read again. `dense_update_weights` applies the gradient while it is in registers. Where most of
x is zeros, both multiply what is not (`kernels.cpu.sparse`).
"""

from kernels.cpu import sparse
from kernels.cpu.matmul import matmul, matmul_transposed, matmul_update
from kernels.cpu.sgd import sgd_update
from kernels.cpu.tools import Array, as_float32, check_in_place, check_shapes


def dense_forward(x: Array, w: Array, b: Array) -> Array:
    """See `kernels.reference.dense_forward`."""
    x, w, b = as_float32(x=x, w=w, b=b)
    check_shapes(w=(w, (x.shape[1], w.shape[1])), b=(b, w.shape[1:]))
    return (sparse.matmul if sparse.pays(x, w) else matmul)(x, w, b)


def dense_backward_input(dy: Array, w: Array, alive: Array | None = None) -> Array:
    """See `kernels.reference.dense_backward_input`."""
    dy, w = as_float32(dy=dy, w=w)
    check_shapes(w=(w, (w.shape[0], dy.shape[1])))
    if alive is not None:
        (alive,) = as_float32(alive=alive)
        check_shapes(alive=(alive, (len(dy), len(w))))
        if sparse.pays(alive, w, sparse.LISTED_DX) and w.shape[1] % sparse.WIDTH == 0:
            return sparse.matmul_transposed(dy, w, alive)
    return matmul_transposed(dy, w)


def dense_backward_weights(x: Array, dy: Array) -> Array:
    """See `kernels.reference.dense_backward_weights`."""
    x, dy = as_float32(x=x, dy=dy)
    check_shapes(dy=(dy, (len(x), dy.shape[1])))
    return matmul(x.T, dy)


def dense_backward_bias(dy: Array) -> Array:
    """See `kernels.reference.dense_backward_bias`."""
    (dy,) = as_float32(dy=dy)
    return dy.sum(axis=0)


def dense_update_weights(x: Array, dy: Array, w: Array, v: Array, lr: float, momentum: float) -> None:
    """See `kernels.reference.dense_update_weights`; w and v are C-contiguous, and changed in place."""
    x, dy = as_float32(x=x, dy=dy)
    check_in_place(w=w, v=v)
    check_shapes(dy=(dy, (len(x), dy.shape[1])), w=(w, (x.shape[1], dy.shape[1])), v=(v, w.shape))
    if sparse.pays(x, w):
        sparse.matmul_update(x, dy, w, v, lr, momentum)
    elif w.size > x.size + dy.size:
        matmul_update(x.T, dy, w, v, lr, momentum)
    else:  # a long sum for a small gradient: better blocked along the sum, and the gradient costs nothing to store
        sgd_update(w, v, matmul(x.T, dy), lr, momentum)
