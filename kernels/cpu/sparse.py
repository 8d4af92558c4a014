"""Products with an operand that is mostly zeros: what a dense layer behind ReLU and dropout has to do.

After some hundred updates three of four numbers that the convolutions hand to the next layer are zeros, by ReLU or by
dropout, and whatever a zero is multiplied with changes no sum. So the others are put into lists, and only they are
multiplied:

    matmul              x w        a row of w joins a sample's sum where that sample's x is not 0
    matmul_update       x^T dy     a row of dy joins the gradient of a feature's weights where that sample's x is not 0
    matmul_transposed   dy w^T     is computed where x is not 0: ReLU and dropout discard the rest of this gradient

A row of VECS vectors stays in registers, or passes through them, for every entry of a list: the entry names a row of a
panel, and panels of DEPTH rows stay in the first-level cache. The first two spread a number of x over a vector, and sum
in the order of the dense products in `kernels.cpu.matmul`: the results are theirs, bit for bit, unless the other
operand holds numbers that are not finite, which 0 * inf = nan would spread. The third sums in another order.

Floor: 2*M*K*N operations times the share of x that is not 0. For VECS multiply-adds there are VECS + 2 loads, of which
two are possible at a time, so that 80 % of the peak is the limit; and a list of a dozen entries ends in a mispredicted
branch. Dense products win where more of x is not 0 than LISTED, or LISTED_DX. With a quarter of x not 0, 128 samples
and tdcnn's 32768 x 4096 weights, the three take 75, 103 and 88 ms, where the floor of each dense one is 98.
"""

from typing import NamedTuple

import numba as nb
import numpy as np
from numpy.typing import NDArray

from kernels.cpu.matmul import COLUMNS as PANEL
from kernels.cpu.matmul import pack_all_columns, pack_columns
from kernels.cpu.sgd import sgd_step, velocity_after
from kernels.cpu.simd import LANES, Bytes, Emitter, Int, Ptr, Var, Vec, kernel
from kernels.cpu.tools import Array, compiled, round_up, scratch, thread_id

VECS = 8
WIDTH = VECS * LANES  # columns of a row in registers: WIDTH / PANEL panels side by side
DEPTH = 8192 // WIDTH  # rows of a panel: 32 KB of WIDTH columns
GROUP = 64  # rows of a weight matrix that a task updates
LISTED, LISTED_DX = 0.5, 0.35  # of x is not 0, at most, where lists pay
SIDE = 4  # rows in registers side by side that a task fetches weights for, where there are enough


def pays(x: Array, w: Array, share: float = LISTED) -> bool:
    """Is at most this share of x (M, K) not 0, and w (K, N) large enough? Judged by every 61st number of x."""
    some = x.reshape(-1)[::61]
    return len(x) >= 16 and w.size >= 1 << 20 and int(np.count_nonzero(some)) <= share * some.size


# --- lists -------------------------------------------------------------------------------------------------------


