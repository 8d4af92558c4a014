"""The GPU: kernels, memory, stream. The only module that imports numba.cuda; the others take `cuda` from here.

A kernel is a Python function with the types of its arguments and its number of threads:

    @kernel((F, F, I), threads=256)
    def double(x, y, n):
        for e in range(cuda.grid(1), n, cuda.gridsize(1)):
            y[e] = 2 * x[e]

    double(blocks, x.flat, y.flat, x.size)

It is compiled when it is first launched, and KERNELS lists all of them, so that the tests can compile every one for
GPUs that are not there. Kernels are given flat arrays and sizes and compute their own places: fewer arguments to pack
for each launch, and fewer registers. All launches and copies go into one stream, one after the other; nothing waits
but `asnumpy` and `float`.
"""

import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numba as nb
import numpy as np
from numba.core import config as numba_config
from numpy.typing import NDArray

from kernels import Unavailable

if importlib.util.find_spec("numba_cuda") is None:
    raise Unavailable("the GPU needs the package numba-cuda: pip install 'npser[cuda13]' (or cuda12)")

from llvmlite import ir
from numba import cuda as numba_cuda

cuda: Any = numba_cuda
warnings.filterwarnings("ignore", message="Grid size")  # Numba's advice on small grids; some steps are small

_config: Any = numba_config
SIMULATED = bool(_config.ENABLE_CUDASIM)
"""True under NUMBA_ENABLE_CUDASIM=1: every thread of a kernel is a Python thread, so tiles have to be tiny."""

types: Any = nb.types
float32, float64, int32, int64, uint8 = nb.float32, nb.float64, nb.int32, nb.int64, nb.uint8

# The types of kernel arguments: flat arrays of float32, int32, uint8 and float64; whole numbers; single reals.
F, N, P, D, I, R = float32[::1], int32[::1], uint8[::1], float64[::1], int64, float32
THREADS = 2 if SIMULATED else 256  # of kernels without a tile
ALIGN: int | None = None if SIMULATED else 16  # bytes, of shared memory that is read four numbers at once

Flat: TypeAlias = Any  # a one-dimensional array on the device, as kernels see it


# --- is there a GPU? ---------------------------------------------------------------------------------------------

_simulator_allowed = False


def allow_simulator() -> None:
    """For tests: compute on the simulator, if it is switched on, instead of refusing to."""
    global _simulator_allowed
    _simulator_allowed = True


def require() -> None:
    """Raises `kernels.Unavailable`, one line, unless there is a GPU that can compute."""
    if SIMULATED:
        if not _simulator_allowed:
            raise Unavailable("NUMBA_ENABLE_CUDASIM is set, and the simulator is for tests: unset it, or use the cpu")
        return
    if not cuda.is_available():
        reason = " ".join(str(cuda.cuda_error() or "no device").split()).split(". ")[0].rstrip(".:")
        raise Unavailable(f"no CUDA GPU can be used here ({reason}): use the cpu")
    if cuda.get_current_device().compute_capability < (8, 0):
        raise Unavailable("the GPU's compute capability is below 8.0: use the cpu")


def multiprocessors() -> int:
    """How many blocks run side by side, at the least."""
    return 2 if SIMULATED else int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


def device_name() -> str:
    """The GPU's name."""
    if SIMULATED:
        return "simulator"
    name = cuda.get_current_device().name
    return name.decode() if isinstance(name, bytes) else str(name)


PRECISIONS = ("float32", "tf32")


class Settings:
    """What a program may choose. precision: of large matrix products; "tf32" puts them on the tensor cores."""

    precision = "float32"


settings = Settings()

_stream: Any = None


def stream() -> Any:
    """The one stream that everything goes into."""
    global _stream
    if _stream is None:
        _stream = cuda.stream()
    return _stream


def synchronise() -> None:
    """Wait until everything that was launched is done."""
    stream().synchronize()


# --- arrays ------------------------------------------------------------------------------------------------------


