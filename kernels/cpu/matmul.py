"""Matrix products on the vector micro-kernels, in the same threads as everything else.

Why not BLAS: on two cores, its threads and Numba's take turns at spinning on the core that the other needs, which cost
factors, and no BLAS applies an SGD update to a product that is still in registers.

The scheme is Goto's. A tile of ROWS x VECS vectors of the result stays in registers while one column of a packed
panel of A (ROWS numbers) meets one row of a packed panel of B (VECS vectors) after the other. Panels hold the numbers
in the order of their use, zero-padded to whole tiles, so that no loop over odd sizes is left; blocks of
BLOCK x BLOCK of both sit in the second-level cache. Every task owns a block of the result and sums over k in one fixed
order: the result does not depend on the number of threads.

A product with a transposed matrix, as in dx = dy w^T, needs no packing: rows of both lie in the order of the sum, so a
tile of DOTS x DOTS dot products runs along them.

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
DOTS = 4 if REGISTERS == 32 else 3  # rows of either side in a tile of dot products: DOTS * DOTS accumulators
DOT_DEPTH = 1024  # numbers of a row in a cache block: LANES divides it
DOT_TASK = 4 * DOTS  # rows of the transposed side in one task
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


@kernel
def dot_products(k: Emitter, a: Ptr, a_row: Int, b: Ptr, b_row: Int, vectors: Int, c: Ptr, c_row: Int) -> None:
    """c[r, s] += the dot product of row r of a and row s of b, DOTS rows of each, over `vectors` vectors."""
    acc = [[k.var(0.0) for _ in range(DOTS)] for _ in range(DOTS)]
    for i in k.range(vectors):
        bs = [k.load(b + b_row * s + i * LANES) for s in range(DOTS)]
        for r in range(DOTS):
            x = k.load(a + a_row * r + i * LANES)
            for s in range(DOTS):
                acc[r][s] += x * bs[s]
    for r in range(DOTS):
        for s in range(DOTS):
            k.add_sum(c + c_row * r + s, acc[r][s].get())


@compiled(parallel=True)
def _multiply_transposed(a: Array, b: Array, c: Array) -> None:
    """c (M, N) += a b^T; a (M, K), b (N, K), M and N whole numbers of DOTS, K of LANES."""
    (M, K), N = a.shape, b.shape[0]
    for task in nb.prange(-(-N // DOT_TASK)):
        for k0 in range(0, K, DOT_DEPTH):
            vectors = min(DOT_DEPTH, K - k0) // LANES
            for n in range(task * DOT_TASK, min(task * DOT_TASK + DOT_TASK, N), DOTS):
                for m in range(0, M, DOTS):
                    dot_products(
                        a.ctypes.data + 4 * (m * K + k0), K, b.ctypes.data + 4 * (n * K + k0), K, vectors,
                        c.ctypes.data + 4 * (m * N + n), N,
                    )  # fmt: skip


@compiled(parallel=True)
def _pack_rows(a: Array, stride_m: int, stride_k: int, M: int, packed: Array) -> None:
    """packed (M/ROWS, K, ROWS) from the flat a, whose element (m, k) stands at m*stride_m + k*stride_k."""
    tiles, K = packed.shape[:2]
    for tile in nb.prange(tiles):
        for r in range(ROWS):
            m = tile * ROWS + r
            for i in range(K):
                packed[tile, i, r] = a[m * stride_m + i * stride_k] if m < M else np.float32(0)


@kernel
def copy_panels(k: Emitter, b: Ptr, b_row: Int, depth: Int, panels: Int, packed: Ptr, panel: Int) -> None:
    """depth rows of `panels` whole panels, side by side in b, to packed; row by row, as b lies in memory."""
    for i in k.range(depth):
        for p in k.range(panels):
            for v in range(VECS):
                k.store(packed + p * panel + i * COLUMNS + LANES * v, k.load(b + i * b_row + p * COLUMNS + LANES * v))


@compiled
def _pack_columns(b: Array, k0: int, n0: int, K: int, N: int, packed: Array) -> None:
    """packed[panel, i, x] = b[k0 + i, n0 + panel*COLUMNS + x] for i < K, columns below N; zeros behind them."""
    columns = min(N - n0, packed.shape[0] * COLUMNS)
    whole, rest = columns // COLUMNS, columns % COLUMNS
    row = b.shape[1]
    at = b.ctypes.data + 4 * (k0 * row + n0)
    copy_panels(at, row, K, whole, packed.ctypes.data, packed.shape[1] * COLUMNS)
    if rest:
        first = n0 + whole * COLUMNS
        for i in range(K):
            for x in range(COLUMNS):
                packed[whole, i, x] = b[k0 + i, first + x] if x < rest else np.float32(0)


@compiled(parallel=True)
def _multiply(a: Array, b: Array, panels: Array, c: Array) -> None:
    """c (M and N rounded up to whole tiles) += a b; a packed by `_pack_rows`; panels: scratch per thread."""
    tiles, K = a.shape[:2]
    N = b.shape[1]
    tiles_per_block = BLOCK // ROWS
    row_blocks, column_blocks = -(-tiles // tiles_per_block), -(-N // BLOCK)
    width = c.shape[1]
    for task in nb.prange(row_blocks * column_blocks):
        first_tile, n0 = task % row_blocks * tiles_per_block, task // row_blocks * BLOCK
        mine = panels[thread_id()]
        for k0 in range(0, K, BLOCK):
            depth = min(BLOCK, K - k0)
            _pack_columns(b, k0, n0, depth, N, mine)
            for n in range(n0, min(n0 + BLOCK, width), COLUMNS):  # a panel of b stays in the first-level cache
                for tile in range(first_tile, min(first_tile + tiles_per_block, tiles)):
                    add_product(
                        a.ctypes.data + 4 * (tile * K + k0) * ROWS, mine.ctypes.data + 4 * (n - n0) * BLOCK, depth,
                        c.ctypes.data + 4 * (tile * ROWS * width + n), width,
                    )  # fmt: skip


def _packed_rows(a: Array) -> Array:
    """a (M, K), contiguous or the transpose of something contiguous, as panels (M/ROWS, K, ROWS)."""
    M, K = a.shape
    packed = np.empty((-(-M // ROWS), K, ROWS), np.float32)
    if a.T.flags.c_contiguous:
        _pack_rows(a.T.reshape(-1), 1, M, M, packed)
    else:
        _pack_rows(np.ascontiguousarray(a).reshape(-1), K, 1, M, packed)
    return packed


def matmul(a: Array, b: Array, bias: Array | None = None) -> Array:
    """a b (+ bias), float32: a (M, K), contiguous or a transposed view, b (K, N) contiguous -> (M, N)."""
    M, N = len(a), b.shape[1]
    c = np.zeros((round_up(M, ROWS), round_up(N, COLUMNS)), np.float32)
    if bias is not None:
        c[:, :N] = bias
    panels = np.empty((nb.get_num_threads(), BLOCK // COLUMNS, BLOCK, COLUMNS), np.float32)
    _multiply(_packed_rows(a), b, panels, c)
    return np.ascontiguousarray(c[:M, :N])


def _padded(x: Array, rows: int, columns: int) -> Array:
    """x with zeros behind it up to whole numbers of rows and columns; x itself where nothing is missing."""
    missing = -x.shape[0] % rows, -x.shape[1] % columns
    return np.pad(x, ((0, missing[0]), (0, missing[1]))) if any(missing) else x


def matmul_transposed(a: Array, b: Array) -> Array:
    """a b^T, float32, both contiguous: a (M, K), b (N, K) -> (M, N)."""
    M, N = len(a), len(b)
    a, b = _padded(a, DOTS, LANES), _padded(b, DOTS, LANES)
    c = np.zeros((len(a), len(b)), np.float32)
    _multiply_transposed(a, b, c)
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
def _pack_all_columns(b: Array, packed: Array) -> None:
    """packed (N/COLUMNS, K, COLUMNS) of the whole of b (K, N)."""
    for panel in nb.prange(packed.shape[0]):
        n0 = panel * COLUMNS
        _pack_columns(b, 0, n0, b.shape[0], min(b.shape[1], n0 + COLUMNS), packed[panel : panel + 1])


def matmul_update(a: Array, b: Array, w: Array, velocity: Array, lr: float, momentum: float) -> None:
    """w (M, N) takes an SGD step along the gradient a b, which is never stored; velocity (M, N); both C-contiguous."""
    K, N = b.shape
    packed = np.empty((-(-N // COLUMNS), K, COLUMNS), np.float32)
    _pack_all_columns(b, packed)
    edges = np.empty((nb.get_num_threads(), ROWS, COLUMNS), np.float32)
    _update(_packed_rows(a), packed, w, velocity, edges, np.array([lr, momentum], np.float32))