class Lists(NamedTuple):
    """The entries of a matrix (R, K) that are not 0, block after block of DEPTH columns.

    values, places (blocks, R*(DEPTH+1)): numbers and their columns in the block, row after row; starts, counts
    (blocks, R): where those of a row are. A place too many is written behind each row's.
    """

    values: Array
    places: NDArray[np.uint8]
    starts: NDArray[np.int32]
    counts: NDArray[np.int32]

    @classmethod
    def empty(cls, R: int, K: int) -> "Lists":
        blocks = -(-K // DEPTH)
        starts, counts = np.empty((2, blocks, R), np.int32)
        return cls(scratch(blocks, R * (DEPTH + 1)), np.empty((blocks, R * (DEPTH + 1)), np.uint8), starts, counts)


@compiled(parallel=True)
def _list_rows(x: Array, lists: Lists) -> None:
    """The lists of x (R, K)."""
    values, places, starts, counts = lists
    R, K = x.shape
    for block in nb.prange(values.shape[0]):
        n = 0
        for r in range(R):
            starts[block, r] = n
            for i in range(min(DEPTH, K - block * DEPTH)):  # without a branch: the next entry overwrites a zero
                value = x[r, block * DEPTH + i]
                values[block, n], places[block, n] = value, i
                n += value != 0
            counts[block, r] = n - starts[block, r]


@compiled(parallel=True)
def _list_columns(x: Array, lists: Lists) -> None:
    """The lists of x^T, where x is (K, R); row by row of x, as it lies in memory: once to count, once to copy."""
    values, places, starts, counts = lists
    K, R = x.shape
    for task in nb.prange(-(-R // GROUP)):
        r0, r1 = task * GROUP, min(R, task * GROUP + GROUP)
        for block in range(values.shape[0]):
            k0, depth = block * DEPTH, min(DEPTH, K - block * DEPTH)
            for r in range(r0, r1):
                counts[block, r] = 0
            for i in range(depth):
                for r in range(r0, r1):
                    counts[block, r] += x[k0 + i, r] != 0
            n = r0 * (DEPTH + 1)
            for r in range(r0, r1):
                starts[block, r] = n
                n += counts[block, r] + 1
                counts[block, r] = 0
            for i in range(depth):
                for r in range(r0, r1):  # without a branch: the next entry of the row overwrites a zero
                    n = starts[block, r] + counts[block, r]
                    values[block, n], places[block, n] = x[k0 + i, r], i
                    counts[block, r] += x[k0 + i, r] != 0


# --- vector kernels ----------------------------------------------------------------------------------------------


def _row(k: Emitter, panels: Ptr, panel: Int, places: Bytes, entry: Int) -> list[Vec]:
    """The WIDTH numbers of the row that an entry names; `panel` leads from one panel to its neighbour."""
    row = panels + k.load_byte(places + entry) * PANEL
    return [k.load(row + panel * (v * LANES // PANEL) + v * LANES % PANEL) for v in range(VECS)]


def _joined(k: Emitter, values: Ptr, places: Bytes, count: Int, panels: Ptr, panel: Int, before: Ptr) -> list[Var]:
    """before (WIDTH) + the sum over a list of value * row."""
    acc = [k.var(k.load(before + LANES * v)) for v in range(VECS)]
    for i in k.range(count):
        x = k.splat(values + i)
        for v, row in enumerate(_row(k, panels, panel, places, i)):
            acc[v] += x * row
    return acc


@kernel
def add_rows(k: Emitter, values: Ptr, places: Bytes, count: Int, panels: Ptr, panel: Int, before: Ptr, c: Ptr) -> None:
    """c (WIDTH) = before + the sum over a list."""
    for v, total in enumerate(_joined(k, values, places, count, panels, panel, before)):
        k.store(c + LANES * v, total)


@kernel
def update_row(
    k: Emitter, values: Ptr, places: Bytes, count: Int, panels: Ptr, panel: Int, before: Ptr, w: Ptr, velocity: Ptr,
    lr: Ptr, momentum: Ptr,
) -> None:  # fmt: skip
    """The sum over a list is the gradient of WIDTH weights: velocity = momentum*velocity - lr * sum; w += velocity.

    The weights to their right are asked for meanwhile: they come next.
    """
    for v in range(VECS):
        k.prefetch(w + WIDTH + LANES * v)
        k.prefetch(velocity + WIDTH + LANES * v)
    acc = _joined(k, values, places, count, panels, panel, before)
    rate, keep = k.splat(lr), k.splat(momentum)
    for v in range(VECS):
        at = LANES * v
        sgd_step(k, w + at, velocity + at, acc[v].get(), rate, keep)


@kernel
def add_dots(k: Emitter, places: Bytes, count: Int, panels: Ptr, panel: Int, w: Ptr, sums: Ptr) -> None:
    """sums (count, LANES) += w * row for every entry of a list, lane by lane over the WIDTH weights at w.

    The weights to their right are asked for meanwhile: they come next.
    """
    ws = [k.load(w + LANES * v) for v in range(VECS)]
    for v in range(VECS):
        k.prefetch(w + WIDTH + LANES * v)
    for i in k.range(count):
        products = [k.load(sums + i * LANES), k.vector(0.0)]  # two sums: one waits for itself
        for v, row in enumerate(_row(k, panels, panel, places, i)):
            products[v % 2] += ws[v] * row
        k.store(sums + i * LANES, products[0] + products[1])


@kernel
def ask_for(k: Emitter, p: Ptr, row: Int, rows: Int, vectors: Int) -> None:
    """Start to bring `rows` rows of `vectors` vectors into the cache; row leads from one to the next."""
    for r in k.range(rows):
        for i in k.range(vectors):
            k.prefetch(p + row * r + i * LANES)


@kernel
def sum_lanes(k: Emitter, sums: Ptr, total: Ptr) -> None:
    """total = the sum of the lanes of the vector at sums."""
    k.store_float(total, k.vector(0.0))
    k.add_sum(total, k.load(sums))


# --- products ----------------------------------------------------------------------------------------------------


@compiled(parallel=True)
def _multiply(lists: Lists, w: Array, bias: Array, panels: Array, sums: Array, y: Array) -> None:
    """y (M, N) = x w + bias, from the lists of x; bias (N rounded up); scratch: panels (threads, ., DEPTH, PANEL) and
    sums (threads, side, M, WIDTH)."""
    values, places, starts, counts = lists
    M, N = y.shape
    K = w.shape[0]
    side = sums.shape[1]
    for task in nb.prange(-(-N // (side * WIDTH))):
        mine, total = panels[thread_id()], sums[thread_id()]
        n0 = task * side * WIDTH
        rows = min(side, -(-(N - n0) // WIDTH))
        for s in range(rows):
            for m in range(M):
                for i in range(WIDTH):
                    total[s, m, i] = bias[n0 + s * WIDTH + i]
        for block in range(values.shape[0]):
            k0 = block * DEPTH
            pack_columns(w, k0, n0, min(DEPTH, K - k0), N, mine)
            ahead = w.ctypes.data + 4 * ((k0 + DEPTH) * N + n0)  # the next block, asked for behind the arithmetic
            for s in range(rows):
                at_panels = mine.ctypes.data + 4 * s * WIDTH * DEPTH
                for m in range(M):
                    first, last = m * DEPTH // M, (m + 1) * DEPTH // M
                    ask_for(ahead + 4 * (first * N + s * WIDTH), N, last - first, VECS)
                    entry, to = block * values.shape[1] + starts[block, m], total.ctypes.data + 4 * (s * M + m) * WIDTH
                    add_rows(
                        values.ctypes.data + 4 * entry, places.ctypes.data + entry, counts[block, m],
                        at_panels, PANEL * DEPTH, to, to,
                    )  # fmt: skip
        for s in range(rows):
            for m in range(M):
                for i in range(min(WIDTH, N - n0 - s * WIDTH)):
                    y[m, n0 + s * WIDTH + i] = total[s, m, i]


def matmul(x: Array, w: Array, bias: Array) -> Array:
    """x w + bias, float32, contiguous: x (M, K) of many zeros, w (K, N), bias (N,) -> (M, N)."""
    (M, K), N = x.shape, w.shape[1]
    lists = Lists.empty(M, K)
    _list_rows(x, lists)
    threads = nb.get_num_threads()
    rows = -(-N // WIDTH)
    side = max(1, min(SIDE, rows // threads))
    start = np.zeros(rows * WIDTH, np.float32)
    start[:N] = bias
    y = np.empty((M, N), np.float32)
    panels, sums = scratch(threads, side * WIDTH // PANEL, DEPTH, PANEL), scratch(threads, side, M, WIDTH)
    _multiply(lists, w, start, panels, sums, y)
    return y


@compiled(parallel=True)
def _update(lists: Lists, panels: Array, w: Array, velocity: Array, zeros: Array, sums: Array, factors: Array) -> None:
    """The lists are those of x^T, panels dy packed; sums (threads, GROUP, WIDTH): scratch; factors (lr, momentum)."""
    values, places, starts, counts = lists
    M, N = w.shape
    samples = panels.shape[1]
    blocks = values.shape[0]
    rate, keep = factors[0], factors[1]
    for task in nb.prange(-(-M // GROUP)):
        mine = sums[thread_id()]
        first, rows = task * GROUP, min(GROUP, M - task * GROUP)
        for n in range(0, N, WIDTH):
            whole = n + WIDTH <= N
            for block in range(blocks):
                at_panels = panels.ctypes.data + 4 * (n * samples + block * DEPTH * PANEL)
                for r in range(rows):
                    entry = block * values.shape[1] + starts[block, first + r]
                    at_values, at_places = values.ctypes.data + 4 * entry, places.ctypes.data + entry
                    count, to = counts[block, first + r], mine.ctypes.data + 4 * r * WIDTH
                    before = to if block else zeros.ctypes.data
                    if whole and block == blocks - 1:
                        at = 4 * ((first + r) * N + n)
                        update_row(
                            at_values, at_places, count, at_panels, PANEL * samples, before,
                            w.ctypes.data + at, velocity.ctypes.data + at, factors.ctypes.data, factors.ctypes.data + 4,
                        )  # fmt: skip
                    else:
                        add_rows(at_values, at_places, count, at_panels, PANEL * samples, before, to)
            if not whole:
                for r in range(first, first + rows):
                    for i in range(N - n):
                        velocity[r, n + i] = velocity_after(velocity[r, n + i], mine[r - first, i], rate, keep)
                        w[r, n + i] += velocity[r, n + i]


def _packed(dy: Array) -> Array:
    """dy (M, N) as panels (N rounded up to WIDTH / PANEL, M, PANEL)."""
    panels = scratch(round_up(dy.shape[1], WIDTH) // PANEL, len(dy), PANEL)
    pack_all_columns(dy, panels)
    return panels


def matmul_update(x: Array, dy: Array, w: Array, velocity: Array, lr: float, momentum: float) -> None:
    """w (K, N) takes an SGD step along x^T dy: x (M, K) of many zeros, dy (M, N); everything contiguous."""
    lists = Lists.empty(x.shape[1], len(x))
    _list_columns(x, lists)
    sums, zeros = scratch(nb.get_num_threads(), GROUP, WIDTH), np.zeros(WIDTH, np.float32)
    _update(lists, _packed(dy), w, velocity, zeros, sums, np.array([lr, momentum], np.float32))


@compiled(parallel=True)
def _multiply_where_listed(lists: Lists, panels: Array, w: Array, sums: Array, tiles: Array, dx: Array) -> None:
    """dx (M, K) = dy w^T at the entries of the lists, those of x^T, and 0 elsewhere; panels: dy packed.

    Scratch: sums (threads, GROUP*DEPTH*LANES), tiles (threads, DEPTH, GROUP).
    """
    values, places, starts, counts = lists
    M, K = dx.shape
    N = w.shape[1]
    for task in nb.prange(-(-K // GROUP)):
        mine, tile = sums[thread_id()], tiles[thread_id()]
        first, rows = task * GROUP, min(GROUP, K - task * GROUP)
        for block in range(values.shape[0]):
            m0, samples = block * DEPTH, min(DEPTH, M - block * DEPTH)
            entries = 0
            for r in range(first, first + rows):
                entries += counts[block, r]
            for i in range(entries * LANES):
                mine[i] = 0
            for n in range(0, N, WIDTH):
                at_panels, to = panels.ctypes.data + 4 * (n * M + m0 * PANEL), mine.ctypes.data
                for r in range(first, first + rows):
                    at_places = places.ctypes.data + block * places.shape[1] + starts[block, r]
                    at_w = w.ctypes.data + 4 * (r * N + n)
                    add_dots(at_places, counts[block, r], at_panels, PANEL * M, at_w, to)
                    to += 4 * counts[block, r] * LANES
            for m in range(samples):
                for r in range(rows):
                    tile[m, r] = 0
            entries = 0
            for r in range(rows):
                for i in range(starts[block, first + r], starts[block, first + r] + counts[block, first + r]):
                    to = tile.ctypes.data + 4 * (places[block, i] * GROUP + r)
                    sum_lanes(mine.ctypes.data + 4 * entries * LANES, to)
                    entries += 1
            for m in range(samples):
                for r in range(rows):
                    dx[m0 + m, first + r] = tile[m, r]


def matmul_transposed(dy: Array, w: Array, x: Array) -> Array:
    """dy w^T where x is not 0, and 0 elsewhere: dy (M, N), w (K, N), x (M, K), contiguous; N whole rows of WIDTH."""
    lists = Lists.empty(x.shape[1], len(x))
    _list_columns(x, lists)
    threads = nb.get_num_threads()
    dx = np.empty(x.shape, np.float32)
    sums, tiles = scratch(threads, GROUP * DEPTH * LANES), scratch(threads, DEPTH, GROUP)
    _multiply_where_listed(lists, _packed(dy), w, sums, tiles, dx)
    return dx