class Array:
    """Numbers on the device, contiguous in row order: their shape, and `flat`, which kernels are given.

    The memory of an array that nobody holds any more goes to the next one of the same size: what is launched later
    runs later, so nothing has to wait, and a training step allocates nothing once the first is over.
    """

    def __init__(self, flat: Flat, shape: tuple[int, ...], base: "Array | None" = None) -> None:
        self.flat, self.shape, self.base = flat, shape, base  # base: the array whose memory this one shares

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.flat.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, *shape: Any) -> "Array":
        """The same numbers in another shape; one size may be -1."""
        wanted: list[int] = list(shape[0]) if isinstance(shape[0], tuple) else list(shape)
        if -1 in wanted:
            wanted[wanted.index(-1)] = self.size // -math.prod(wanted)
        if math.prod(wanted) != self.size:
            raise ValueError(f"{self.size} numbers of shape {self.shape} cannot take the shape {tuple(wanted)}")
        return Array(self.flat, tuple(wanted), self.base or self)

    def __getitem__(self, rows: slice) -> "Array":
        """A range of rows, in the same memory."""
        first, end, step = rows.indices(len(self))
        if step != 1:
            raise IndexError("only ranges of whole rows can be taken from an array on the device")
        width = math.prod(self.shape[1:])
        end = max(first, end)
        return Array(self.flat[first * width : end * width], (end - first, *self.shape[1:]), self.base or self)

    def __float__(self) -> float:
        """The only number; waits for it."""
        return float(asnumpy(self).reshape(()))

    def __del__(self) -> None:
        if self.base is None and _pool is not None:  # the pool is gone when the program ends
            _pool.setdefault((self.dtype.str, self.size), []).append(self.flat)


_pool: dict[tuple[str, int], list[Flat]] = {}


def empty(shape: Sequence[int], dtype: Any = np.float32) -> Array:
    """An array of this shape that holds anything. Raises `kernels.Unavailable` when the memory does not suffice."""
    size, dtype = math.prod(shape), np.dtype(dtype)
    waiting = _pool.get((dtype.str, size))
    return Array(waiting.pop() if waiting else _allocate(max(size, 1), dtype), tuple(shape))


def _allocate(size: int, dtype: np.dtype[Any]) -> Flat:
    for attempt in range(2):
        try:
            return cuda.device_array(size, dtype, stream=stream())
        except Exception as error:  # numba's class of driver errors is not the same in all its versions
            if "memory" not in str(error).lower():
                raise
            if attempt:
                raise Unavailable(
                    f"the GPU's memory does not suffice ({size * dtype.itemsize / 1e6:.0f} MB more were asked for): "
                    "use smaller batches, or the cpu"
                ) from error
            _pool.clear()  # memory that waits under other sizes
    raise AssertionError


def asarray(values: Array | NDArray[Any]) -> Array:
    """The values on the device, reals as float32, whole numbers as int32; arrays that are there stay what they are."""
    if isinstance(values, Array):
        return values
    kinds = {"f": np.float32, "i": np.int32, "u": np.uint8 if values.dtype == np.uint8 else np.int32}
    host = np.ascontiguousarray(values, kinds[values.dtype.kind])
    array = empty(host.shape, host.dtype)
    if host.size:
        array.flat.copy_to_device(host.reshape(-1), stream=stream())
        synchronise()  # the copy may still be reading `host`, which ends here
    return array


def asnumpy(x: Array) -> NDArray[Any]:
    """The values as a NumPy array; waits for them."""
    host = np.empty(x.size, x.dtype)
    if x.size:
        x.flat.copy_to_host(host, stream=stream())
        synchronise()
    return host.reshape(x.shape)


def check(**operands: tuple[Any, tuple[int, ...], type]) -> None:
    """Raises TypeError or ValueError, naming the operand, where one (value, shape, number type) is something else."""
    for name, (value, shape, dtype) in operands.items():
        if not isinstance(value, Array):
            raise TypeError(f"kernels.cuda computes on the device's arrays, but {name} is not one: use asarray")
        if value.dtype != dtype:
            raise TypeError(f"{name} is {value.dtype}, not {np.dtype(dtype)}")
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}, but the other operands ask for {shape}")


# --- kernels -----------------------------------------------------------------------------------------------------


