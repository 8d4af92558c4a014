"""Matrix products on the vector micro-kernels, in the same threads as everything else.

Why not BLAS: on two cores, its threads and Numba's take turns at spinning on the core that the other needs, which cost
factors, and no BLAS applies an SGD update to a product that is still in registers.

The scheme is Goto's. A tile of ROWS x VECS vectors of the result stays in registers while one column of a packed
panel of A (ROWS numbers) meets one row of a packed panel of B (VECS vectors) after the other. Panels hold the numbers
in the order of their use, zero-padded to whole tiles, so that no loop over odd sizes is left; blocks of
BLOCK x BLOCK of both sit in the second-level cache. Every task owns a block of the result and sums over k in one fixed
order: the result does not depend on the number of threads.

Floor: 2*M*K*N operations; packing moves each number of A once, and each of B once per BLOCK rows of A.
"""

from typing import Any

import numba as nb
import numpy as np

from kernels.cpu.simd import LANES, REGISTERS, Emitter, Int, Ptr, kernel
from kernels.cpu.tools import Array, compiled, round_up, thread_id

ROWS = 8 if REGISTERS == 32 else 6
VECS = 2
COLUMNS = VECS * LANES
BLOCK = 256  # rows, columns and depth of a cache block; COLUMNS divides it
UPDATE_ROWS = 8 * ROWS  # rows of weights that share one pass over the panels of dy


def _accumulate(k: Emitter, a: Ptr, b: Ptr, depth: Int) -> list[list[Any]]:
    """ROWS x VECS accumulators: sum over `depth` of a column of ROWS numbers times a row of VECS vectors."""
    acc = [[k.var(0.0) for _ in range(VECS)] for _ in range(ROWS)]
    for i in k.range(depth):
        bs = [k.load(b + i * COLUMNS + LANES * v) for v in range(VECS)]
        for r in range(ROWS):
            x = k.splat(a + i * ROWS + r)
            for v in range(VECS):
                acc[r][v] += x * bs[v]
    return acc


@kernel
def add_product(k: Emitter, a: Ptr, b: Ptr, depth: Int, c: Ptr, c_row: Int) -> None:
    """c += a b for one tile."""
    acc = _accumulate(k, a, b, depth)
    for r in range(ROWS):
        for v in range(VECS):
            at = c + c_row * r + LANES * v
            k.store(at, k.load(at) + acc[r][v].get())


@kernel
def update_product(
    k: Emitter, a: Ptr, b: Ptr, depth: Int, w: Ptr, velocity: Ptr, w_row: Int, lr: Ptr, momentum: Ptr
) -> None:
    """One tile of the gradient a b, applied from registers: velocity = momentum*velocity - lr * a b; w += velocity."""
    acc = _accumulate(k, a, b, depth)
    rate, keep = k.splat(lr), k.splat(momentum)
    for r in range(ROWS):
        for v in range(VECS):
            at = w_row * r + LANES * v
            step = keep * k.load(velocity + at) - rate * acc[r][v].get()
            k.store(velocity + at, step)
            k.store(w + at, k.load(w + at) + step)


@compiled(parallel=True)
def _pack_rows(a: Array, stride_m: int, stride_k: int, M: int, packed: Array) -> None:
    """packed (M/ROWS, K, ROWS) from the flat a, whose element (m, k) stands at m*stride_m + k*stride_k."""
    tiles, K = packed.shape[:2]
    for tile in nb.prange(tiles):
        for r in range(ROWS):
            m = tile * ROWS + r
            for i in range(K):
                packed[tile, i, r] = a[m * stride_m + i * stride_k] if m < M else np.float32(0)


