"""The LSTM recurrence on the GPU, in one launch per sequence or one product per step.

Every step needs all of wh, and no step can begin before the last is over, so what counts is where wh lies.

Up to SEQUENCE_UNITS hidden units, one block of 4H threads walks one sequence from the first step to the last, and wh
stays on the chip: forward, a thread owns one gate of one unit and its column of wh; backward
(`kernels.cuda.lstm_gradients`), one unit and a quarter of its row. Of these H weights REGISTER_ROWS are in registers,
as many more as fit in shared memory, and the rest, if there is any, is read again every step. Blocks have nothing to
wait for but their own threads.

Wider layers (H = 1024: wh takes 16 MB) are few steps of large products: `kernels.cuda.matmul` computes h_{t-1} wh in
parts, and one kernel adds these and goes through gates and cell.

Floor: 8*B*T*H*H operations; wide layers read wh, 16*H*H bytes, once per step.
"""

import math

import numpy as np

from kernels.cuda.dense import dense_forward
from kernels.cuda.device import (
    ALIGN,
    SIMULATED,
    Array,
    F,
    Flat,
    I,
    blocks_for,
    check,
    cuda,
    empty,
    float32,
    helper,
    index,
    kernel,
    load4,
)
from kernels.cuda.matmul import PLAIN, Operand, product_parts, whole

SEQUENCE_UNITS, REGISTER_ROWS = (4, 4) if SIMULATED else (128, 56)
SEQUENCE_THREADS = 4 * SEQUENCE_UNITS


@helper
def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), written with tanh so that nothing overflows."""
    return float32(0.5) + float32(0.5) * math.tanh(float32(0.5) * x)


# --- a whole sequence in a block ---------------------------------------------------------------------------------
#
# Shared memory, in floats: the vector that is multiplied, 4 * `pitch` of them (backward: dz, `pitch` for each gate;
# forward: h, and the rest is not used), then 4H numbers (forward: the gates; backward: partial sums), then `kept` rows
# of weights.


@helper
def dot(values: Flat, at: int, mine: Flat, kept_at: int, kept: int, wh: Flat, w_at: int, w_step: int, H: int) -> float:
    """The sum over i < H of values[at + i] times this thread's i-th weight, which lies in one of three places.

    values, padded with zeros, and the kept weights (from kept_at on, SEQUENCE_THREADS apart) are in shared memory,
    `mine` in registers.
    """
    s0, s1, s2, s3 = float32(0), float32(0), float32(0), float32(0)
    for i in range(0, REGISTER_ROWS, 4):
        v0, v1, v2, v3 = load4(values, at + i)
        s0 += v0 * mine[i]
        s1 += v1 * mine[i + 1]
        s2 += v2 * mine[i + 2]
        s3 += v3 * mine[i + 3]
    for i in range(0, kept, 4):
        v0, v1, v2, v3 = load4(values, at + REGISTER_ROWS + i)
        place = kept_at + i * SEQUENCE_THREADS
        s0 += v0 * values[index(place)]
        s1 += v1 * values[index(place + SEQUENCE_THREADS)]
        s2 += v2 * values[index(place + 2 * SEQUENCE_THREADS)]
        s3 += v3 * values[index(place + 3 * SEQUENCE_THREADS)]
    for i in range(REGISTER_ROWS + kept, H):
        s0 += values[index(at + i)] * wh[index(w_at + i * w_step)]
    return (s0 + s1) + (s2 + s3)


@helper
def take_weights(wh: Flat, w_at: int, w_step: int, H: int, mine: Flat, shared: Flat, kept_at: int, kept: int) -> None:
    """Bring this thread's weights to where `dot` looks for them; zeros behind the last."""
    for i in range(REGISTER_ROWS):
        mine[i] = float32(0)
        if i < H:
            mine[i] = wh[index(w_at + i * w_step)]
    for i in range(kept):
        weight = float32(0)
        if REGISTER_ROWS + i < H:
            weight = wh[index(w_at + (REGISTER_ROWS + i) * w_step)]
        shared[index(kept_at + i * SEQUENCE_THREADS)] = weight