class Kernel:
    """A function to run on the device: `kernel(blocks, *arguments)` launches it; `blocks` is a number or (x, y, z)."""

    def __init__(
        self, function: Callable[..., None], name: str, signature: tuple[Any, ...], threads: int, resident: int
    ) -> None:
        self.function, self.name, self.signature, self.threads = function, name, signature, threads
        # The compiler may use so many registers that `resident` blocks still fit on a multiprocessor.
        self.options: dict[str, Any] = {} if SIMULATED else {"launch_bounds": (threads, resident)}
        self._compiled: Any = None
        self._granted = DEFAULT_SHARED

    @property
    def compiled(self) -> Any:
        """Numba's kernel, compiled for the GPU that is here."""
        if self._compiled is None:
            self._compiled = cuda.jit(self.signature, **self.options)(self.function)
        return self._compiled

    def __call__(self, blocks: int | tuple[int, ...], *arguments: Any, shared: int = 0, threads: int = 0) -> None:
        """shared: bytes of dynamic shared memory, no more than were granted; threads: fewer than the usual number."""
        self.compiled[blocks, threads or self.threads, stream(), shared](*arguments)

    def grant_shared(self, wanted: int) -> int:
        """Ask for so many bytes of dynamic shared memory per block -> how many a launch may use, `wanted` at the most.

        A block has DEFAULT_SHARED without asking; the driver has to be told of more.
        """
        if wanted > self._granted and not SIMULATED:
            most = int(cuda.get_current_device().MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
            if _allow_shared(self.compiled, min(wanted, most)):
                self._granted = min(wanted, most)
        return min(wanted, self._granted)


KERNELS: dict[str, Kernel] = {}
"""Every kernel of this rung by its name."""


def kernel(signature: tuple[Any, ...], threads: int = THREADS, name: str = "", resident: int = 1) -> Any:
    """Decorator: make a `Kernel` of a function; `name` where the function's own does not tell it from others."""

    def decorate(function: Callable[..., None]) -> Kernel:
        made = Kernel(function, name or function.__name__.strip("_"), signature, threads, resident)
        if made.name in KERNELS:
            raise ValueError(f"there are two kernels called {made.name}")
        KERNELS[made.name] = made
        return made

    return decorate


def blocks_for(n: int) -> int:
    """How many blocks of THREADS walk n elements: enough to fill the device, each thread taking several if need be."""
    return max(1, min(-(-n // THREADS), 8 * multiprocessors()))


DEFAULT_SHARED = 48 * 1024  # bytes of shared memory that a block may have without asking


def _allow_shared(compiled: Any, size: int) -> bool:
    """Tell the driver that this kernel is launched with so many bytes of dynamic shared memory; False if it refuses.

    Numba has no function for it, so this reaches into it; where its parts have other names, kernels make do with less.
    """
    try:
        from cuda.bindings import driver

        (overload,) = compiled.overloads.values()
        handle = int(overload._codelibrary.get_cufunc().handle)
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        # A CUkernel in newer versions of numba-cuda, a CUfunction in older ones.
        (status,) = driver.cuKernelSetAttribute(attribute, size, driver.CUkernel(handle), cuda.get_current_device().id)
        if status != driver.CUresult.CUDA_SUCCESS:
            (status,) = driver.cuFuncSetAttribute(driver.CUfunction(handle), attribute, size)
    except (ImportError, AttributeError, TypeError, ValueError):
        return False
    return bool(status == driver.CUresult.CUDA_SUCCESS)


# --- what Numba lacks --------------------------------------------------------------------------------------------


def extension(name: str) -> Any:
    """`numba.cuda.extending.<name>`."""
    return getattr(importlib.import_module("numba.cuda.extending"), name)


def helper(function: Callable[..., Any]) -> Any:
    """Decorator: a function that kernels call; it becomes a part of them."""
    return function if SIMULATED else cuda.jit(device=True, inline="always")(function)


if SIMULATED:

    def load4(array: Flat, at: int) -> Any:
        return array[at], array[at + 1], array[at + 2], array[at + 3]

else:

    @extension("intrinsic")
    def load4(typing_context: Any, array: Any, at: Any) -> Any:
        """Four numbers from `at` on, a multiple of four, in one instruction; `array` is shared memory, aligned."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
            vector = ir.VectorType(ir.FloatType(), 4).as_pointer()
            four = builder.load(builder.bitcast(builder.gep(data, [arguments[1]]), vector), align=16)
            lanes = [builder.extract_element(four, ir.Constant(ir.IntType(32), lane)) for lane in range(4)]
            return context.make_tuple(builder, signature.return_type, lanes)

        return types.UniTuple(types.float32, 4)(array, at), generate
