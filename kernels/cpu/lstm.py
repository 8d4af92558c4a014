"""The LSTM recurrence on the CPU: a whole sequence in one kernel, gates fused behind the recurrent product.

The backward pass is in lstm_gradients.py.

Floor for z (B, T, 4H): 2*B*T*H*4H operations. Sequences are independent, so each thread walks its share of them through
all time steps, and no step waits for another thread. The recurrent weights are packed in the order of their use: a
slice of them serves all sequences of the thread before the next one is touched, so that it is read from the second-
level cache (all 4H*H weights fit there at H = 128) or once per step from beyond (H = 1024). The lstm network's training
step at batch 32, a third of which is spent here, comes to 53 % of the peak.

Packing pays over many steps of many sequences. Few of either leave wide layers (tdcnn: 4 steps, 16 MB of weights) to a
product for each step, with the same sums in the same order. At inference, where nothing is kept for backward, input
product and recurrence take turns at STEPS time steps (the rows of a product's tile) of TOGETHER sequences: what is
between the two stays in the second-level cache. A layer of the lstm network takes 4.0 ms at batch 32, with a floor of
3.1.

A forward tile holds ROWS sequences x LANES hidden units x 4 gates in registers; what follows the product (sigmoid,
tanh, the cell) happens there. H is padded with zeros to whole groups of vectors: the added units have weights 0,
so their cells stay 0 and touch nothing.
"""

from typing import Any

import numba as nb
import numpy as np

from kernels.cpu.dense import dense_forward
from kernels.cpu.matmul import COLUMNS, add_product_of_rows, matmul, pack_all_columns
from kernels.cpu.matmul import ROWS as STEPS
from kernels.cpu.simd import LANES, REGISTERS, Emitter, Int, Ptr, kernel, sigmoid, tanh
from kernels.cpu.tools import Array, as_float32, check_shapes, compiled, round_up, scratch, thread_id

ROWS = 4 if REGISTERS == 32 else 2  # sequences in a forward tile: 4 * ROWS accumulators
UNITS = COLUMNS  # hidden units come in whole groups of this size
WIDE = 512  # units whose recurrent weights do not fit in the second-level cache
FEW = 8  # sequences, or steps, for which such weights are not worth packing
TOGETHER = 16  # sequences that walk through an inference side by side, each STEPS steps at a time
IN_CACHE = 1 << 20  # bytes of weights that leave room for these in the second-level cache


# --- forward -----------------------------------------------------------------------------------------------------


