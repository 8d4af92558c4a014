"""Matrix products on the vector micro-kernels, in the same threads as everything else.

Why not BLAS: on two cores, its threads and Numba's take turns at spinning on the core that the other needs, which cost
factors, and no BLAS applies an SGD update to a product that is still in registers.

The scheme is Goto's. A tile of ROWS x VECS vectors of the result stays in registers while a column of ROWS numbers of
A, each spread over a vector, meets a row of VECS vectors of B, column after row. What is read many times is packed:
copied once to *panels* that hold the numbers in the order of their use, padded with zeros to whole tiles, so that no
loop over odd sizes is left. A panel of B stays in the first-level cache, a block of A in the second. Every task owns a
block of the result and sums over k in one fixed order: the result does not depend on the number of threads.

    matmul              a b        a packed whole, b block by block on its way through the cache; of up to eight rows,
                                   b is read as it lies
    matmul_transposed   a b^T      the larger operand is read where it lies, row by row; the smaller is packed
    matmul_update       a b        both packed; each tile of the product is an SGD step of the tile of w under it

Floor: 2*M*K*N operations. The weights of a layer pass through memory once: 4 bytes each, 16 where an update reads and
writes them and their velocities. All three ask for them ahead of their use, in small portions between the
multiplications: a core has few places for cache lines on their way, and waits when they are taken. The products of 128
samples with tdcnn's 32768 x 4096 weights, whose floor is 98 ms, take 135 (forward), 120 (input gradient) and 138 ms
(update); those of 32 samples with cnn's 32768 x 1024, 6.1 ms by their operations and 10.7 by an update's bytes, 12.5,
11.4 and 14.7 ms.
"""

from typing import Any

import numba as nb
import numpy as np

from kernels.cpu.sgd import sgd_step, velocity_after
from kernels.cpu.simd import LANES, REGISTERS, Emitter, Int, Ptr, kernel
from kernels.cpu.tools import Array, compiled, round_up, scratch, thread_id

ROWS = 8 if REGISTERS == 32 else 6
VECS = 2
COLUMNS = VECS * LANES
BLOCK = 256  # rows and columns of a cache block; COLUMNS divides it
DEPTH = 128  # of a block that is packed on its way
ROW_DEPTH = 256  # of a block whose rows are read where they lie
FEW_DEPTH = 8  # rows of b that at most meet a few rows of a at once
APART = 2 * LANES  # floats between rows that would share cache sets, at a multiple of 4 KB
FEW_CHUNK = 1024  # columns of b that a task reads of every row
GROUP = 8 * ROWS  # rows of a task where the rows are those of a layer's weights


# --- tiles -------------------------------------------------------------------------------------------------------


def _accumulate(
    k: Emitter, acc: list[list[Any]], a: Ptr, a_row: Int | int, a_next: Int | int, b: Ptr, depth: Int | int
) -> None:
    """Add to rows x VECS accumulators the sum over `depth` of a column of a times a row of the panel b.

    a_row leads from row to row of a, a_next from column to column.
    """
    for i in range(depth) if isinstance(depth, int) else k.range(depth):
        bs = [k.load(b + i * COLUMNS + LANES * v) for v in range(VECS)]
        for r, sums in enumerate(acc):
            x = k.splat(a + i * a_next + a_row * r)
            for v in range(VECS):
                sums[v] += x * bs[v]


def _tile(k: Emitter, p: Ptr, row: Int, rows: int = ROWS) -> list[list[Any]]:
    return [[k.var(k.load(p + row * r + LANES * v)) for v in range(VECS)] for r in range(rows)]


def _store(k: Emitter, p: Ptr, row: Int, acc: list[list[Any]]) -> None:
    for r, sums in enumerate(acc):
        for v in range(VECS):
            k.store(p + row * r + LANES * v, sums[v])


