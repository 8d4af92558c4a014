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
    cuda,
    empty,
    float32,
    helper,
    index,
    kernel,
    load2,
    load4,
    multiprocessors,
    settings,
    store2,
    store4,
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
WIDE = Shape(16, 16, 4, 8, 8) if SIMULATED else Shape(128, 128, 16, 8, 8, resident=2)
FLAT = Shape(4, 16, 4, 4, 4) if SIMULATED else Shape(32, 128, 16, 4, 8, resident=4)
UNROLLED = 2  # terms of the sum that are computed without a loop around them
TENSOR = Shape(128, 128, 16, 8, 8, resident=2)  # for the tensor cores: see `make_tensor_tile`

# What becomes of a product: stored, with the bias added, or used up in an SGD update.
STORE, BIAS, UPDATE = "store", "bias", "update"
# Which operand lies transposed in memory: x w, dy w^T, x^T dy.
PLAIN, TURNED_B, TURNED_A = "plain", "turned_b", "turned_a"


# Which arrays of a product are read and written four numbers at a time: their rows begin on 16 bytes.
A_IN_FOURS, B_IN_FOURS, OUT_IN_FOURS = 1, 2, 4


def make_mover(width: int, slice_k: int, threads: int, pitch: int, along: bool, rounded: bool) -> tuple[Any, Any]:
    """How a block brings a slice (slice_k, width) of an operand into shared memory, in two steps: (fetch, put).

    fetch: memory -> registers of the threads, zeros beyond the operand's edge; put: registers -> shared memory. along:
    numbers that are neighbours in memory differ in their row of the output (else in their term of the sum). rounded:
    to TF32. A thread takes fours of neighbours, at once or one by one.
    """
    line = (width if along else slice_k) // 4  # fours of a slice that are neighbours in memory
    step, fours = threads // line, width * slice_k // (4 * threads)
    if step * line != threads or 4 * fours * threads != width * slice_k:
        raise ValueError("the threads cannot share out the slice")

    @helper
    def fetch(
        x: Flat, x0: int, stride: int, u0: int, u_end: int, k0: int, k_end: int, in_fours: int, t: int, taken: Flat
    ) -> None:
        beside = 4 * (t % line)  # along the lines of the operand; `first` and `end` across them
        if along:
            first, end, begin, inside = k0 + t // line, k_end, u0 + beside, u_end - u0 - beside
        else:
            first, end, begin, inside = u0 + t // line, u_end, k0 + beside, k_end - k0 - beside
        for i in range(4 * fours):
            taken[i] = float32(0)
        if in_fours != 0:
            for i in range(fours):
                if inside > 0 and first + step * i < end:
                    at = x0 + (first + step * i) * stride + begin
                    taken[4 * i], taken[4 * i + 1], taken[4 * i + 2], taken[4 * i + 3] = load4(x, at)
        else:
            for i in range(fours):
                for l in range(4):
                    if l < inside and first + step * i < end:
                        taken[4 * i + l] = x[index(x0 + (first + step * i) * stride + begin + l)]

    @helper
    def put(taken: Flat, tile: Flat, t: int) -> None:
        beside, first = 4 * (t % line), t // line
        if rounded:
            for i in range(4 * fours):
                taken[i] = tf32.rounded(taken[i])
        for i in range(fours):
            if along:
                at = (first + step * i) * pitch + beside
                store4(tile, at, taken[4 * i], taken[4 * i + 1], taken[4 * i + 2], taken[4 * i + 3])
            else:
                for l in range(4):
                    tile[index((beside + l) * pitch + first + step * i)] = taken[4 * i + l]

    return fetch, put


