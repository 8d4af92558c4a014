"""The backward pass of `kernels.cuda.lstm`: the gradient of the pre-activations, from the last step to the first.

A block of 4H threads walks one sequence, wh on the chip, or, for wider layers, there is a product per step: as forward.

Floor: 8*B*T*H*H operations; wide layers read wh, 16*H*H bytes, once per step.
"""

import math

import numpy as np

from kernels.cuda.device import (
    ALIGN,
    Array,
    F,
    Flat,
    I,
    blocks_for,
    check,
    cuda,
    empty,
    float32,
    index,
    kernel,
)
from kernels.cuda.lstm import REGISTER_ROWS, SEQUENCE_THREADS, SEQUENCE_UNITS, dot, sequence_memory, take_weights
from kernels.cuda.matmul import TURNED_B, Operand, product_parts, whole


@kernel((F, F, F, F, F, I, I, I, I), SEQUENCE_THREADS)
def _lstm_sequence_backward(
    dh: Flat, gates: Flat, c: Flat, wh: Flat, dz: Flat, T: int, H: int, pitch: int, kept: int
) -> None:
    """`lstm_backward` of sequence blockIdx.x by 4H threads: thread t has unit t % H and the weights of gate t // H."""
    shared = cuda.shared.array(0, float32, ALIGN)
    mine = cuda.local.array(REGISTER_ROWS, float32)
    t = cuda.threadIdx.x & 1023
    n, unit, quarter = cuda.blockIdx.x, t % H, t // H
    sums, kept_at = 4 * pitch, 4 * pitch + 4 * H + t
    w_at = unit * 4 * H + quarter * H
    take_weights(wh, w_at, 1, H, mine, shared, kept_at, kept)
    for i in range(t, 4 * pitch, 4 * H):
        shared[index(i)] = float32(0)
    shared[index(sums + t)] = float32(0)  # nothing comes back to the last step
    dcell = float32(0)
    dh_s, i_s, f_s, g_s, o_s, cell = float32(0), float32(0), float32(0), float32(0), float32(0), float32(0)
    if t < H:  # the last step's numbers; those of every other step are fetched while the one after it is computed
        at = n * T + T - 1
        dh_s, cell = dh[index(at * H + t)], c[index(at * H + t)]
        i_s, f_s = gates[index(at * 4 * H + t)], gates[index(at * 4 * H + H + t)]
        g_s, o_s = gates[index(at * 4 * H + 2 * H + t)], gates[index(at * 4 * H + 3 * H + t)]
    cuda.syncthreads()
    for back in range(T):
        s = T - 1 - back
        at = n * T + s
        if t < H:
            before = float32(0)
            if s > 0:
                before = c[index((at - 1) * H + t)]
            tanh_c = math.tanh(cell)
            from_input, from_forget = shared[index(sums + t)], shared[index(sums + H + t)]
            from_cell, from_output = shared[index(sums + 2 * H + t)], shared[index(sums + 3 * H + t)]
            dh_t = dh_s + ((from_input + from_forget) + (from_cell + from_output))
            dcell += dh_t * o_s * (float32(1) - tanh_c * tanh_c)
            di = dcell * g_s * i_s * (float32(1) - i_s)
            df = dcell * before * f_s * (float32(1) - f_s)
            dg = dcell * i_s * (float32(1) - g_s * g_s)
            do = dh_t * tanh_c * o_s * (float32(1) - o_s)
            shared[index(t)], shared[index(pitch + t)] = di, df
            shared[index(2 * pitch + t)], shared[index(3 * pitch + t)] = dg, do
            dz[index(at * 4 * H + t)], dz[index(at * 4 * H + H + t)] = di, df
            dz[index(at * 4 * H + 2 * H + t)], dz[index(at * 4 * H + 3 * H + t)] = dg, do
            dcell *= f_s
            cell = before
            if s > 0:
                dh_s = dh[index((at - 1) * H + t)]
                i_s, f_s = gates[index((at - 1) * 4 * H + t)], gates[index((at - 1) * 4 * H + H + t)]
                g_s, o_s = gates[index((at - 1) * 4 * H + 2 * H + t)], gates[index((at - 1) * 4 * H + 3 * H + t)]
        cuda.syncthreads()
        shared[index(sums + t)] = dot(shared, quarter * pitch, mine, kept_at, kept, wh, w_at, 1, H)
        cuda.syncthreads()


@kernel((F, F, I, F, F, F, F, I, I, I, I))
def _lstm_step_backward(
    dh: Flat, parts: Flat, count: int, gates: Flat, c: Flat, dcells: Flat, dz: Flat, s: int, B: int, T: int, H: int
) -> None:
    """dz of step s from dh and dz_{s+1} wh^T, which is still in `count` parts (B, H); dcells (B, H) goes along."""
    for e in range(cuda.grid(1), B * H, cuda.gridsize(1)):
        n, unit = e // H, e % H
        row, at = (n * T + s) * H + unit, (n * T + s) * 4 * H + unit
        dh_t, dcell, before = dh[row], float32(0), float32(0)
        for p in range(count):
            dh_t += parts[p * B * H + e]
        if s < T - 1:
            dcell = dcells[e]
        if s > 0:
            before = c[row - H]
        i_s, f_s, g_s, o_s = gates[at], gates[at + H], gates[at + 2 * H], gates[at + 3 * H]
        tanh_c = math.tanh(c[row])
        dcell += dh_t * o_s * (float32(1) - tanh_c * tanh_c)
        dz[at] = dcell * g_s * i_s * (float32(1) - i_s)
        dz[at + H] = dcell * before * f_s * (float32(1) - f_s)
        dz[at + 2 * H] = dcell * i_s * (float32(1) - g_s * g_s)
        dz[at + 3 * H] = dh_t * tanh_c * o_s * (float32(1) - o_s)
        dcells[e] = dcell * f_s


def lstm_backward(dh: Array, gates: Array, c: Array, wh: Array) -> Array:
    """See `kernels.reference.lstm_backward`."""
    B, T, H = dh.shape
    check(
        dh=(dh, (B, T, H), np.float32),
        gates=(gates, (B, T, 4 * H), np.float32),
        c=(c, (B, T, H), np.float32),
        wh=(wh, (H, 4 * H), np.float32),
    )
    dz = empty(gates.shape)
    if H <= SEQUENCE_UNITS:
        pitch, kept, size = sequence_memory(_lstm_sequence_backward, H)
        _lstm_sequence_backward(
            B if T else 0, dh, gates, c, wh, dz, T, H, pitch, kept, shared=size, threads=4 * H
        )  # fmt: skip
        return dz
    dcells = empty((B, H))
    parts, count = dcells, 0
    for s in range(T - 1, -1, -1):
        _lstm_step_backward(
            blocks_for(B * H), dh, parts, count, gates, c, dcells, dz, s, B, T, H
        )  # fmt: skip
        if s > 0:
            parts, count = product_parts(Operand(dz, s * 4 * H, T * 4 * H), whole(wh), B, H, 4 * H, TURNED_B)
    return dz