@kernel
def add_product(k: Emitter, a: Ptr, b: Ptr, depth: Int, before: Ptr, before_row: Int, c: Ptr, c_row: Int) -> None:
    """c = before + a b for one tile; a is packed. The sum goes on where `before` is c, or starts with a bias."""
    acc = _tile(k, before, before_row)
    _accumulate(k, acc, a, 1, ROWS, b, depth)
    _store(k, c, c_row, acc)


@kernel
def add_product_asking(
    k: Emitter, a: Ptr, b: Ptr, depth: Int, before: Ptr, before_row: Int, c: Ptr, c_row: Int,
    ahead: Ptr, ahead_row: Int, rows: Int,
) -> None:  # fmt: skip
    """`add_product` that asks for `rows` rows of 256 numbers meanwhile: a line of each after every 8 multiplications.

    Asked for at once, they would fill the few places for lines on their way, and the arithmetic would wait.
    """
    acc = _tile(k, before, before_row)
    for i in k.range(depth // 8):
        for r in k.range(rows):
            k.prefetch(ahead + ahead_row * r + i * LANES, level=2)
        _accumulate(k, acc, a + i * (8 * ROWS), 1, ROWS, b + i * (8 * COLUMNS), 8)
    done = depth // 8 * 8
    _accumulate(k, acc, a + done * ROWS, 1, ROWS, b + done * COLUMNS, depth - done)
    _store(k, c, c_row, acc)


def _rows_tile(rows: int) -> Any:
    @kernel
    def tile(
        k: Emitter, a: Ptr, a_row: Int, b: Ptr, depth: Int, before: Ptr, before_row: Int, c: Ptr, c_row: Int
    ) -> None:
        """c = before + a b for a tile of `rows` rows; those of a lie as they are, a_row numbers apart."""
        acc = _tile(k, before, before_row, rows)
        _accumulate(k, acc, a, a_row, 1, b, depth)
        _store(k, c, c_row, acc)

    return tile


add_product_of_rows, add_product_of_row = _rows_tile(ROWS), _rows_tile(1)


@kernel
def add_product_of_rows_asking(
    k: Emitter, a: Ptr, a_row: Int, b: Ptr, depth: Int, before: Ptr, before_row: Int, c: Ptr, c_row: Int
) -> None:
    """`add_product_of_rows` that asks for the numbers to the right of these, ROW_DEPTH away, meanwhile."""
    acc = _tile(k, before, before_row)
    for i in k.range(depth // LANES):
        for r in range(ROWS):
            k.prefetch(a + a_row * r + i * LANES + ROW_DEPTH, level=2)
        _accumulate(k, acc, a + i * LANES, a_row, 1, b + i * (LANES * COLUMNS), LANES)
    done = depth // LANES * LANES
    _accumulate(k, acc, a + done, a_row, 1, b + done * COLUMNS, depth - done)
    _store(k, c, c_row, acc)


@kernel
def update_product(
    k: Emitter, a: Ptr, b: Ptr, depth: Int, w: Ptr, velocity: Ptr, w_row: Int, lr: Ptr, momentum: Ptr
) -> None:
    """One tile of the gradient a b, applied from registers: velocity = momentum*velocity - lr * a b; w += velocity.

    The tile to its right, which comes next, is asked for meanwhile, a quarter of it before each quarter of the sum.
    """
    places = [w_row * r + LANES * v for r in range(ROWS) for v in range(VECS)]
    acc = [[k.var(0.0) for _ in range(VECS)] for _ in range(ROWS)]
    quarter = depth // 4
    for q in range(4):
        for at in places[q::4]:
            k.prefetch(w + at + COLUMNS)
            k.prefetch(velocity + at + COLUMNS)
        done = quarter * q
        _accumulate(k, acc, a + done * ROWS, 1, ROWS, b + done * COLUMNS, quarter if q < 3 else depth - done)
    rate, keep = k.splat(lr), k.splat(momentum)
    for at, gradient in zip(places, [acc[r][v] for r in range(ROWS) for v in range(VECS)], strict=True):
        sgd_step(k, w + at, velocity + at, gradient.get(), rate, keep)


# --- packing -----------------------------------------------------------------------------------------------------


@compiled(parallel=True)
def _pack_rows(a: Array, packed: Array) -> None:
    """packed (M/ROWS, K, ROWS) from a (M, K)."""
    M, K = a.shape
    for tile in nb.prange(packed.shape[0]):
        for r in range(ROWS):
            m = tile * ROWS + r
            for i in range(K):
                packed[tile, i, r] = a[m, i] if m < M else np.float32(0)


@compiled(parallel=True)
def _pack_transposed_rows(a: Array, packed: Array) -> None:
    """packed (M/ROWS, K, ROWS) from a^T, where a is (K, M); GROUP numbers of a row of a at a time."""
    K, M = a.shape
    for task in nb.prange(-(-M // GROUP)):
        first, last = task * GROUP // ROWS, min(packed.shape[0], (task + 1) * GROUP // ROWS)
        for i in range(K):
            for tile in range(first, last):
                if tile * ROWS + ROWS <= M:  # a loop of constant length: vectors
                    for r in range(ROWS):
                        packed[tile, i, r] = a[i, tile * ROWS + r]
                else:
                    for r in range(ROWS):
                        packed[tile, i, r] = a[i, tile * ROWS + r] if tile * ROWS + r < M else np.float32(0)


def _packed_rows(a: Array) -> Array:
    """a (M, K), contiguous or the transpose of something contiguous, as panels (M/ROWS, K, ROWS)."""
    M, K = a.shape
    packed = np.empty((-(-M // ROWS), K, ROWS), np.float32)
    if a.T.flags.c_contiguous:
        _pack_transposed_rows(a.T, packed)
    else:
        _pack_rows(np.ascontiguousarray(a), packed)
    return packed


@kernel
def copy_panels(k: Emitter, b: Ptr, b_row: Int, depth: Int, panels: Int, packed: Ptr, panel: Int) -> None:
    """depth rows of `panels` whole panels, side by side in b, to packed; row by row, as b lies in memory."""
    for i in k.range(depth):
        for p in k.range(panels):
            for v in range(VECS):
                k.store(packed + p * panel + i * COLUMNS + LANES * v, k.load(b + i * b_row + p * COLUMNS + LANES * v))


@compiled
def pack_columns(b: Array, k0: int, n0: int, K: int, N: int, packed: Array) -> None:
    """packed[panel, i, x] = b[k0 + i, n0 + panel*COLUMNS + x] for i < K, columns below N; zeros behind
    them in the panel that N cuts; panels wholly behind N stay as they are."""
    columns = max(0, min(N - n0, packed.shape[0] * COLUMNS))
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
def pack_all_columns(b: Array, packed: Array) -> None:
    """packed (N/COLUMNS, K, COLUMNS) of the whole of b (K, N)."""
    for panel in nb.prange(packed.shape[0]):
        n0 = panel * COLUMNS
        pack_columns(b, 0, n0, b.shape[0], min(b.shape[1], n0 + COLUMNS), packed[panel : panel + 1])


@compiled(parallel=True)
def _pack_transposed_columns(b: Array, packed: Array) -> None:
    """packed (N/COLUMNS, K, COLUMNS) of b^T, where b is (N, K)."""
    N, K = b.shape
    for panel in nb.prange(packed.shape[0]):
        for i in range(K):
            for x in range(COLUMNS):
                n = panel * COLUMNS + x
                packed[panel, i, x] = b[n, i] if n < N else np.float32(0)


def _panels(columns: int, depth: int) -> Array:
    return scratch(-(-columns // COLUMNS), depth, COLUMNS)


def transposed_panels(b: Array) -> Array:
    """(N/COLUMNS, K, COLUMNS) of b^T, where b is (N, K)."""
    packed = _panels(len(b), b.shape[1])
    _pack_transposed_columns(b, packed)
    return packed


# --- a b ---------------------------------------------------------------------------------------------------------


@compiled(parallel=True)
def _multiply(a: Array, b: Array, bias: Array, panels: Array, c: Array, go_on: bool) -> None:
    """c (M and N rounded up to whole tiles) = a b + bias, or, to go on, c + a b.

    a packed by `_pack_rows`; panels: scratch per thread.
    """
    tiles, K = a.shape[:2]
    N = b.shape[1]
    tiles_per_block = BLOCK // ROWS
    row_blocks, column_blocks = -(-tiles // tiles_per_block), -(-N // BLOCK)
    width = c.shape[1]
    for task in nb.prange(row_blocks * column_blocks):
        first_tile, n0 = task % row_blocks * tiles_per_block, task // row_blocks * BLOCK
        last_tile, end = min(first_tile + tiles_per_block, tiles), min(n0 + BLOCK, width)
        mine = panels[thread_id()]
        steps = (end - n0) // COLUMNS * (last_tile - first_tile)
        for k0 in range(0, max(K, 1), DEPTH):  # an empty sum is the bias
            depth = min(DEPTH, K - k0)
            pack_columns(b, k0, n0, depth, N, mine)
            rows, step = max(0, min(DEPTH, K - k0 - DEPTH)), 0  # of the next block, to be asked for
            for n in range(n0, end, COLUMNS):  # a panel of b stays in the first-level cache
                for tile in range(first_tile, last_tile):
                    to = c.ctypes.data + 4 * (tile * ROWS * width + n)
                    before, before_row = (to, width) if k0 or go_on else (bias.ctypes.data + 4 * n, 0)
                    row, step = step * rows // steps, step + 1
                    add_product_asking(
                        a.ctypes.data + 4 * (tile * K + k0) * ROWS, mine.ctypes.data + 4 * (n - n0) * DEPTH, depth,
                        before, before_row, to, width,
                        b.ctypes.data + 4 * ((k0 + DEPTH + row) * N + n0), N, step * rows // steps - row,
                    )  # fmt: skip


def _few_rows_tile(rows: int) -> Any:
    """`rows` rows of c, a vector of columns at a time, take up as many rows of b as their factors fill registers."""
    depth = _few_depth(rows)

    @kernel
    def tile(k: Emitter, a: Ptr, b: Ptr, b_row: Int, vectors: Int, c: Ptr, c_row: Int) -> None:
        """c (rows, vectors*LANES) += a (rows, depth) b (depth, .); rows of a are FEW_DEPTH numbers apart."""
        factors = [[k.splat(a + FEW_DEPTH * r + i) for i in range(depth)] for r in range(rows)]
        for v in k.range(vectors):
            acc = [k.load(c + c_row * r + v * LANES) for r in range(rows)]
            for i in range(depth):
                x = k.load(b + b_row * i + v * LANES)
                if rows >= 4:  # there is something to do while the next rows come
                    k.prefetch(b + b_row * (depth + i) + v * LANES, level=2)
                acc = [total + factors[r][i] * x for r, total in enumerate(acc)]
            for r, total in enumerate(acc):
                k.store(c + c_row * r + v * LANES, total)

    return tile


def _few_depth(rows: int) -> int:
    """Half of the registers hold the factors; those of eight rows are read again for every vector."""
    return min(FEW_DEPTH, max(4, REGISTERS // 2 // rows))


FEW = (1, 2, 4, 8)
few_1, few_2, few_4, few_8 = (_few_rows_tile(rows) for rows in FEW)


@compiled(parallel=True)
def _multiply_few(a: Array, b: Array, rows: int, step: int, chunk: int, c: Array) -> None:
    """c (rows, N + APART) += a b: a (K/FEW_DEPTH, rows, FEW_DEPTH), b (K, N), read row by row, as it lies in memory."""
    K, N = b.shape
    for task in nb.prange(-(-N // chunk)):
        n0 = task * chunk
        vectors = min(chunk, N - n0) // LANES
        at_c = c.ctypes.data + 4 * n0
        for k0 in range(0, K, step):
            at_a = a.ctypes.data + 4 * (k0 // FEW_DEPTH * rows * FEW_DEPTH + k0 % FEW_DEPTH)
            at_b = b.ctypes.data + 4 * (k0 * N + n0)
            if rows == 1:
                few_1(at_a, at_b, N, vectors, at_c, N + APART)
            elif rows == 2:
                few_2(at_a, at_b, N, vectors, at_c, N + APART)
            elif rows == 4:
                few_4(at_a, at_b, N, vectors, at_c, N + APART)
            else:
                few_8(at_a, at_b, N, vectors, at_c, N + APART)


def _matmul_few(a: Array, b: Array, bias: Array | None) -> Array:
    """`matmul` for a few rows, which wait for b and nothing else: packing it would only take longer."""
    (M, K), N = a.shape, b.shape[1]
    rows = next(few for few in FEW if few >= M)
    padded = np.zeros((rows, K), np.float32)
    padded[:M] = a
    packed = np.ascontiguousarray(padded.reshape(rows, K // FEW_DEPTH, FEW_DEPTH).transpose(1, 0, 2))
    c = np.zeros((rows, N + APART), np.float32)
    if bias is not None:
        c[:M, :N] = bias
    chunk = min(FEW_CHUNK, round_up(-(-N // nb.get_num_threads()), LANES))
    _multiply_few(packed, b, rows, _few_depth(rows), chunk, c)
    return np.ascontiguousarray(c[:M, :N])


def matmul(a: Array, b: Array, bias: Array | None = None) -> Array:
    """a b (+ bias), float32: a (M, K), contiguous or a transposed view, b (K, N) contiguous -> (M, N).

    bias: (N,), or (M, N), what the sum goes on from.
    """
    M, N = len(a), b.shape[1]
    few = 1 <= M <= 4 or (M <= 8 and N >= 4 * FEW_CHUNK)  # shorter rows of b are not worth it
    if few and N % LANES == 0 and len(b) % FEW_DEPTH == 0 and b.size >= 1 << 18:
        return _matmul_few(a, b, bias)
    c = np.empty((round_up(M, ROWS), round_up(N, COLUMNS)), np.float32)
    start = np.zeros(c.shape[1], np.float32)
    go_on = bias is not None and bias.ndim == 2
    if bias is not None:
        (c[:M] if go_on else start)[..., :N] = bias
    panels = scratch(nb.get_num_threads(), BLOCK // COLUMNS, DEPTH, COLUMNS)
    _multiply(_packed_rows(a), b, start, panels, c, go_on)
    return np.ascontiguousarray(c[:M, :N])


# --- a b^T -------------------------------------------------------------------------------------------------------


@compiled(parallel=True)
def _multiply_rows(a: Array, panels: Array, transposed: bool, zeros: Array, blocks: Array, c: Array) -> None:
    """c (M, N), or (N, M) if transposed, = a b; a (M, K), read where it lies, M whole tiles; panels: the packed b.

    zeros (COLUMNS,); blocks (threads, GROUP, N rounded up): scratch.
    """
    M, K = a.shape
    N = c.shape[0] if transposed else c.shape[1]
    width = blocks.shape[2]
    for task in nb.prange(-(-M // GROUP)):
        block = blocks[thread_id()]
        m0, rows = task * GROUP, min(GROUP, M - task * GROUP)
        for k0 in range(0, max(K, 1), ROW_DEPTH):
            depth = min(ROW_DEPTH, K - k0)
            for panel in range(panels.shape[0]):
                for r in range(0, rows, ROWS):
                    at = a.ctypes.data + 4 * ((m0 + r) * K + k0)
                    to = block.ctypes.data + 4 * (r * width + panel * COLUMNS)
                    before, before_row = (to, width) if k0 else (zeros.ctypes.data, 0)
                    at_b = panels.ctypes.data + 4 * (panel * K + k0) * COLUMNS
                    if panel == 0:
                        add_product_of_rows_asking(at, K, at_b, depth, before, before_row, to, width)
                    else:
                        add_product_of_rows(at, K, at_b, depth, before, before_row, to, width)
        if transposed:
            for n in range(N):
                for r in range(rows):
                    c[n, m0 + r] = block[r, n]
        else:
            for r in range(rows):
                for n in range(N):
                    c[m0 + r, n] = block[r, n]


def _whole_tiles(a: Array) -> Array:
    """a with rows of zeros behind it up to a whole number of tiles; a itself where none is missing."""
    missing = -len(a) % ROWS
    return np.pad(a, ((0, missing), (0, 0))) if missing else a


def matmul_transposed(a: Array, b: Array) -> Array:
    """a b^T, float32, both contiguous: a (M, K), b (N, K) -> (M, N)."""
    swap = len(b) > len(a)
    rows, others = (b, a) if swap else (a, b)
    packed = transposed_panels(others)
    padded = _whole_tiles(rows)
    blocks = scratch(nb.get_num_threads(), GROUP, len(packed) * COLUMNS)
    c = np.empty((len(others), len(padded)) if swap else (len(padded), len(others)), np.float32)
    _multiply_rows(padded, packed, swap, np.zeros(COLUMNS, np.float32), blocks, c)
    return np.ascontiguousarray(c[: len(a), : len(b)])


# --- w += an SGD step along a b ----------------------------------------------------------------------------------


@compiled(parallel=True)
def _update(a: Array, b: Array, w: Array, velocity: Array, edges: Array, factors: Array) -> None:
    """a, b packed (rows of x^T, columns of dy); edges (threads, ROWS, COLUMNS) take the tiles that overhang w."""
    M, N = w.shape
    K = a.shape[1]
    rate, keep = factors[0], factors[1]
    together = max(1, min(4, K // 32))  # tiles below each other: the deeper the sum, the more a panel's way costs
    for task in nb.prange(-(-a.shape[0] // together)):
        edge = edges[thread_id()]
        first, last = task * together, min(a.shape[0], task * together + together)
        for panel in range(b.shape[0]):  # it serves these tiles while it is in the first-level cache
            n = panel * COLUMNS
            at_b = b.ctypes.data + 4 * panel * K * COLUMNS
            for tile in range(first, last):
                m = tile * ROWS
                at_a = a.ctypes.data + 4 * tile * K * ROWS
                if m + ROWS <= M and n + COLUMNS <= N:
                    at = 4 * (m * N + n)
                    update_product(
                        at_a, at_b, K, w.ctypes.data + at, velocity.ctypes.data + at, N,
                        factors.ctypes.data, factors.ctypes.data + 4,
                    )  # fmt: skip
                else:
                    for r in range(ROWS):
                        for x in range(COLUMNS):
                            edge[r, x] = 0
                    add_product(at_a, at_b, K, edge.ctypes.data, COLUMNS, edge.ctypes.data, COLUMNS)
                    for r in range(min(ROWS, M - m)):
                        for x in range(min(COLUMNS, N - n)):
                            velocity[m + r, n + x] = velocity_after(velocity[m + r, n + x], edge[r, x], rate, keep)
                            w[m + r, n + x] += velocity[m + r, n + x]


def matmul_update(a: Array, b: Array, w: Array, velocity: Array, lr: float, momentum: float) -> None:
    """w (M, N) takes an SGD step along the gradient a b, which is never stored; velocity (M, N); both C-contiguous."""
    packed = _panels(b.shape[1], len(b))
    pack_all_columns(b, packed)
    edges = np.empty((nb.get_num_threads(), ROWS, COLUMNS), np.float32)
    _update(_packed_rows(a), packed, w, velocity, edges, np.array([lr, momentum], np.float32))