@kernel((F, F, F, F, F, I, I, I, I), SEQUENCE_THREADS)
def _lstm_sequence(z: Flat, wh: Flat, h: Flat, c: Flat, gates: Flat, T: int, H: int, pitch: int, kept: int) -> None:
    """`lstm_forward` of sequence blockIdx.x by 4H threads; pitch: H and what `dot` reads behind it."""
    shared = cuda.shared.array(0, float32, ALIGN)
    mine = cuda.local.array(REGISTER_ROWS, float32)
    t = cuda.threadIdx.x & 1023
    n = cuda.blockIdx.x
    activated, kept_at = 4 * pitch, 4 * pitch + 4 * H + t
    take_weights(wh, t, 4 * H, H, mine, shared, kept_at, kept)
    for i in range(t, pitch, 4 * H):
        shared[index(i)] = float32(0)  # h_{-1}, and the padding
    is_candidate = t // H == 2
    cell = float32(0)
    ahead = z[index(n * T * 4 * H + t)]
    cuda.syncthreads()
    for s in range(T):
        total = ahead
        if s + 1 < T:
            ahead = z[index((n * T + s + 1) * 4 * H + t)]  # on its way while this step is computed
        total += dot(shared, 0, mine, kept_at, kept, wh, t, 4 * H, H)
        gate = math.tanh(total) if is_candidate else sigmoid(total)
        shared[index(activated + t)] = gate
        gates[index((n * T + s) * 4 * H + t)] = gate
        cuda.syncthreads()
        if t < H:
            at = activated + t
            cell = shared[index(at + H)] * cell + shared[index(at)] * shared[index(at + 2 * H)]
            out = shared[index(at + 3 * H)] * math.tanh(cell)
            shared[index(t)] = out
            h[index((n * T + s) * H + t)] = out
            c[index((n * T + s) * H + t)] = cell
        cuda.syncthreads()


def sequence_memory(run: object, H: int) -> tuple[int, int, int]:
    """(pitch, kept, bytes) of shared memory for H units: as many rows of weights as are granted."""
    rows = max(0, H - REGISTER_ROWS)
    rows += -rows % 4
    pitch = REGISTER_ROWS + rows
    least = 4 * (4 * pitch + 4 * H)
    row = 4 * SEQUENCE_THREADS  # a distance that the compiler knows, whatever H
    granted = run.grant_shared(least + row * rows)  # type: ignore[attr-defined]
    kept = (granted - least) // row // 4 * 4
    return pitch, kept, least + row * kept


# --- a product per step ------------------------------------------------------------------------------------------


@kernel((F, F, I, F, F, F, I, I, I, I))
def _lstm_step(z: Flat, parts: Flat, count: int, h: Flat, c: Flat, gates: Flat, s: int, B: int, T: int, H: int) -> None:
    """Step s from z and h_{s-1} wh, which is still in `count` parts (B, 4H)."""
    for e in range(cuda.grid(1), B * H, cuda.gridsize(1)):
        n, unit = e // H, e % H
        row, at = n * 4 * H + unit, (n * T + s) * 4 * H + unit
        i_s, f_s, g_s, o_s = z[at], z[at + H], z[at + 2 * H], z[at + 3 * H]
        for p in range(count):
            place = p * B * 4 * H + row
            i_s += parts[place]
            f_s += parts[place + H]
            g_s += parts[place + 2 * H]
            o_s += parts[place + 3 * H]
        i_s, f_s, g_s, o_s = sigmoid(i_s), sigmoid(f_s), math.tanh(g_s), sigmoid(o_s)
        before = float32(0)
        if s > 0:
            before = c[(n * T + s - 1) * H + unit]
        cell = f_s * before + i_s * g_s
        c[(n * T + s) * H + unit] = cell
        h[(n * T + s) * H + unit] = o_s * math.tanh(cell)
        gates[at], gates[at + H], gates[at + 2 * H], gates[at + 3 * H] = i_s, f_s, g_s, o_s


# --- the operations ----------------------------------------------------------------------------------------------


def lstm_forward(z: Array, wh: Array) -> tuple[Array, Array, Array]:
    """See `kernels.reference.lstm_forward`."""
    (B, T), H = z.shape[:2], wh.shape[0]
    check(z=(z, (B, T, 4 * H), np.float32), wh=(wh, (H, 4 * H), np.float32))
    h, c, gates = empty((B, T, H)), empty((B, T, H)), empty(z.shape)
    if H <= SEQUENCE_UNITS:
        pitch, kept, size = sequence_memory(_lstm_sequence, H)
        _lstm_sequence(
            B if T else 0, z, wh, h, c, gates, T, H, pitch, kept, shared=size, threads=4 * H
        )  # fmt: skip
        return h, c, gates
    parts, count = z, 0
    for s in range(T):
        if s > 0:
            before = Operand(h, (s - 1) * H, T * H)
            parts, count = product_parts(before, whole(wh), B, 4 * H, H, PLAIN)
        _lstm_step(blocks_for(B * H), z, parts, count, h, c, gates, s, B, T, H)
    return h, c, gates


def lstm_inference(x: Array, wx: Array, wh: Array, b: Array) -> Array:
    """See `kernels.reference.lstm_inference`."""
    B, T, I = x.shape
    return lstm_forward(dense_forward(x.reshape(B * T, I), wx, b).reshape(B, T, wh.shape[1]), wh)[0]
