"""Guard pages: nothing outside the operands is touched.

Run as a program ("python tests/test_kernels_guarded.py start"), this file is the guarded run of `test_guard_pages`.
"""

import ctypes
import mmap
import os
import pkgutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from operands import Numbers, call, calls, calls_from_lists

import kernels
from kernels import cpu
from kernels.cpu import lstm, sparse, tools
from kernels.cpu import matmul as matmul_module


class Guarded:
    """Stands for `numpy` in a module of kernels: every array it makes lies flush against an unreadable page.

    Vector kernels compute with addresses, and nothing checks them. So operands, scratch and results are put where one
    byte too far is a segmentation fault: at the end of their pages ("end") or at the beginning ("start").
    """

    def __init__(self, side):
        self.side = side
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.kept = []  # the pages stay: an array may outlive its last Python name

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, shape, dtype=np.float64):
        dtype, shape = np.dtype(dtype), tuple(np.atleast_1d(shape))
        size, page = int(np.prod(shape)) * dtype.itemsize, mmap.PAGESIZE
        inner = -(-max(size, 1) // page) * page
        memory = mmap.mmap(-1, inner + 2 * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for at in (address, address + page + inner):
            assert self.libc.mprotect(ctypes.c_void_p(at), page, 0) == 0
        first = page if self.side == "start" else page + inner - size
        self.kept.append(memory)
        array = np.frombuffer(memory, dtype, size // dtype.itemsize, first).reshape(shape)
        array.view(np.uint8)[...] = 0xFF  # not-a-number: what is read before it was written shows
        return array

    def scratch(self, *shape):
        return self.empty(shape, np.float32)

    def zeros(self, shape, dtype=np.float64):
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def copy(self, x):
        array = self.empty(x.shape, x.dtype)
        array[...] = x
        return array

    def empty_like(self, x):
        return self.empty(x.shape, x.dtype)

    def array(self, *args):
        return self.copy(np.array(*args))

    def pad(self, *args):
        return self.copy(np.pad(*args))

    def ascontiguousarray(self, x):
        return x if x.flags.c_contiguous else self.copy(np.ascontiguousarray(x))


GUARD_SIZES = [{}, {"C": 3, "O": 32, "B": 3}, {"C": 32, "O": 32, "B": 2}, {"C": 1, "O": 7, "B": 17, "H": lstm.WIDE}]
FEW_ROWS = [*((M, 1024, 272) for M in (1, 2, 3)), (8, 64, 4 * matmul_module.FEW_CHUNK + 16)]  # (M, K) times (K, N)
UNGUARDED = {"simd", "stft"}  # the language itself; no vector kernels
# Every module of the rung, the ones to come too; what is guarded in them are the operations that `calls` names.
GUARDED_MODULES = [
    module
    for found in pkgutil.iter_modules(cpu.__path__)
    if found.name not in UNGUARDED
    and {"np", "scratch"} & set(vars(module := import_module(f"kernels.cpu.{found.name}")))
]


def guarded_run(side):
    """Every operation with guarded operands, scratch and results; says how many agreed with an unguarded call."""
    guard, scratch = Guarded(side), tools.scratch
    agreed = 0
    todo = [(cpu, name, *rest) for sizes in GUARD_SIZES for name, rest in calls(**sizes).items()]
    todo += [(sparse, name, *rest) for name, rest in calls_from_lists().items()]
    for M, K, N in FEW_ROWS:
        todo.append((matmul_module, "matmul", {"a": Numbers(1)(M, K), "b": Numbers(2)(K, N)}, {}))
    M, K, N = 9, 40, 37
    operands = {"a": Numbers(1)(M, K), "b": Numbers(2)(K, N), "bias": Numbers(3)(M, N)}
    todo.append((matmul_module, "matmul", operands, {}))  # that goes on from a matrix
    for rung, name, operands, others in todo:
        if name.startswith("stft"):
            continue  # no vector kernels
        expected = [r.copy() for r in call(name, {o: v.copy() for o, v in operands.items()}, others, rung)]  # compiles
        for module in GUARDED_MODULES:
            module.np = guard
            if hasattr(module, "scratch"):
                module.scratch = guard.scratch
        try:
            argmax = {o: guard.copy(v) for o, v in others.items() if o == "argmax"}
            got = call(name, {o: guard.copy(v) for o, v in operands.items()}, {**others, **argmax}, rung)
        finally:
            for module in GUARDED_MODULES:
                module.np = np
                if hasattr(module, "scratch"):
                    module.scratch = scratch
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
        agreed += 1
    print(f"{agreed} calls agreed")


def step_over_the_edge(side):
    """What a kernel does that reads one number too far."""
    array = Guarded(side).zeros(10, np.float32)
    ctypes.c_float.from_address(array.ctypes.data + (4 * array.size if side == "end" else -4)).value  # noqa: B018


def run_this_file(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(kernels.__file__).parents[1])}
    command = [sys.executable, "-X", "faulthandler", __file__, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's mprotect")


@linux_only
@pytest.mark.parametrize("side", ["start", "end"])
def test_guard_pages_guard(side):
    done = run_this_file(side, "step over")
    assert done.returncode == -signal.SIGSEGV, done.stderr


@linux_only
@pytest.mark.parametrize("side", ["start", "end"])
def test_guard_pages(side):
    done = run_this_file(side)
    assert done.returncode == 0, done.stderr
    products = len(calls_from_lists()) + len(FEW_ROWS) + 1
    assert done.stdout == f"{len(GUARD_SIZES) * (len(calls()) - 2) + products} calls agreed\n"  # without stft's two


if __name__ == "__main__":
    if "step over" in sys.argv:
        step_over_the_edge(sys.argv[1])
    else:
        guarded_run(sys.argv[1])
