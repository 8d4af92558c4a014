"""The backward pass of `kernels.cpu.lstm`: the gradient of the pre-activations, from the last step to the first.

Floor for dz (B, T, 4H): 2*B*T*H*4H operations, for what each step hands back to the one before. As forward, a thread
walks its share of the sequences through all steps, with the recurrent weights packed in the order of their use; where
packing would not pay, there is a product for each step. At batch 32 with 128 steps of 128 units it comes to 60 % of the
peak (2 cores of an AMD EPYC, 545 GFLOP/s); what passes through memory and the gates' own arithmetic take the rest.
"""

import numba as nb
import numpy as np

from kernels.cpu.lstm import UNITS, by_steps, cut_gates, pad_gates, pad_units
from kernels.cpu.matmul import ROWS, add_product_of_row, add_product_of_rows, matmul_transposed, transposed_panels
from kernels.cpu.simd import LANES, Emitter, Int, Ptr, kernel, tanh
from kernels.cpu.tools import Array, as_float32, check_shapes, compiled, round_up


@kernel
def gate_gradients(
    k: Emitter, dh: Ptr, dh_next: Ptr, dc: Ptr, c: Ptr, c_before: Ptr, gates: Ptr, dz: Ptr, units: Int, groups: Int
) -> None:
    """One step of one sequence: dz, and dc for the step before, from dh and what came back (dh_next, dc)."""
    for n in k.range(groups):
        u = n * LANES
        i, f, g, o = (k.load(gates + u + units * m) for m in range(4))
        tanh_c = tanh(k, k.load(c + u))
        dh_t = k.load(dh + u) + k.load(dh_next + u)
        dc_t = k.load(dc + u) + dh_t * o * (1.0 - tanh_c * tanh_c)
        k.store(dz + u, dc_t * g * i * (1.0 - i))
        k.store(dz + u + units, dc_t * k.load(c_before + u) * f * (1.0 - f))
        k.store(dz + u + units * 2, dc_t * i * (1.0 - g * g))
        k.store(dz + u + units * 3, dh_t * tanh_c * o * (1.0 - o))
        k.store(dc + u, dc_t * f)


@compiled(parallel=True)
def _backward(
    dh: Array, gates: Array, c: Array, wh_t: Array, zeros: Array, dh_next: Array, dc: Array, dz: Array, threads: int
) -> None:
    """dh, c (B, T, H), gates, dz (B, T, 4H), wh_t (H/UNITS, 4H, UNITS), dh_next and dc (B, H), zero at the start."""
    B, T, H = dh.shape
    share = -(-B // threads)
    for thread in nb.prange(threads):
        first, end = thread * share, min(B, (thread + 1) * share)
        for t in range(T - 1, -1, -1):
            for n in range(first, end):
                at = 4 * (n * T + t) * H
                c_before = c.ctypes.data + at - 4 * H if t > 0 else zeros.ctypes.data
                gate_gradients(
                    dh.ctypes.data + at, dh_next.ctypes.data + 4 * n * H, dc.ctypes.data + 4 * n * H,
                    c.ctypes.data + at, c_before, gates.ctypes.data + 4 * at, dz.ctypes.data + 4 * at, H, H // LANES,
                )  # fmt: skip
            if t == 0:
                continue
            for u in range(0, H, UNITS):
                n = first
                while n < end:
                    dzs, w = dz.ctypes.data + 4 * (n * T + t) * 4 * H, wh_t.ctypes.data + 4 * u * 4 * H
                    out = dh_next.ctypes.data + 4 * (n * H + u)
                    if n + ROWS <= end:
                        add_product_of_rows(dzs, 4 * T * H, w, 4 * H, zeros.ctypes.data, 0, out, H)
                        n += ROWS
                    else:
                        add_product_of_row(dzs, 4 * T * H, w, 4 * H, zeros.ctypes.data, 0, out, H)
                        n += 1


@compiled(parallel=True)
def _gate_gradients(
    dh: Array, t: int, gates: Array, c: Array, zeros: Array, dh_next: Array, dc: Array, dz: Array
) -> None:
    """Step t of all sequences; operands as in `_backward`."""
    B, T, H = dh.shape
    for n in nb.prange(B):
        at = 4 * (n * T + t) * H
        c_before = c.ctypes.data + at - 4 * H if t > 0 else zeros.ctypes.data
        gate_gradients(
            dh.ctypes.data + at, dh_next.ctypes.data + 4 * n * H, dc.ctypes.data + 4 * n * H, c.ctypes.data + at,
            c_before, gates.ctypes.data + 4 * at, dz.ctypes.data + 4 * at, H, H // LANES,
        )  # fmt: skip


def _backward_by_steps(
    dh: Array, gates: Array, c: Array, wh: Array, zeros: Array, dh_next: Array, dc: Array, dz: Array
) -> None:
    """`_backward` with a product for each step: the same sums in the same order."""
    for t in range(dh.shape[1] - 1, -1, -1):
        _gate_gradients(dh, t, gates, c, zeros, dh_next, dc, dz)
        if t > 0:
            dh_next = matmul_transposed(np.ascontiguousarray(dz[:, t]), wh)


def lstm_backward(dh: Array, gates: Array, c: Array, wh: Array) -> Array:
    """See `kernels.reference.lstm_backward`."""
    dh, gates, c, wh = as_float32(dh=dh, gates=gates, c=c, wh=wh)
    B, T, H = dh.shape
    check_shapes(gates=(gates, (B, T, 4 * H)), c=(c, dh.shape), wh=(wh, (H, 4 * H)))
    units = round_up(H, UNITS)
    dh, gates, c = pad_units(dh, units), pad_gates(gates, H, units), pad_units(c, units)
    dz = np.empty_like(gates)
    dh_next, dc = np.zeros((2, B, units), np.float32)
    zeros = np.zeros(units, np.float32)
    if by_steps(B, T, H, units):
        _backward_by_steps(dh, gates, c, wh, zeros, dh_next, dc, dz)
    else:
        wh_t = transposed_panels(pad_units(pad_gates(wh, H, units), units, axis=0))
        _backward(dh, gates, c, wh_t, zeros, dh_next, dc, dz, nb.get_num_threads())
    return cut_gates(dz, H, units)