@compiled
def _pack_columns(b: Array, stride_k: int, stride_n: int, k0: int, n0: int, K: int, N: int, packed: Array) -> None:
    """packed[panel, i, x] = b[k0 + i, n0 + panel*COLUMNS + x] for i < K, columns below N; zeros behind them."""
    width = N - n0
    for panel in range(min(packed.shape[0], (width + COLUMNS - 1) // COLUMNS)):
        first, filled = n0 + panel * COLUMNS, min(COLUMNS, width - panel * COLUMNS)
        if stride_n == 1:
            for i in range(K):
                at = (k0 + i) * stride_k + first
                for x in range(filled):
                    packed[panel, i, x] = b[at + x]
        else:
            for x in range(filled):
                at = k0 * stride_k + (first + x) * stride_n
                for i in range(K):
                    packed[panel, i, x] = b[at + i * stride_k]
        for i in range(K):
            for x in range(filled, COLUMNS):
                packed[panel, i, x] = 0


@compiled(parallel=True)
def _multiply(a: Array, b: Array, stride_k: int, stride_n: int, N: int, panels: Array, c: Array) -> None:
    """c (M and N rounded up to whole tiles) += a b; a packed by `_pack_rows`, b flat; panels: scratch per thread."""
    tiles, K = a.shape[:2]
    tiles_per_block = BLOCK // ROWS
    row_blocks, column_blocks = -(-tiles // tiles_per_block), -(-N // BLOCK)
    width = c.shape[1]
    for task in nb.prange(row_blocks * column_blocks):
        first_tile, n0 = task % row_blocks * tiles_per_block, task // row_blocks * BLOCK
        mine = panels[thread_id()]
        for k0 in range(0, K, BLOCK):
            depth = min(BLOCK, K - k0)
            _pack_columns(b, stride_k, stride_n, k0, n0, depth, N, mine)
            for tile in range(first_tile, min(first_tile + tiles_per_block, tiles)):
                for n in range(n0, min(n0 + BLOCK, width), COLUMNS):
                    add_product(
                        a.ctypes.data + 4 * (tile * K + k0) * ROWS,
                        mine.ctypes.data + 4 * (n - n0) * BLOCK,
                        depth,
                        c.ctypes.data + 4 * (tile * ROWS * width + n),
                        width,
                    )


def _flat(x: Array) -> tuple[Array, int, int]:
    """(memory in its order, stride of rows, stride of columns) of a matrix that is contiguous or the .T of such."""
    if x.flags.c_contiguous:
        return x.reshape(-1), x.shape[1], 1
    if x.T.flags.c_contiguous:
        return x.T.reshape(-1), 1, x.shape[0]
    return _flat(np.ascontiguousarray(x))


def _packed_rows(a: Array) -> Array:
    M, K = a.shape
    packed = np.empty((-(-M // ROWS), K, ROWS), np.float32)
    _pack_rows(*_flat(a), M, packed)
    return packed


def matmul(a: Array, b: Array, bias: Array | None = None) -> Array:
    """a b (+ bias), float32: a (M, K), b (K, N), either may be a transposed view -> (M, N)."""
    M, N = len(a), b.shape[1]
    c = np.zeros((round_up(M, ROWS), round_up(N, COLUMNS)), np.float32)
    if bias is not None:
        c[:, :N] = bias
    panels = np.empty((nb.get_num_threads(), BLOCK // COLUMNS, BLOCK, COLUMNS), np.float32)
    _multiply(_packed_rows(a), *_flat(b), N, panels, c)
    return np.ascontiguousarray(c[:M, :N])


@compiled(parallel=True)
def _update(a: Array, b: Array, w: Array, velocity: Array, edges: Array, factors: Array) -> None:
    """a, b packed (rows of x^T, columns of dy); edges (threads, ROWS, COLUMNS) take the tiles that overhang w."""
    I, J = w.shape
    tiles, K = a.shape[:2]
    rate, keep = factors[0], factors[1]
    group = UPDATE_ROWS // ROWS
    for task in nb.prange(-(-tiles // group)):
        edge = edges[thread_id()]
        for panel in range(b.shape[0]):
            j = panel * COLUMNS
            for tile in range(task * group, min(task * group + group, tiles)):
                i = tile * ROWS
                at_a, at_b = a.ctypes.data + 4 * tile * K * ROWS, b.ctypes.data + 4 * panel * K * COLUMNS
                if i + ROWS <= I and j + COLUMNS <= J:
                    at = 4 * (i * J + j)
                    update_product(
                        at_a, at_b, K, w.ctypes.data + at, velocity.ctypes.data + at, J,
                        factors.ctypes.data, factors.ctypes.data + 4,
                    )  # fmt: skip
                else:
                    for r in range(ROWS):
                        for x in range(COLUMNS):
                            edge[r, x] = 0
                    add_product(at_a, at_b, K, edge.ctypes.data, COLUMNS)
                    for r in range(min(ROWS, I - i)):
                        for x in range(min(COLUMNS, J - j)):
                            velocity[i + r, j + x] = keep * velocity[i + r, j + x] - rate * edge[r, x]
                            w[i + r, j + x] += velocity[i + r, j + x]


@compiled(parallel=True)
def _pack_all_columns(b: Array, stride_k: int, stride_n: int, K: int, N: int, packed: Array) -> None:
    """packed (N/COLUMNS, K, COLUMNS) of the whole of b."""
    for panel in nb.prange(packed.shape[0]):
        _pack_columns(
            b, stride_k, stride_n, 0, panel * COLUMNS, K, min(N, (panel + 1) * COLUMNS), packed[panel : panel + 1]
        )


def matmul_update(a: Array, b: Array, w: Array, velocity: Array, lr: float, momentum: float) -> None:
    """w (M, N) takes an SGD step along the gradient a b, which is never stored; velocity (M, N); both C-contiguous."""
    K, N = b.shape
    packed = np.empty((-(-N // COLUMNS), K, COLUMNS), np.float32)
    _pack_all_columns(*_flat(b), K, N, packed)
    edges = np.empty((nb.get_num_threads(), ROWS, COLUMNS), np.float32)
    _update(_packed_rows(a), packed, w, velocity, edges, np.array([lr, momentum], np.float32))
