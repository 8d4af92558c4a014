"""What the GPU can do: multiply-adds in a second, and bytes from and to its memory; times by its own events."""

import time
from collections.abc import Callable

import numpy as np

from kernels.cuda import device
from kernels.cuda.device import F, Flat, I, cuda, empty, float32, index, kernel

SUMS = 16  # under way at once in every thread: more than a multiply-add has cycles of latency
STEPS, UNROLLED = 4096, 8  # rounds of multiply-adds, and those without a loop around them
COPIED = 64 if device.SIMULATED else 2**28  # numbers, larger than any cache
REPEATS, CALLS = 7, 10  # times taken, and launches of each: the events themselves take a moment
AWAKE = 0.3  # seconds of work that a GPU gets before: one that has just woken up has not reached its clock rate yet


@kernel((F, I))
def _peak_multiply_add(x: Flat, steps: int) -> None:
    """SUMS sums a <- a x0 + x1 in every thread, `steps` times; they begin differently, and none can be left out."""
    sums = cuda.local.array(SUMS, float32)
    t = cuda.grid(1)
    one, two = x[0], x[1]
    for i in range(SUMS):
        sums[i] = float32(t + i)
    for _ in range(steps // UNROLLED):
        for _ in range(UNROLLED):
            for i in range(SUMS):
                sums[i] = sums[i] * one + two
    total = float32(0)
    for i in range(SUMS):
        total += sums[i]
    x[index(2 + t)] = total


def by_events(call: Callable[[], object], count: int) -> float:
    """Seconds of so many calls on the device, from the first launch to the last one's end."""
    first, last = cuda.event(timing=True), cuda.event(timing=True)
    first.record(device.stream())
    for _ in range(count):
        call()
    last.record(device.stream())
    last.synchronize()
    return float(cuda.event_elapsed_time(first, last)) / 1e3


def measure(steps: int = STEPS) -> dict[str, float]:
    """The best of REPEATS: operations a second; bytes a second, read and written by a copy."""
    blocks = 8 * device.multiprocessors()
    threads = blocks * device.THREADS
    x = device.asarray(np.full(threads + 2, 0.5, np.float32))
    one, two = empty((COPIED,)), empty((COPIED,))
    copied = _best(lambda: two.flat.copy_to_device(one.flat, stream=device.stream()))
    computed = _best(lambda: _peak_multiply_add(blocks, x, steps))
    if not np.allclose(device.asnumpy(x)[2:], SUMS, rtol=1e-3):  # a <- a/2 + 1/2 ends at 1
        raise AssertionError("the multiply-adds did not compute what they should")
    rate = 8 * COPIED / copied
    return {"flops": 2.0 * SUMS * steps * threads / computed, "read": rate, "update": rate}


def _best(call: Callable[[], object]) -> float:
    """Seconds of a call in the fastest repetition, after one that compiles and AWAKE seconds of them."""
    by_events(call, 1)
    end = time.perf_counter() + AWAKE
    while time.perf_counter() < end:
        by_events(call, CALLS)
    return min(by_events(call, CALLS) for _ in range(REPEATS)) / CALLS
