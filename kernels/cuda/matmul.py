"""Matrix products on the GPU, with what follows a product applied while it is in registers.

A block of threads computes one tile of the output. Slice by slice of the sum, it brings the operands into shared
memory; each thread then multiplies a small tile out of it in registers, ROWS x COLUMNS outputs from ROWS + COLUMNS
numbers read. The next slice is fetched from memory meanwhile. Reading either operand transposed changes only the order
in which it is fetched.

Where there are fewer tiles than the GPU can work on, the sum is cut into parts: each block adds up one part of one
tile, and a second kernel adds the parts, always in the same order, so that a result never depends on timing.

Floors for M x N outputs of K terms: 2*M*N*K operations; 4*(M*K + K*N) bytes read; an update reads and writes w and v.
"""

from dataclasses import dataclass
from typing import Any

from kernels.cuda import tf32
from kernels.cuda.device import (
    ALIGN,
    SIMULATED,
    Array,
    F,
    Flat,
    I,
    Kernel,
    R,
    blocks_for,
    cuda,
    empty,
    float32,
    helper,
    kernel,
    load4,
    multiprocessors,
    settings,
)


@dataclass(frozen=True)
class Shape:
    """How a product is cut: the tile of a block, the slice of the sum that it holds, and the tile of a thread."""

    tile_m: int
    tile_n: int
    slice_k: int
    rows: int  # outputs of a thread: rows x columns, in groups of four
    columns: int
    resident: int = 1  # blocks that should fit on a multiprocessor

    @property
    def threads(self) -> int:
        return (self.tile_m // self.rows) * (self.tile_n // self.columns)


# Many rows, and few (one batch of the dense layer, one step of the LSTM).
WIDE = Shape(16, 16, 4, 8, 8) if SIMULATED else Shape(128, 128, 8, 8, 8, resident=2)
FLAT = Shape(4, 16, 4, 4, 8) if SIMULATED else Shape(32, 128, 16, 4, 8, resident=4)
TENSOR = Shape(128, 128, 16, 8, 8, resident=2)  # for the tensor cores: see `make_tensor_product`

# What becomes of a product: stored, with the bias added, or used up in an SGD update.
STORE, BIAS, UPDATE = "store", "bias", "update"
# Which operand lies transposed in memory: x w, dy w^T, x^T dy.
PLAIN, TURNED_B, TURNED_A = "plain", "turned_b", "turned_a"


def make_mover(width: int, slice_k: int, threads: int, pitch: int, along: bool, rounded: bool) -> tuple[Any, Any]:
    """How a block brings a slice (slice_k, width) of an operand into shared memory, in two steps: (fetch, put).

    fetch: memory -> registers of the threads, zeros beyond the operand's edge; put: registers -> shared memory. along:
    numbers that are neighbours in memory differ in their row of the output (else in their term of the sum). rounded:
    to TF32.
    """
    count = width * slice_k // threads

    @helper
    def fetch(x: Flat, x0: int, stride: int, u0: int, u_end: int, k0: int, k_end: int, t: int, taken: Flat) -> None:
        for i in range(count):
            e = t + threads * i
            value = float32(0)
            if along:
                if u0 + e % width < u_end and k0 + e // width < k_end:
                    value = x[x0 + (k0 + e // width) * stride + u0 + e % width]
            else:
                if u0 + e // slice_k < u_end and k0 + e % slice_k < k_end:
                    value = x[x0 + (u0 + e // slice_k) * stride + k0 + e % slice_k]
            taken[i] = value

    @helper
    def put(taken: Flat, tile: Flat, t: int) -> None:
        for i in range(count):
            e = t + threads * i
            value = tf32.rounded(taken[i]) if rounded else taken[i]
            if along:
                tile[e // width * pitch + e % width] = value
            else:
                tile[e % slice_k * pitch + e // slice_k] = value

    return fetch, put


def make_epilogue(then: str) -> Any:
    """What is done with a finished sum: out[e] is its place, n its column."""
    bias, update = then == BIAS, then == UPDATE

    @helper
    def finish(out: Flat, extra: Flat, e: int, n: int, total: float, lr: float, momentum: float) -> None:
        if update:
            v = momentum * extra[e] - lr * total
            extra[e] = v
            out[e] += v
        elif bias:
            out[e] = total + extra[n]
        else:
            out[e] = total

    return finish


def make_product(shape: Shape, layout: str, then: str, name: str) -> Kernel:
    """The kernel out = a b for one shape, layout and epilogue.

    a holds (m, k) at a0 + m*lda + k (TURNED_A: at a0 + k*lda + m), b holds (k, n) at b0 + k*ldb + n (TURNED_B:
    b0 + n*ldb + k). Block z adds up the terms from z*part to (z+1)*part and stores them behind z*M*N. With an
    epilogue there is one part; `extra` is the bias, or the velocities v of the weights `out`.
    """
    tile_m, tile_n, slice_k, rows, columns = shape.tile_m, shape.tile_n, shape.slice_k, shape.rows, shape.columns
    threads, wide = shape.threads, tile_n // columns
    # Four numbers behind each row of shared memory: stored down the columns, they fall into different banks.
    pitch_a, pitch_b = tile_m + 4, tile_n + 4
    size_a, size_b, outputs = slice_k * pitch_a, slice_k * pitch_b, rows * columns
    fetched_a, fetched_b = tile_m * slice_k // threads, tile_n * slice_k // threads
    fetch_a, put_a = make_mover(tile_m, slice_k, threads, pitch_a, layout == TURNED_A, False)
    fetch_b, put_b = make_mover(tile_n, slice_k, threads, pitch_b, layout != TURNED_B, False)
    # A thread's rows and columns are groups of four, spread over the tile.
    groups_m, groups_n = rows // 4, columns // 4
    apart_m, apart_n = tile_m // groups_m, tile_n // groups_n
    finish = make_epilogue(then)

    @kernel((F, I, I, F, I, I, F, F, I, I, I, I, R, R), threads, name, shape.resident)
    def product(
        a: Flat, a0: int, lda: int, b: Flat, b0: int, ldb: int, out: Flat, extra: Flat,
        M: int, N: int, K: int, part: int, lr: float, momentum: float,
    ) -> None:  # fmt: skip
        a_tile = cuda.shared.array(size_a, float32, ALIGN)  # (slice_k, tile_m)
        b_tile = cuda.shared.array(size_b, float32, ALIGN)  # (slice_k, tile_n)
        a_next, b_next = cuda.local.array(fetched_a, float32), cuda.local.array(fetched_b, float32)
        a_row, b_row = cuda.local.array(rows, float32), cuda.local.array(columns, float32)
        acc = cuda.local.array(outputs, float32)
        t = cuda.threadIdx.x & (threads - 1)
        tm, tn = 4 * (t // wide), 4 * (t % wide)
        m0, n0 = cuda.blockIdx.y * tile_m, cuda.blockIdx.x * tile_n
        first = cuda.blockIdx.z * part
        end = min(K, first + part)
        for i in range(outputs):
            acc[i] = float32(0)
        for k in range(first - slice_k, end, slice_k):  # one round ahead of the first: it only fetches
            if k >= first:
                cuda.syncthreads()
                put_a(a_next, a_tile, t)
                put_b(b_next, b_tile, t)
                cuda.syncthreads()
            fetch_a(a, a0, lda, m0, M, k + slice_k, end, t, a_next)
            fetch_b(b, b0, ldb, n0, N, k + slice_k, end, t, b_next)
            if k >= first:
                for kk in range(slice_k):
                    for g in range(groups_m):
                        at = kk * pitch_a + g * apart_m + tm
                        a_row[4 * g], a_row[4 * g + 1], a_row[4 * g + 2], a_row[4 * g + 3] = load4(a_tile, at)
                    for g in range(groups_n):
                        at = kk * pitch_b + g * apart_n + tn
                        b_row[4 * g], b_row[4 * g + 1], b_row[4 * g + 2], b_row[4 * g + 3] = load4(b_tile, at)
                    for i in range(rows):
                        for j in range(columns):
                            acc[i * columns + j] += a_row[i] * b_row[j]
        for i in range(rows):
            m = m0 + i // 4 * apart_m + tm + i % 4
            for j in range(columns):
                n = n0 + j // 4 * apart_n + tn + j % 4
                if m < M and n < N:
                    finish(out, extra, (cuda.blockIdx.z * M + m) * N + n, n, acc[i * columns + j], lr, momentum)

    return product


def make_tensor_product(shape: Shape, layout: str, then: str, name: str) -> Kernel:
    """`make_product` on the tensor cores: operands rounded to TF32, sums in float32.

    The warps stand 2 x 4 on the tile, each with tile_m/2 x tile_n/4 outputs, 16 x 8 at a time: see `kernels.cuda.tf32`
    for a thread's share of those.
    """
    tile_m, tile_n, slice_k, threads = shape.tile_m, shape.tile_n, shape.slice_k, shape.threads
    warp_m, warp_n = tile_m // 2, tile_n // 4
    down, across = warp_m // 16, warp_n // 8  # how many times 16 x 8
    # Lanes read four rows of eight numbers: eight numbers behind each row put all 32 into different banks.
    pitch_a, pitch_b = tile_m + 8, tile_n + 8
    size_a, size_b, outputs = slice_k * pitch_a, slice_k * pitch_b, down * across * 4
    fetched_a, fetched_b = tile_m * slice_k // threads, tile_n * slice_k // threads
    fetch_a, put_a = make_mover(tile_m, slice_k, threads, pitch_a, layout == TURNED_A, True)
    fetch_b, put_b = make_mover(tile_n, slice_k, threads, pitch_b, layout != TURNED_B, True)
    shares_a, shares_b = down * 4, across * 2
    finish = make_epilogue(then)

    @kernel((F, I, I, F, I, I, F, F, I, I, I, I, R, R), threads, name, shape.resident)
    def product(
        a: Flat, a0: int, lda: int, b: Flat, b0: int, ldb: int, out: Flat, extra: Flat,
        M: int, N: int, K: int, part: int, lr: float, momentum: float,
    ) -> None:  # fmt: skip
        a_tile = cuda.shared.array(size_a, float32, ALIGN)  # (slice_k, tile_m)
        b_tile = cuda.shared.array(size_b, float32, ALIGN)  # (slice_k, tile_n)
        a_next, b_next = cuda.local.array(fetched_a, float32), cuda.local.array(fetched_b, float32)
        a_share, b_share = cuda.local.array(shares_a, float32), cuda.local.array(shares_b, float32)
        acc = cuda.local.array(outputs, float32)
        t = cuda.threadIdx.x & (threads - 1)
        lane, warp = t % 32, t // 32
        g, q = lane // 4, lane % 4
        tm, tn = warp // 4 * warp_m, warp % 4 * warp_n
        m0, n0 = cuda.blockIdx.y * tile_m, cuda.blockIdx.x * tile_n
        first = cuda.blockIdx.z * part
        end = min(K, first + part)
        for i in range(outputs):
            acc[i] = float32(0)
        for k in range(first - slice_k, end, slice_k):  # one round ahead of the first: it only fetches
            if k >= first:
                cuda.syncthreads()
                put_a(a_next, a_tile, t)
                put_b(b_next, b_tile, t)
                cuda.syncthreads()
            fetch_a(a, a0, lda, m0, M, k + slice_k, end, t, a_next)
            fetch_b(b, b0, ldb, n0, N, k + slice_k, end, t, b_next)
            if k >= first:
                for kk in range(0, slice_k, 8):
                    for i in range(down):
                        at = (kk + q) * pitch_a + tm + 16 * i + g
                        a_share[4 * i], a_share[4 * i + 1] = a_tile[at], a_tile[at + 8]
                        a_share[4 * i + 2], a_share[4 * i + 3] = a_tile[at + 4 * pitch_a], a_tile[at + 4 * pitch_a + 8]
                    for j in range(across):
                        at = (kk + q) * pitch_b + tn + 8 * j + g
                        b_share[2 * j], b_share[2 * j + 1] = b_tile[at], b_tile[at + 4 * pitch_b]
                    for i in range(down):
                        for j in range(across):
                            e = 4 * (i * across + j)
                            acc[e], acc[e + 1], acc[e + 2], acc[e + 3] = tf32.mma(
                                (a_share[4 * i], a_share[4 * i + 1], a_share[4 * i + 2], a_share[4 * i + 3]),
                                (b_share[2 * j], b_share[2 * j + 1]),
                                (acc[e], acc[e + 1], acc[e + 2], acc[e + 3]),
                            )
        for i in range(down):
            for j in range(across):
                for s in range(4):
                    m, n = m0 + tm + 16 * i + g + s // 2 * 8, n0 + tn + 8 * j + 2 * q + s % 2
                    if m < M and n < N:
                        e = 4 * (i * across + j) + s
                        finish(out, extra, (cuda.blockIdx.z * M + m) * N + n, n, acc[e], lr, momentum)

    return product


def make_sum(then: str) -> Kernel:
    """The kernel that adds the parts (count, n) of a result, one after the other, and goes on with the sum."""
    finish = make_epilogue(then)

    @kernel((F, I, I, F, F, I, R, R), name=f"sum_parts_{then}")
    def sum_parts(
        parts: Flat, count: int, n: int, out: Flat, extra: Flat, width: int, lr: float, momentum: float
    ) -> None:
        for e in range(cuda.grid(1), n, cuda.gridsize(1)):
            total = float32(0)
            for p in range(count):
                total += parts[p * n + e]
            finish(out, extra, e, e % width, total, lr, momentum)

    return sum_parts


SUMS = {then: make_sum(then) for then in (STORE, BIAS, UPDATE)}

# What a network needs: forward; backward to the input; backward to the weights, whose rows are always many.
NEEDED = {
    "wide": [(PLAIN, STORE), (PLAIN, BIAS), (TURNED_B, STORE), (TURNED_A, STORE), (TURNED_A, UPDATE)],
    "flat": [(PLAIN, STORE), (PLAIN, BIAS), (TURNED_B, STORE)],
}
PRODUCTS = {
    (size, layout, then): make_product(shape, layout, then, f"product_{size}_{layout}_{then}")
    for size, shape in (("wide", WIDE), ("flat", FLAT))
    for layout, then in NEEDED[size]
}
if not SIMULATED:
    PRODUCTS |= {
        ("tensor", layout, then): make_tensor_product(TENSOR, layout, then, f"product_tensor_{layout}_{then}")
        for layout, then in NEEDED["wide"]
    }


# --- how a product is run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operand:
    """A matrix somewhere in an array: the first number's place and the distance from row to row."""

    array: Array
    first: int
    stride: int


def whole(x: Array) -> Operand:
    """All of a matrix (rows, columns)."""
    return Operand(x, 0, x.shape[1])


def _plan(M: int, N: int, K: int, layout: str, then: str) -> tuple[Kernel, tuple[int, int, int], int]:
    """(kernel, blocks (n, m, parts), terms of a part): one part, or as many as keep the whole GPU at work."""
    size = "flat" if layout != TURNED_A and FLAT.tile_m >= M else "wide"
    shape = FLAT if size == "flat" else WIDE
    if settings.precision == "tf32" and size == "wide":
        size, shape = "tensor", TENSOR
    tiles_m, tiles_n = -(-M // shape.tile_m), -(-N // shape.tile_n)
    # No part is shorter than four slices: it would take longer to add than to compute.
    count = max(1, min(shape.resident * multiprocessors() // (tiles_m * tiles_n), K // (4 * shape.slice_k)))
    terms = -(-K // count)
    terms += -terms % shape.slice_k
    count = max(1, -(-K // terms))
    return PRODUCTS[size, layout, then if count == 1 else STORE], (tiles_n, tiles_m, count), terms


def product_parts(a: Operand, b: Operand, M: int, N: int, K: int, layout: str) -> tuple[Array, int]:
    """The product in parts that are still to be added up: (parts (count, M*N), count)."""
    run, blocks, terms = _plan(M, N, K, layout, STORE)
    parts = empty((blocks[2], M * N))
    _launch(run, blocks, a, b, parts, parts, (M, N, K, terms), 0.0, 0.0)
    return parts, blocks[2]


def product(
    a: Operand, b: Operand, M: int, N: int, K: int, layout: str, then: str = STORE,
    out: Array | None = None, extra: Array | None = None, lr: float = 0.0, momentum: float = 0.0,
) -> Array:  # fmt: skip
    """out (M, N) = a b, and what follows (see `make_product`); a fresh array unless `out` is given."""
    out = empty((M, N)) if out is None else out
    extra = out if extra is None else extra
    run, blocks, terms = _plan(M, N, K, layout, then)
    if blocks[2] == 1:
        _launch(run, blocks, a, b, out, extra, (M, N, K, terms), lr, momentum)
    else:
        parts, count = product_parts(a, b, M, N, K, layout)
        add_parts(parts, count, out, then, extra, N, lr, momentum)
    return out


def add_parts(
    parts: Array, count: int, out: Array, then: str = STORE, extra: Array | None = None,
    width: int = 1, lr: float = 0.0, momentum: float = 0.0,
) -> None:  # fmt: skip
    """out = the sum of its `count` parts, and what follows."""
    beside = (out if extra is None else extra).flat
    SUMS[then](blocks_for(out.size), parts.flat, count, out.size, out.flat, beside, width, lr, momentum)


def _launch(
    run: Kernel, blocks: tuple[int, int, int], a: Operand, b: Operand, out: Array, extra: Array,
    sizes: tuple[int, int, int, int], lr: float, momentum: float,
) -> None:  # fmt: skip
    run(
        blocks, a.array.flat, a.first, a.stride, b.array.flat, b.first, b.stride, out.flat, extra.flat,
        *sizes, lr, momentum,
    )  # fmt: skip