def make_epilogue(then: str, width: int) -> Any:
    """What is done with `width` finished sums, 1, 2 or 4, any bias included: out[e] is the place of the first.

    More than one are neighbours in memory, and e is a multiple of their number.
    """
    update = then == UPDATE

    @helper
    def one(w: float, beside: float, total: float, lr: float, momentum: float) -> tuple[float, float]:
        """(w, v) of a gradient."""
        v = momentum * beside - lr * total
        return w + v, v

    if width == 1:

        @helper
        def finish(out: Flat, extra: Flat, e: int, sums: Flat, first: int, lr: float, momentum: float) -> None:
            if update:
                out[index(e)], extra[index(e)] = one(out[index(e)], extra[index(e)], sums[first], lr, momentum)
            else:
                out[index(e)] = sums[first]

    elif width == 2:

        @helper
        def finish(out: Flat, extra: Flat, e: int, sums: Flat, first: int, lr: float, momentum: float) -> None:
            s0, s1 = sums[first], sums[first + 1]
            if update:
                w0, w1 = load2(out, e)
                v0, v1 = load2(extra, e)
                w0, v0 = one(w0, v0, s0, lr, momentum)
                w1, v1 = one(w1, v1, s1, lr, momentum)
                store2(out, e, w0, w1)
                store2(extra, e, v0, v1)
            else:
                store2(out, e, s0, s1)

    else:

        @helper
        def finish(out: Flat, extra: Flat, e: int, sums: Flat, first: int, lr: float, momentum: float) -> None:
            s0, s1, s2, s3 = sums[first], sums[first + 1], sums[first + 2], sums[first + 3]
            if update:
                w0, w1, w2, w3 = load4(out, e)
                v0, v1, v2, v3 = load4(extra, e)
                w0, v0 = one(w0, v0, s0, lr, momentum)
                w1, v1 = one(w1, v1, s1, lr, momentum)
                w2, v2 = one(w2, v2, s2, lr, momentum)
                w3, v3 = one(w3, v3, s3, lr, momentum)
                store4(out, e, w0, w1, w2, w3)
                store4(extra, e, v0, v1, v2, v3)
            else:
                store4(out, e, s0, s1, s2, s3)

    return finish


