"""What every module of this rung needs: the compiler's settings, its cache, and the check of operands."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numba as nb
import numpy as np
from numba.core import config as numba_config
from numba.core.registry import cpu_target
from numpy.typing import NDArray

from kernels import Unavailable
from kernels.cache import cache_folder

Array: TypeAlias = NDArray[np.float32]

# Threads that wait for work must sleep: spinning, they take the core from whoever has some. But not at once: waking up
# costs more than the moment between two operations lasts. Read by GNU OpenMP when Numba starts its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

thread_id: Any = nb.np.ufunc.parallel.get_thread_id
"""The number of the thread at work, inside compiled code."""

LINE = 64  # bytes of a cache line

PARTS = 16
"""Weight gradients are summed in this many parts, whatever the number of threads, so that the result does not depend
on it."""

# What LLVM may assume: sums may be reordered and fused; not that numbers are finite (isnan must keep working).
FASTMATH = {"reassoc", "contract", "arcp", "nsz"}


def _compiler() -> str:
    """What makes code of the kernels' sources.

    Processes that compile for different processors, or by different versions, would write over each other's files in
    one folder.
    """
    settings: Any = numba_config
    processor = cpu_target.target_context.codegen().magic_tuple()
    return str((nb.__version__, processor, settings.OPT, settings.BOUNDSCHECK))


_HERE = Path(__file__).parent
# Numba looks at the date of the file that holds a function, not at what it calls: the folder knows all of them, and the
# reference, whose constants they share.
CACHE_FOLDER = cache_folder([_HERE.parent / "reference.py", *sorted(_HERE.glob("*.py"))], _compiler())


def cache_is_cold() -> bool:
    """True until the first kernel has been compiled and kept: the next call will take a while."""
    return not any(CACHE_FOLDER.rglob("*.nbi"))


_one_at_a_time = threading.RLock()
_forked_from_threads = False


def _guarded(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, called where Numba would abort the process otherwise, in one of two ways.

    Its threading layer "workqueue" does when two threads of a program call parallel kernels at once: they take turns
    here. And GNU OpenMP does in a process that was forked from one whose threads had begun to compute: that is refused.
    """

    @wraps(kernel)
    def call(*arguments: Any) -> Any:
        if _forked_from_threads:
            raise Unavailable(
                "this process was forked from one that had computed already, which GNU OpenMP does not survive: "
                "start it by spawn (multiprocessing.get_context), or fork before anything is computed"
            )
        with _one_at_a_time:
            return kernel(*arguments)

    return call


def _after_fork() -> None:
    """In the child of a fork."""
    global _one_at_a_time, _forked_from_threads
    _one_at_a_time = threading.RLock()  # another thread may have held it
    numba: Any = nb
    if numba.np.ufunc.parallel._is_initialized and numba.threading_layer() == "omp":
        omppool = import_module("numba.np.ufunc.omppool")
        _forked_from_threads = getattr(omppool, "openmp_vendor", "GNU") == "GNU"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _if_there_is_room(save: Callable[..., None]) -> Callable[..., None]:
    """Keep compiled code, or, on a disk that is full, leave it to the next process to compile it again."""

    def save_or_not(*arguments: Any) -> None:
        with suppress(OSError):
            save(*arguments)

    return save_or_not


def compiled(function: Any = None, *, parallel: bool = False) -> Any:
    """`numba.njit` as this rung uses it: lazy, cached in CACHE_FOLDER, division unchecked so that loops vectorise.

    A parallel kernel is called from Python alone, and guarded there: see `_guarded`.
    """

    def decorate(f: Callable[..., Any]) -> Any:
        settings: Any = numba_config  # where Numba looks when it decorates; put back for everybody else's functions
        before, settings.CACHE_DIR = settings.CACHE_DIR, str(CACHE_FOLDER)
        try:
            made: Any = nb.njit(f, cache=True, parallel=parallel, error_model="numpy", fastmath=FASTMATH)
            made._cache.save_overload = _if_there_is_room(made._cache.save_overload)
            return _guarded(made) if parallel else made
        finally:
            settings.CACHE_DIR = before

    return decorate(function) if function is not None else decorate


def as_float32(**operands: NDArray[Any]) -> tuple[Array, ...]:
    """The operands, contiguous. Raises TypeError, naming the operand, where one is not float32."""
    for name, value in operands.items():
        if value.dtype != np.float32:
            raise TypeError(
                f"kernels.cpu computes in float32, but {name} is {value.dtype}: convert it, or use kernels.reference"
            )
    return tuple(np.ascontiguousarray(value) for value in operands.values())


def as_places(argmax: NDArray[Any]) -> NDArray[np.uint8]:
    """An argmax, contiguous. Raises TypeError where it is not uint8."""
    if argmax.dtype != np.uint8:
        raise TypeError(f"argmax holds places as uint8, not {argmax.dtype}")
    return np.ascontiguousarray(argmax)


def scratch(*shape: int) -> Array:
    """An uninitialised array that begins on a cache line, so that no vector of it lies on two."""
    size = 4 * int(np.prod(shape))
    memory = np.empty(size + LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + size].view(np.float32).reshape(shape)


def check_in_place(**operands: NDArray[Any]) -> None:
    """Raises TypeError, naming the operand, unless it can be changed in place: C-contiguous float32."""
    as_float32(**operands)
    for name, value in operands.items():
        if not value.flags.c_contiguous:
            raise TypeError(f"{name} is changed in place, and must be C-contiguous for that")


def check_shapes(**operands: tuple[NDArray[Any], tuple[int, ...]]) -> None:
    """Raises ValueError for an operand (value, shape wanted) of another shape: compiled kernels do not check bounds."""
    for name, (value, shape) in operands.items():
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}, but the other operands ask for {shape}")


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least n."""
    return -(-n // multiple) * multiple
