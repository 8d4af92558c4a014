"""What every module of this rung needs: the compiler's settings, its cache, and the check of operands."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numba as nb
import numpy as np
from numba.core import config as numba_config
from numpy.typing import NDArray

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


def _cache_folder() -> Path:
    """Where compiled kernels are kept: the user's cache folder (or NUMBA_CACHE_DIR), a folder per state of the sources.

    Numba looks at the date of the file that holds a function, not at what it calls; so the name hashes all sources of
    this rung, and the reference, whose constants they share: a changed helper never leaves a stale kernel behind. A
    read-only home falls back to the temporary folder.
    """
    here = Path(__file__).parent
    sources = [here.parent / "reference.py", *sorted(here.glob("*.py"))]
    state = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    roots = [
        os.environ.get("NUMBA_CACHE_DIR"),
        os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "npser"),
        os.path.join(tempfile.gettempdir(), f"npser-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"),
    ]
    for root in filter(None, roots):
        folder = Path(root) / f"kernels-{state}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise ImportError("no folder to keep compiled kernels in: set NUMBA_CACHE_DIR to a writable folder")


CACHE_FOLDER = _cache_folder()


def cache_is_cold() -> bool:
    """True until the first kernel has been compiled and kept: the next call will take a while."""
    return not any(CACHE_FOLDER.rglob("*.nbi"))


def compiled(function: Any = None, *, parallel: bool = False) -> Any:
    """`numba.njit` as this rung uses it: lazy, cached in CACHE_FOLDER, division unchecked so that loops vectorise."""

    def decorate(f: Callable[..., Any]) -> Any:
        settings: Any = numba_config  # where Numba looks when it decorates; put back for everybody else's functions
        before, settings.CACHE_DIR = settings.CACHE_DIR, str(CACHE_FOLDER)
        try:
            return nb.njit(f, cache=True, parallel=parallel, error_model="numpy", fastmath=FASTMATH)
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