def make_tile(shape: Shape, then: str, pitch_a: int, pitch_b: int) -> tuple[Any, Any]:
    """What a thread does with slices in shared memory, in two functions: (multiply, finish).

    multiply adds a slice's products to the thread's sums; finish makes outputs of them. A thread's rows and columns are
    groups of four, spread over the tile.
    """
    rows, columns, slice_k, wide = shape.rows, shape.columns, shape.slice_k, shape.tile_n // shape.columns
    groups_m, groups_n = rows // 4, columns // 4
    apart_m, apart_n = shape.tile_m // groups_m, shape.tile_n // groups_n
    finish_one, finish_four, biased = make_epilogue(then, 1), make_epilogue(then, 4), then == BIAS

    @helper
    def multiply(a_tile: Flat, b_tile: Flat, t: int, acc: Flat) -> None:
        a_row, b_row = cuda.local.array(rows, float32), cuda.local.array(columns, float32)
        tm, tn = 4 * (t // wide), 4 * (t % wide)
        for kk in range(0, slice_k, UNROLLED):
            for u in range(UNROLLED):
                for g in range(groups_m):
                    at = (kk + u) * pitch_a + g * apart_m + tm
                    a_row[4 * g], a_row[4 * g + 1], a_row[4 * g + 2], a_row[4 * g + 3] = load4(a_tile, at)
                for g in range(groups_n):
                    at = (kk + u) * pitch_b + g * apart_n + tn
                    b_row[4 * g], b_row[4 * g + 1], b_row[4 * g + 2], b_row[4 * g + 3] = load4(b_tile, at)
                for i in range(rows):
                    for j in range(columns):
                        acc[i * columns + j] += a_row[i] * b_row[j]

    @helper
    def finish(
        out: Flat, extra: Flat, acc: Flat, t: int, m0: int, n0: int, z: int, M: int, N: int, in_fours: int,
        lr: float, momentum: float,
    ) -> None:  # fmt: skip
        tm, tn = m0 + 4 * (t // wide), n0 + 4 * (t % wide)
        if biased:
            for j in range(columns):
                n = tn + j // 4 * apart_n + j % 4
                if n < N:
                    bias = extra[index(n)]
                    for i in range(rows):
                        acc[i * columns + j] += bias
        if in_fours != 0:
            for i in range(rows):
                m = tm + i // 4 * apart_m + i % 4
                for g in range(groups_n):
                    n = tn + g * apart_n
                    if m < M and n < N:
                        finish_four(out, extra, (z * M + m) * N + n, acc, i * columns + 4 * g, lr, momentum)
        else:
            for i in range(rows):
                m = tm + i // 4 * apart_m + i % 4
                for j in range(columns):
                    n = tn + j // 4 * apart_n + j % 4
                    if m < M and n < N:
                        finish_one(out, extra, (z * M + m) * N + n, acc, i * columns + j, lr, momentum)

    return multiply, finish


def make_tensor_tile(shape: Shape, then: str, pitch_a: int, pitch_b: int) -> tuple[Any, Any]:
    """`make_tile` on the tensor cores: operands rounded to TF32, sums in float32.

    The warps stand 2 x 4 on the tile, each with tile_m/2 x tile_n/4 outputs, 16 x 8 at a time: see `kernels.cuda.tf32`
    for a thread's share of those.
    """
    warp_m, warp_n, slice_k = shape.tile_m // 2, shape.tile_n // 4, shape.slice_k
    down, across = warp_m // 16, warp_n // 8  # how many times 16 x 8
    shares_a, shares_b = down * 4, across * 2
    finish_one, finish_two, biased = make_epilogue(then, 1), make_epilogue(then, 2), then == BIAS

    @helper
    def multiply(a_tile: Flat, b_tile: Flat, t: int, acc: Flat) -> None:
        a_share, b_share = cuda.local.array(shares_a, float32), cuda.local.array(shares_b, float32)
        g, q, tm, tn = t % 32 // 4, t % 4, t // 32 // 4 * warp_m, t // 32 % 4 * warp_n
        for kk in range(0, slice_k, 8):
            for i in range(down):
                at, below = index((kk + q) * pitch_a + tm + 16 * i + g), index(4 * pitch_a)
                a_share[4 * i], a_share[4 * i + 1] = a_tile[at], a_tile[at + index(8)]
                a_share[4 * i + 2], a_share[4 * i + 3] = a_tile[at + below], a_tile[at + below + index(8)]
            for j in range(across):
                at = index((kk + q) * pitch_b + tn + 8 * j + g)
                b_share[2 * j], b_share[2 * j + 1] = b_tile[at], b_tile[at + index(4 * pitch_b)]
            for i in range(down):
                for j in range(across):
                    e = 4 * (i * across + j)
                    acc[e], acc[e + 1], acc[e + 2], acc[e + 3] = tf32.mma(
                        (a_share[4 * i], a_share[4 * i + 1], a_share[4 * i + 2], a_share[4 * i + 3]),
                        (b_share[2 * j], b_share[2 * j + 1]),
                        (acc[e], acc[e + 1], acc[e + 2], acc[e + 3]),
                    )

    @helper
    def finish(
        out: Flat, extra: Flat, acc: Flat, t: int, m0: int, n0: int, z: int, M: int, N: int, in_fours: int,
        lr: float, momentum: float,
    ) -> None:  # fmt: skip
        tm, tn = m0 + t // 32 // 4 * warp_m + t % 32 // 4, n0 + t // 32 % 4 * warp_n + 2 * (t % 4)
        if biased:
            for j in range(2 * across):
                n = tn + j // 2 * 8 + j % 2
                if n < N:
                    bias = extra[index(n)]
                    for i in range(2 * down):
                        acc[4 * (i // 2 * across + j // 2) + i % 2 * 2 + j % 2] += bias
        if in_fours != 0:  # here, in twos
            for i in range(down):
                for j in range(across):
                    for s in range(2):
                        m, n, e = tm + 16 * i + 8 * s, tn + 8 * j, 4 * (i * across + j) + 2 * s
                        if m < M and n < N:
                            finish_two(out, extra, (z * M + m) * N + n, acc, e, lr, momentum)
        else:
            for i in range(down):
                for j in range(across):
                    for s in range(4):
                        m, n, e = tm + 16 * i + s // 2 * 8, tn + 8 * j + s % 2, 4 * (i * across + j) + s
                        if m < M and n < N:
                            finish_one(out, extra, (z * M + m) * N + n, acc, e, lr, momentum)

    return multiply, finish


def make_product(shape: Shape, layout: str, then: str, name: str, tensor: bool = False) -> Kernel:
    """The kernel out = a b for one shape, layout and epilogue, on the tensor cores if `tensor`.

    a holds (m, k) at a0 + m*lda + k (TURNED_A: at a0 + k*lda + m), b holds (k, n) at b0 + k*ldb + n (TURNED_B:
    b0 + n*ldb + k). Block z adds up the terms from z*part to (z+1)*part and stores them behind z*M*N. With an
    epilogue there is one part; `extra` is the bias, or the velocities v of the weights `out`.
    """
    tile_m, tile_n, slice_k, threads = shape.tile_m, shape.tile_n, shape.slice_k, shape.threads
    # Numbers behind each row of shared memory halve the conflicts of what a warp stores; those of a tensor tile put
    # what a warp reads of it (four rows of eight) into different banks.
    pad = 8 if tensor else 4
    pitch_a, pitch_b = tile_m + pad, tile_n + pad
    size_a, size_b, outputs = slice_k * pitch_a, slice_k * pitch_b, tile_m * tile_n // threads
    fetched_a, fetched_b = tile_m * slice_k // threads, tile_n * slice_k // threads
    fetch_a, put_a = make_mover(tile_m, slice_k, threads, pitch_a, layout == TURNED_A, tensor)
    fetch_b, put_b = make_mover(tile_n, slice_k, threads, pitch_b, layout != TURNED_B, tensor)
    multiply, finish = (make_tensor_tile if tensor else make_tile)(shape, then, pitch_a, pitch_b)

    @kernel((F, I, I, F, I, I, F, F, I, I, I, I, I, R, R), threads, name, shape.resident)
    def product(
        a: Flat, a0: int, lda: int, b: Flat, b0: int, ldb: int, out: Flat, extra: Flat,
        M: int, N: int, K: int, part: int, in_fours: int, lr: float, momentum: float,
    ) -> None:  # fmt: skip
        a_tile = cuda.shared.array(size_a, float32, ALIGN)  # (slice_k, tile_m)
        b_tile = cuda.shared.array(size_b, float32, ALIGN)  # (slice_k, tile_n)
        a_next, b_next = cuda.local.array(fetched_a, float32), cuda.local.array(fetched_b, float32)
        acc = cuda.local.array(outputs, float32)
        t = cuda.threadIdx.x & (threads - 1)
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
            fetch_a(a, a0, lda, m0, M, k + slice_k, end, in_fours & A_IN_FOURS, t, a_next)
            fetch_b(b, b0, ldb, n0, N, k + slice_k, end, in_fours & B_IN_FOURS, t, b_next)
            if k >= first:
                multiply(a_tile, b_tile, t, acc)
        finish(out, extra, acc, t, m0, n0, cuda.blockIdx.z, M, N, in_fours & OUT_IN_FOURS, lr, momentum)

    return product


# A block that adds up parts, or rows: numbers side by side, and parts at a time.
ACROSS, DOWN = (2, 2) if SIMULATED else (32, 8)
SUM_THREADS = ACROSS * DOWN


def make_sum(then: str) -> Kernel:
    """The kernel that adds the parts (count, n) of a result, and goes on with the sum.

    Thread (d, a) adds parts d, d + DOWN, ... of one number, and the first of its column those DOWN sums: always in the
    same order.
    """
    finish, biased = make_epilogue(then, 1), then == BIAS

    @kernel((F, I, I, F, F, I, R, R), SUM_THREADS, name=f"sum_parts_{then}")
    def sum_parts(
        parts: Flat, count: int, n: int, out: Flat, extra: Flat, width: int, lr: float, momentum: float
    ) -> None:
        collected = cuda.shared.array(SUM_THREADS, float32)
        total = cuda.local.array(1, float32)
        t = cuda.threadIdx.x & (SUM_THREADS - 1)
        for e0 in range(cuda.blockIdx.x * ACROSS, n, cuda.gridDim.x * ACROSS):
            e = e0 + t % ACROSS
            total[0] = float32(0)
            if e < n:
                for p in range(t // ACROSS, count, DOWN):
                    total[0] += parts[index(p * n + e)]
            collected[t] = total[0]
            cuda.syncthreads()
            if t < ACROSS and e < n:
                for other in range(1, DOWN):
                    total[0] += collected[index(other * ACROSS + t)]
                if biased:
                    total[0] += extra[index(e % width)]
                finish(out, extra, e, total, 0, lr, momentum)
            cuda.syncthreads()

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
        ("tensor", layout, then): make_product(TENSOR, layout, then, f"product_tensor_{layout}_{then}", tensor=True)
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
    count = max(1, min(shape.resident * multiprocessors() // max(1, tiles_m * tiles_n), K // (4 * shape.slice_k)))
    terms = max(1, -(-K // count))  # of no terms at all, one part is zeros
    terms += -terms % shape.slice_k
    count = max(1, -(-K // terms))
    return PRODUCTS[size, layout, then if count == 1 else STORE], (tiles_n, tiles_m, count), terms


def product_parts(a: Operand, b: Operand, M: int, N: int, K: int, layout: str) -> tuple[Array, int]:
    """The product in parts that are still to be added up: (parts (count, M*N), count)."""
    run, blocks, terms = _plan(M, N, K, layout, STORE)
    parts = empty((blocks[2], M * N))
    _launch(run, blocks, a, b, parts, parts, (M, N, K, terms), layout, 0.0, 0.0)
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
        _launch(run, blocks, a, b, out, extra, (M, N, K, terms), layout, lr, momentum)
    else:
        parts, count = product_parts(a, b, M, N, K, layout)
        add_parts(parts, count, out, then, extra, N, lr, momentum)
    return out


def add_parts(
    parts: Array, count: int, out: Array, then: str = STORE, extra: Array | None = None,
    width: int = 1, lr: float = 0.0, momentum: float = 0.0,
) -> None:  # fmt: skip
    """out = the sum of its `count` parts, and what follows."""
    beside = out if extra is None else extra
    blocks = min(-(-out.size // ACROSS), 8 * multiprocessors())
    SUMS[then](blocks, parts, count, out.size, out, beside, width, lr, momentum)


def _launch(
    run: Kernel, blocks: tuple[int, int, int], a: Operand, b: Operand, out: Array, extra: Array,
    sizes: tuple[int, int, int, int], layout: str, lr: float, momentum: float,
) -> None:  # fmt: skip
    M, N, K, _ = sizes
    in_fours = A_IN_FOURS * _in_fours(a, M if layout == TURNED_A else K)
    in_fours |= B_IN_FOURS * _in_fours(b, K if layout == TURNED_B else N)
    in_fours |= OUT_IN_FOURS * (N % 4 == 0 and out.first % 4 == 0 and extra.first % 4 == 0)
    run(
        blocks, a.array, a.first, a.stride, b.array, b.first, b.stride, out, extra, *sizes, in_fours, lr, momentum,
    )  # fmt: skip


def _in_fours(x: Operand, line: int) -> bool:
    """Whether lines of so many numbers can be read four at a time: each begins on 16 bytes, as every memory does."""
    return (x.array.first + x.first) % 4 == 0 and x.stride % 4 == 0 and line % 4 == 0