def _cell(k: Emitter, pre: list[Any], c_before: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    """(c, h, gates) of LANES units of one sequence, from the pre-activations of the four gates."""
    ingate, forget, outgate = (sigmoid(k, pre[n]) for n in (0, 1, 3))
    candidate = tanh(k, pre[2])
    gates = (ingate, forget, candidate, outgate)
    cell = forget * c_before + ingate * candidate
    return cell, outgate * tanh(k, cell), gates


def _step_tile(rows: int, keep: bool) -> Any:
    @kernel
    def tile(
        k: Emitter, z: Ptr, z_row: Int, wh: Ptr, units: Int, depth: Int, h_before: Ptr, h: Ptr, h_row: Int,
        c_before: Ptr, c: Ptr, c_row: Int,
    ) -> None:  # fmt: skip
        """One step of `rows` sequences x LANES units; `depth` is `units`, or 0 in the first step, where h_before = 0.

        z: this step, these units of the input gate (the other gates lie `units` numbers apart); the gates take its
        place where `keep` says so. h_before: all units of the step before; c_before, h, c: these units. z_row, h_row
        and c_row lead from sequence to sequence. What the next step needs of z is asked for meanwhile.
        """
        for r in range(rows):
            for g in range(4):
                k.prefetch(z + z_row * r + units * (4 + g))
        acc = [[k.var(k.load(z + z_row * r + units * g)) for g in range(4)] for r in range(rows)]
        for i in k.range(depth):
            ws = [k.load(wh + i * (4 * LANES) + LANES * g) for g in range(4)]
            for r in range(rows):
                x = k.splat(h_before + h_row * r + i)
                for g in range(4):
                    acc[r][g] += x * ws[g]
        for r in range(rows):
            cell, hidden, gates = _cell(k, [pre.get() for pre in acc[r]], k.load(c_before + c_row * r))
            k.store(c + c_row * r, cell)
            k.store(h + h_row * r, hidden)
            if keep:
                for n, gate in enumerate(gates):
                    k.store(z + z_row * r + units * n, gate)

    return tile


step_many, step_one = _step_tile(ROWS, keep=True), _step_tile(1, keep=True)
infer_many, infer_one = _step_tile(ROWS, keep=False), _step_tile(1, keep=False)


@compiled(parallel=True)
def _pack_gates(wh: Array, packed: Array) -> None:
    """packed (H/LANES, H, 4, LANES) from wh (H, 4H): what LANES units need for all four gates, side by side."""
    groups, H = packed.shape[:2]
    for group in nb.prange(groups):
        for i in range(H):
            for g in range(4):
                for x in range(LANES):
                    packed[group, i, g, x] = wh[i, g * H + group * LANES + x]


@compiled(parallel=True)
def _forward(z: Array, wh: Array, zeros: Array, h: Array, c: Array, threads: int) -> None:
    """z (B, T, 4H), which becomes the gates, wh (H/LANES, H, 4, LANES), h, c (B, T, H), H a whole number of UNITS.

    zeros (ROWS * T, H) stands for h_{-1} and c_{-1} of the sequences of a tile, and is walked like h and c.
    """
    B, T, H = h.shape
    share = -(-B // threads)
    for thread in nb.prange(threads):
        end = min(B, (thread + 1) * share)
        for t in range(T):
            depth = H if t > 0 else 0
            for u in range(0, H, LANES):
                w = wh.ctypes.data + 4 * u * 4 * H
                n = thread * share
                while n < end:
                    at = 4 * ((n * T + t) * H)
                    h_before = h.ctypes.data + at - 4 * H if t > 0 else zeros.ctypes.data
                    c_before = (c.ctypes.data + at - 4 * H if t > 0 else zeros.ctypes.data) + 4 * u
                    zs = z.ctypes.data + 4 * at + 4 * u
                    hs, cs = h.ctypes.data + at + 4 * u, c.ctypes.data + at + 4 * u
                    if n + ROWS <= end:
                        step_many(zs, 4 * T * H, w, H, depth, h_before, hs, T * H, c_before, cs, T * H)
                        n += ROWS
                    else:
                        step_one(zs, 4 * T * H, w, H, depth, h_before, hs, T * H, c_before, cs, T * H)
                        n += 1


@kernel
def cells_step(k: Emitter, pre: Ptr, z: Ptr, units: Int, groups: Int, c_before: Ptr, c: Ptr, h: Ptr) -> None:
    """One step of one sequence behind its recurrent product: pre (4H,), whose gates go to z (4H,)."""
    for group in k.range(groups):
        u = group * LANES
        cell, hidden, gates = _cell(k, [k.load(pre + u + units * n) for n in range(4)], k.load(c_before + u))
        k.store(c + u, cell)
        k.store(h + u, hidden)
        for n, gate in enumerate(gates):
            k.store(z + u + units * n, gate)


@compiled(parallel=True)
def _cells(pre: Array, t: int, z: Array, zeros: Array, h: Array, c: Array) -> None:
    """Step t of all sequences: pre (B, 4H), z (B, T, 4H), zeros (H,), h and c (B, T, H)."""
    B, T, H = h.shape
    for n in nb.prange(B):
        at = 4 * (n * T + t) * H
        c_before = c.ctypes.data + at - 4 * H if t > 0 else zeros.ctypes.data
        cells_step(
            pre.ctypes.data + 4 * n * 4 * H, z.ctypes.data + 4 * at, H, H // LANES,
            c_before, c.ctypes.data + at, h.ctypes.data + at,
        )  # fmt: skip


def _forward_by_steps(z: Array, wh: Array, h: Array, c: Array) -> None:
    """`_forward` with a product for each step, whose weights are read as they lie: the same sums in the same order."""
    zeros = np.zeros(wh.shape[0], np.float32)
    for t in range(z.shape[1]):
        pre = matmul(h[:, t - 1], wh, z[:, t]) if t > 0 else np.ascontiguousarray(z[:, 0])
        _cells(pre, t, z, zeros, h, c)


# --- inference ---------------------------------------------------------------------------------------------------


@compiled(parallel=True)
def _infer(x: Array, wx: Array, bias: Array, wh: Array, together: int, h: Array, pre: Array, cells: Array) -> None:
    """A layer from inputs to hidden states: input product and recurrence of a few sequences and steps at a time.

    x (B, T rounded up to STEPS, I), wx (4H/COLUMNS, I, COLUMNS), bias (4H,), wh (H/LANES, H, 4, LANES), h (B, T, H);
    pre (threads, together, steps, 4H) and cells (threads, together, H): scratch, which stays in the second-level cache.
    """
    B, T, H = h.shape
    I, steps = x.shape[2], pre.shape[2]
    for group in nb.prange(-(-B // together)):
        first, end = group * together, min(B, (group + 1) * together)
        z, c = pre[thread_id()], cells[thread_id()]
        c[:] = 0
        for t0 in range(0, T, steps):
            t1 = min(T, t0 + steps)
            for panel in range(wx.shape[0]):
                at = 4 * panel * COLUMNS
                for n in range(first, end):
                    for t in range(t0, t1, STEPS):  # a tile: STEPS steps of one sequence
                        add_product_of_rows(
                            x.ctypes.data + 4 * (n * x.shape[1] + t) * I, I, wx.ctypes.data + at * I, I,
                            bias.ctypes.data + at, 0,
                            z.ctypes.data + 4 * ((n - first) * steps + t - t0) * 4 * H + at, 4 * H,
                        )  # fmt: skip
            for t in range(t0, t1):
                depth = H if t > 0 else 0
                for u in range(0, H, LANES):
                    w = wh.ctypes.data + 4 * u * 4 * H
                    n = first
                    while n < end:
                        zs = z.ctypes.data + 4 * (((n - first) * steps + t - t0) * 4 * H + u)
                        hs = h.ctypes.data + 4 * ((n * T + t) * H + u)
                        h_before = h.ctypes.data + 4 * (n * T + max(0, t - 1)) * H
                        cs = c.ctypes.data + 4 * ((n - first) * H + u)
                        if n + ROWS <= end:
                            infer_many(zs, steps * 4 * H, w, H, depth, h_before, hs, T * H, cs, cs, H)
                            n += ROWS
                        else:
                            infer_one(zs, steps * 4 * H, w, H, depth, h_before, hs, T * H, cs, cs, H)
                            n += 1


# --- the operations ----------------------------------------------------------------------------------------------


def pad_gates(x: Array, H: int, units: int) -> Array:
    """(..., 4H) -> (..., 4*units): every gate padded with zeros; x itself where nothing is missing."""
    if units == H:
        return x
    padded = np.zeros((*x.shape[:-1], 4, units), np.float32)
    padded[..., :H] = x.reshape(*x.shape[:-1], 4, H)
    return padded.reshape(*x.shape[:-1], 4 * units)


def pad_units(x: Array, units: int, axis: int = -1) -> Array:
    """x padded with zeros to `units` along one axis; x itself where nothing is missing."""
    missing = units - x.shape[axis]
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return np.pad(x, widths)


def cut_gates(x: Array, H: int, units: int) -> Array:
    """The inverse of `pad_gates`."""
    if units == H:
        return x
    return np.ascontiguousarray(x.reshape(*x.shape[:-1], 4, units)[..., :H]).reshape(*x.shape[:-1], 4 * H)


def by_steps(B: int, T: int, H: int, units: int) -> bool:
    """Is there a product for each step, because packing the weights would not pay?"""
    return units == H and H >= WIDE and min(B, T) <= FEW


def _packed_gates(wh: Array, units: int) -> Array:
    """wh (H, 4H) in the order of its use: (units/LANES, units, 4, LANES)."""
    square = pad_units(pad_gates(wh, len(wh), units), units, axis=0)
    packed = scratch(units // LANES, units, 4, LANES)
    _pack_gates(square, packed)
    return packed


def _whole_steps(x: Array) -> Array:
    """x (B, T, I) with zeros behind it up to a whole number of STEPS; x itself where none is missing."""
    missing = -x.shape[1] % STEPS
    return np.pad(x, ((0, 0), (0, missing), (0, 0))) if missing else x


def lstm_forward(z: Array, wh: Array) -> tuple[Array, Array, Array]:
    """See `kernels.reference.lstm_forward`; the gates take the memory of z where its layout allows it."""
    z, wh = as_float32(z=z, wh=wh)
    B, T, _ = z.shape
    H = wh.shape[0]
    check_shapes(z=(z, (B, T, 4 * H)), wh=(wh, (H, 4 * H)))
    units = round_up(H, UNITS)
    z = pad_gates(z if z.flags.writeable else z.copy(), H, units)
    h, c = np.empty((B, T, units), np.float32), np.empty((B, T, units), np.float32)
    if by_steps(B, T, H, units):
        _forward_by_steps(z, wh, h, c)
    else:
        _forward(z, _packed_gates(wh, units), np.zeros((ROWS * T, units), np.float32), h, c, nb.get_num_threads())
    return np.ascontiguousarray(h[..., :H]), np.ascontiguousarray(c[..., :H]), cut_gates(z, H, units)


def lstm_inference(x: Array, wx: Array, wh: Array, b: Array) -> Array:
    """See `kernels.reference.lstm_inference`; where the weights fit in the cache, nothing is written but h."""
    x, wx, wh, b = as_float32(x=x, wx=wx, wh=wh, b=b)
    B, T, I = x.shape
    H = wh.shape[0]
    check_shapes(wx=(wx, (I, 4 * H)), wh=(wh, (H, 4 * H)), b=(b, (4 * H,)))
    threads = nb.get_num_threads()
    if threads > B or wx.nbytes + wh.nbytes > IN_CACHE:
        return lstm_forward(dense_forward(x.reshape(B * T, I), wx, b).reshape(B, T, 4 * H), wh)[0]
    units = round_up(H, UNITS)
    panels = scratch(4 * units // COLUMNS, I, COLUMNS)
    pack_all_columns(pad_gates(wx, H, units), panels)
    groups = threads * -(-B // (threads * TOGETHER))
    together = -(-B // groups)
    steps = STEPS * (TOGETHER // together)
    h = np.empty((B, T, units), np.float32)
    pre, cells = scratch(threads, together, steps, 4 * units), scratch(threads, together, units)
    _infer(_whole_steps(x), panels, pad_gates(b, H, units), _packed_gates(wh, units), together, h, pre, cells)
    return np.ascontiguousarray(h[..., :H])
