"""What the machine can do: multiply-adds in a second, and bytes from and to memory."""

import time
from collections.abc import Callable
from typing import Any

import numba as nb
import numpy as np

from kernels.cpu.simd import LANES, REGISTERS, Emitter, Int, Ptr, kernel
from kernels.cpu.tools import Array, scratch

CHAINS = 24 if REGISTERS == 32 else 12  # sums under way at once: more than a multiply-add has cycles of latency
FLOATS = 1 << 26  # 256 MB, larger than any cache
STEPS = 1 << 22  # rounds of CHAINS multiply-adds in a measurement
REPEATS = 7

Peaks = dict[str, float]


@kernel
def multiply_add(k: Emitter, p: Ptr, n: Int) -> None:
    """CHAINS sums a <- a x + y, n times; p holds x and y, and takes the sums, so that none can be left out.

    The sums begin differently, or the compiler would see that they are one.
    """
    x, y = k.load(p), k.load(p + LANES)
    sums = [k.var(0.1 * (i + 1)) for i in range(CHAINS)]
    for _ in k.range(n):
        for a in sums:
            a.set(a.get() * x + y)
    for i, a in enumerate(sums):
        k.store(p + LANES * i, a)


@kernel
def add_up(k: Emitter, p: Ptr, n: Int, result: Ptr) -> None:
    """The sum of n times 8 vectors from p on."""
    sums = [k.var(0.0) for _ in range(8)]
    for i in k.range(n):
        for j, a in enumerate(sums):
            a += k.load(p + i * (8 * LANES) + LANES * j)
    total = sums[0].get()
    for a in sums[1:]:
        total = total + a.get()
    k.store(result, total)


@kernel
def scale(k: Emitter, p: Ptr, n: Int) -> None:
    """n times 8 vectors from p on, each read and written."""
    for i in k.range(n):
        for j in range(8):
            at = p + i * (8 * LANES) + LANES * j
            k.store(at, k.load(at) * 0.999)


@nb.njit(parallel=True)
def _multiply_add(rows: Array, n: int) -> None:
    for i in nb.prange(rows.shape[0]):
        multiply_add(rows.ctypes.data + 4 * i * rows.shape[1], n)


@nb.njit(parallel=True)
def _add_up(rows: Array, results: Array) -> None:
    for i in nb.prange(rows.shape[0]):
        add_up(
            rows.ctypes.data + 4 * i * rows.shape[1],
            rows.shape[1] // (8 * LANES),
            results.ctypes.data + 4 * i * results.shape[1],
        )


@nb.njit(parallel=True)
def _scale(rows: Array) -> None:
    for i in nb.prange(rows.shape[0]):
        scale(rows.ctypes.data + 4 * i * rows.shape[1], rows.shape[1] // (8 * LANES))


def measure(steps: int = STEPS, floats: int = FLOATS) -> Peaks:
    """The best of REPEATS with all threads: operations a second, bytes a second read, and read and written."""
    threads = nb.get_num_threads()
    small = scratch(threads, 2 * CHAINS * LANES)  # rows far apart: no cache line is shared
    small[:] = 0.5
    rows = scratch(threads, floats // threads // (8 * LANES) * (8 * LANES))
    rows[:] = 1.0
    results = scratch(threads, 1024)

    def renew() -> None:
        small[:] = 0.5
        _multiply_add(small, steps)

    def read() -> None:
        _add_up(rows, results)
        lanes = results[:, :LANES]
        if not np.isclose(lanes.sum(), rows.size, rtol=1e-3):
            raise AssertionError("the vectors were not all read")

    rate = {
        "flops": threads * CHAINS * LANES * 2 * steps / _best(renew),
        "read": 4 * rows.size / _best(read),
        "update": 8 * rows.size / _best(lambda: _scale(rows)),
    }
    expected = 0.5 / (1 - 0.5)  # where a <- a/2 + 1/2 ends
    if not np.allclose(small[:, : CHAINS * LANES], expected, atol=1e-3):
        raise AssertionError("the multiply-adds did not compute what they should")
    return rate


def _best(call: Callable[[], Any]) -> float:
    """Seconds of the fastest repetition, after one that compiles and warms up."""
    call()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
