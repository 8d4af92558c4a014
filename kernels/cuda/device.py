"""The GPU: kernels, memory, stream. The only module that imports numba.cuda; the others take `cuda` from here.

A kernel is a Python function with the types of its arguments and its number of threads:

    @kernel((F, F, I), threads=256)
    def double(x, y, n):
        for e in range(cuda.grid(1), n, cuda.gridsize(1)):
            y[e] = 2 * x[e]

    double(blocks, x, y, x.size)

It is compiled when it is first launched, and kept for the next process (launching.py); KERNELS lists all of them, so
that the tests can compile every one for GPUs that are not there. Kernels see arrays without shape, are given sizes and
compute their own places: fewer arguments to pack for each launch, and fewer registers. All launches and copies go into
one stream, one after the other; nothing waits but `asnumpy` and `float`, and what copies from the host (`asarray`, and
`assign` of arrays.py).
"""

import contextlib
import hashlib
import importlib.util
import math
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import numba as nb
import numpy as np
from llvmlite import ir
from numba.core import config as numba_config
from numpy.typing import NDArray

from kernels import Unavailable
from kernels.cuda import launching

_config: Any = numba_config
SIMULATED = bool(_config.ENABLE_CUDASIM)
"""True under NUMBA_ENABLE_CUDASIM=1: every thread of a kernel is a Python thread, so tiles have to be tiny."""

_found = importlib.util.find_spec("numba_cuda")
if _found is None or _found.origin is None:
    raise Unavailable("the GPU needs the package numba-cuda: pip install 'npser[cuda13]' (or cuda12)")
_package = Path(_found.origin).parent
# It takes the place of Numba's own numba.cuda by a file that Python reads in its site-packages alone, not in a folder
# of `pip install --target`. What that file does, and NVIDIA's libraries in such a folder, are seen to here.
with contextlib.suppress(ImportError):
    importlib.import_module("_numba_cuda_redirector")
if not SIMULATED:
    launching.load_libraries(_package.parent)

cuda: Any = importlib.import_module("numba.cuda")
if not Path(cuda.__file__).is_relative_to(_package):
    raise Unavailable(f"numba.cuda is {cuda.__file__}, not the package numba-cuda's: import kernels.cuda before it")
warnings.filterwarnings("ignore", message="Grid size")  # Numba's advice on small grids; some steps are small

types: Any = nb.types
float32, float64, int32, int64, uint8 = nb.float32, nb.float64, nb.int32, nb.int64, nb.uint8

# The types of kernel arguments: flat arrays of float32, int32, uint8 and float64; whole numbers; sizes below 2^31,
# which make cheaper products; single reals.
F, N, P, D, I, S, R = float32[::1], int32[::1], uint8[::1], float64[::1], int64, int32, float32
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
        # The driver is content where it says nothing: then it is the compiler, a package of its own, that is missing.
        reason = _reason(cuda.cuda_error() or "NVVM is missing, which npser[cuda13] or [cuda12] brings")
        raise Unavailable(f"no CUDA GPU can be used here ({reason}): use the cpu")
    try:
        suffices = _capability() >= (8, 0)
    except Exception as error:  # numba's class of driver errors is not the same in all its versions
        # There is a GPU, but no context to be had on it: other programs have all its memory, or it for themselves.
        raise Unavailable(f"the GPU refuses to work for this program ({_reason(error)}): use the cpu") from error
    if not suffices:
        raise Unavailable("the GPU's compute capability is below 8.0: use the cpu")


def _reason(error: object) -> str:
    """The first sentence of what Numba or the driver says."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".:")


@lru_cache
def _capability() -> tuple[int, int]:
    """The GPU's compute capability. The first call makes the context, and needs memory for it."""
    major, minor = cuda.get_current_device().compute_capability
    return int(major), int(minor)


@lru_cache
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
_first_use = threading.RLock()  # several threads may be the first to need the stream, or a kernel


def stream() -> Any:
    """The one stream that everything goes into."""
    global _stream
    with _first_use:
        if _stream is None:
            _stream = cuda.stream()
    return _stream


def synchronise() -> None:
    """Wait until everything that was launched is done."""
    stream().synchronize()


# --- arrays ------------------------------------------------------------------------------------------------------


class Memory:
    """A piece of the device's memory: Numba's one-dimensional array, and its address.

    slots: how the whole of it is handed to a kernel, see `launching`.
    """

    __slots__ = ("address", "dtype", "numbers", "slots")

    def __init__(self, numbers: Flat, dtype: np.dtype[Any]) -> None:
        self.numbers, self.dtype = numbers, dtype
        self.address = 0 if SIMULATED else int(numbers.device_ctypes_pointer.value)
        self.slots = launching.slots(self.address, numbers.size, dtype.itemsize)


class Array:
    """Numbers on the device, contiguous in row order, of this shape, from the number `first` of a memory on.

    The memory of an array that nobody holds any more goes to the next one of the same size: what is launched later
    runs later, so nothing has to wait, and a training step allocates nothing once the first is over.
    """

    __slots__ = ("base", "first", "memory", "shape", "size")

    def __init__(self, memory: Memory, shape: tuple[int, ...], first: int = 0, base: "Array | None" = None) -> None:
        self.memory, self.shape, self.size, self.first = memory, shape, math.prod(shape), first
        self.base = base  # the array whose memory this one shares

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.memory.dtype

    @property
    def flat(self) -> Flat:
        """The numbers as Numba sees them, for copies."""
        numbers = self.memory.numbers
        return numbers if self.size == numbers.size else numbers[self.first : self.first + self.size]

    @property
    def slots(self) -> tuple[int, ...]:
        """How it is handed to a kernel."""
        if self.base is None:
            return self.memory.slots
        width = self.memory.dtype.itemsize
        return launching.slots(self.memory.address + self.first * width, self.size, width)

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, *shape: Any) -> "Array":
        """The same numbers in another shape; one size may be -1."""
        wanted: list[int] = list(shape[0]) if isinstance(shape[0], tuple) else list(shape)
        if -1 in wanted:
            wanted[wanted.index(-1)] = self.size // -math.prod(wanted)
        if math.prod(wanted) != self.size:
            raise ValueError(f"{self.size} numbers of shape {self.shape} cannot take the shape {tuple(wanted)}")
        return Array(self.memory, tuple(wanted), self.first, self._holder)

    def __getitem__(self, rows: slice) -> "Array":
        """A range of rows, in the same memory."""
        first, end, step = rows.indices(len(self))
        if step != 1:
            raise IndexError("only ranges of whole rows can be taken from an array on the device")
        width = math.prod(self.shape[1:])
        taken = (max(first, end) - first, *self.shape[1:])
        return Array(self.memory, taken, self.first + first * width, self._holder)

    @property
    def _holder(self) -> "Array":
        """The array whose memory this is."""
        return self if self.base is None else self.base

    def __float__(self) -> float:
        """The only number; waits for it."""
        return float(asnumpy(self).reshape(()))

    def __del__(self) -> None:
        if self.base is None and _pool is not None:  # the pool is gone when the program ends
            _pool.setdefault((self.dtype.char, self.size), []).append(self.memory)


_pool: dict[tuple[str, int], list[Memory]] = {}
_FLOAT32 = np.dtype(np.float32)


def empty(shape: Sequence[int], dtype: Any = _FLOAT32) -> Array:
    """An array of this shape that holds anything. Raises `kernels.Unavailable` when the memory does not suffice."""
    size, dtype = math.prod(shape), np.dtype(dtype)
    try:
        memory = _pool[dtype.char, size].pop()
    except (KeyError, IndexError):
        memory = _allocate(max(size, 1), dtype)
    return Array(memory, tuple(shape))


def _allocate(size: int, dtype: np.dtype[Any]) -> Memory:
    for attempt in range(2):
        try:
            return Memory(cuda.device_array(size, dtype, stream=stream()), dtype)
        except Exception as error:  # numba's class of driver errors is not the same in all its versions
            if not re.search("out.of.memory", f"{type(error).__name__} {error}", re.IGNORECASE):
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


_KINDS = {I: "q", S: "i", R: "f"}  # of arguments, as `launching.Arguments` has them; all others are arrays
OBSTACLE = "NUMBA_ENABLE_CUDASIM" if SIMULATED else launching.obstacle()
DIRECT = not OBSTACLE
"""Whether kernels are launched by the driver itself, and compiled ones kept. OBSTACLE: why not."""
DEFAULT_SHARED = 48 * 1024  # bytes of shared memory that a block may have without asking


class Kernel:
    """A function to run on the device: `kernel(blocks, *arguments)` launches it; `blocks` is a number or (x, y, z)."""

    def __init__(
        self, function: Callable[..., None], name: str, signature: tuple[Any, ...], threads: int, resident: int
    ) -> None:
        self.function, self.name, self.signature, self.threads = function, name, signature, threads
        # The compiler may use so many registers that `resident` blocks still fit on a multiprocessor.
        self.options: dict[str, Any] = {} if SIMULATED else {"launch_bounds": (threads, resident)}
        self.kinds = [_KINDS.get(kind, "P") for kind in signature]
        self._compiled: Any = None
        self._loaded: launching.Loaded | None = None
        self._granted = DEFAULT_SHARED

    def ptx(self, capability: tuple[int, int]) -> str:
        """The kernel for GPUs of this compute capability; they need not be here."""
        text: str = cuda.compile_ptx(self.function, self.signature, cc=capability, **self.options)[0]
        return text

    @property
    def loaded(self) -> launching.Loaded:
        """The kernel on the device, for the driver to launch."""
        if self._loaded is None:
            with _first_use:
                if self._loaded is None:
                    capability = _capability()
                    source = Path(self.function.__code__.co_filename).read_bytes()  # maybe not one of this package
                    name = f"{self.name}-{hashlib.sha256(source).hexdigest()[:8]}"
                    kept = launching.kept(name, capability, _versions(), lambda: self.ptx(capability))
                    self._loaded = launching.Loaded(*kept, self.kinds, self.name, cuda.current_context)
        return self._loaded

    @property
    def compiled(self) -> Any:
        """The kernel for Numba to launch."""
        if self._compiled is None:
            with _first_use:
                if self._compiled is None:
                    self._compiled = cuda.jit(self.signature, **self.options)(self.function)
        return self._compiled

    def __call__(self, blocks: int | tuple[int, int, int], *arguments: Any, shared: int = 0, threads: int = 0) -> None:
        """shared: bytes of dynamic shared memory, no more than were granted; threads: fewer than the usual number.

        Nothing is launched where there are no blocks, as for an empty batch.
        """
        if 0 in (blocks if isinstance(blocks, tuple) else (blocks,)):
            return
        if DIRECT:
            values: list[Any] = []
            for kind, argument in zip(self.kinds, arguments, strict=True):
                if kind == "P":
                    values += argument.slots
                else:
                    values.append(argument)
            if isinstance(blocks, int):
                blocks = (blocks, 1, 1)
            self.loaded.launch(blocks, threads or self.threads, shared, _stream_handle(), values)
        else:
            plain = [argument.flat if isinstance(argument, Array) else argument for argument in arguments]
            self.compiled[blocks, threads or self.threads, stream(), shared](*plain)

    def grant_shared(self, wanted: int) -> int:
        """Ask for so many bytes of dynamic shared memory per block -> how many a launch may use, `wanted` at the most.

        A block has DEFAULT_SHARED without asking; the driver has to be told of more, for which Numba has no function.
        """
        if wanted > self._granted and DIRECT:
            wanted = min(wanted, _most_shared())
            with _first_use:
                if wanted > self._granted and self.loaded.allow_shared(wanted):
                    self._granted = wanted
        return min(wanted, self._granted)


def keeps_kernels() -> bool:
    """Whether compiled kernels are there again at the next start."""
    return DIRECT


def cache_is_cold() -> bool:
    """True until the first kernel for this GPU has been compiled and kept; always, where they cannot be kept."""
    return not DIRECT or not launching.any_kept(_capability(), _versions())


@lru_cache
def _most_shared() -> int:
    return int(cuda.get_current_device().MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)


@lru_cache
def _stream_handle() -> int:
    return int(stream())


@lru_cache
def _versions() -> str:
    """Of whatever turns a kernel into machine code."""
    found = {}
    ours = ("numba", "numba-cuda", "llvmlite", "cuda-bindings")
    cuda_13, cuda_12 = ("nvidia-nvvm", "nvidia-nvjitlink"), ("nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12")
    for name in (*ours, *cuda_13, *cuda_12):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return str(found)


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


# --- what Numba lacks --------------------------------------------------------------------------------------------


def extension(name: str) -> Any:
    """`numba.cuda.extending.<name>`."""
    return getattr(importlib.import_module("numba.cuda.extending"), name)


def helper(function: Callable[..., Any]) -> Any:
    """Decorator: a function that kernels call; it becomes a part of them."""
    return function if SIMULATED else cuda.jit(device=True, inline="always")(function)


if SIMULATED:

    def _itself(e: int) -> int:
        return e

    index: Any = _itself

    def load4(array: Flat, at: int) -> Any:
        return array[at], array[at + 1], array[at + 2], array[at + 3]

    def store2(array: Flat, at: int, a: Any, b: Any) -> None:
        array[at], array[at + 1] = a, b

    def store4(array: Flat, at: int, a: Any, b: Any, c: Any, d: Any) -> None:
        array[at], array[at + 1], array[at + 2], array[at + 3] = a, b, c, d

    def load2(array: Flat, at: int) -> Any:
        return array[at], array[at + 1]

else:
    # A place in an array, x[index(e)]. Without it Numba asks of every signed index whether it counts from the end, in
    # 64 bits: most of a kernel's instructions would be that.
    index = nb.uint64

    def _vector(context: Any, builder: Any, array: Any, value: Any, at: Any, count: int) -> tuple[Any, int]:
        """(pointer to `count` numbers of an array from `at` on, their bytes)."""
        data = context.make_array(array)(context, builder, value).data
        vector = ir.VectorType(context.get_data_type(array.dtype), count).as_pointer()
        return builder.bitcast(builder.gep(data, [at]), vector), count * array.dtype.bitwidth // 8

    def _make_load(count: int) -> Any:
        """`count` numbers from `at` on, a multiple of `count`, in one instruction; the array begins on 16 bytes."""

        def load(typing_context: Any, array: Any, at: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                pointer, size = _vector(context, builder, signature.args[0], arguments[0], arguments[1], count)
                loaded = builder.load(pointer, align=size)
                lanes = [builder.extract_element(loaded, ir.Constant(ir.IntType(32), lane)) for lane in range(count)]
                return context.make_tuple(builder, signature.return_type, lanes)

            return types.UniTuple(array.dtype, count)(array, at), generate

        return load

    def _stored(array: Any, at: Any, numbers: tuple[Any, ...]) -> Any:
        """The store of as many numbers from `at` on, a multiple of their count, in one instruction."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer, size = _vector(context, builder, signature.args[0], arguments[0], arguments[1], len(numbers))
            value = ir.Constant(pointer.type.pointee, ir.Undefined)
            for lane, number in enumerate(arguments[2:]):
                value = builder.insert_element(value, number, ir.Constant(ir.IntType(32), lane))
            builder.store(value, pointer, align=size)
            return context.get_dummy_value()

        return types.none(array, at, *(array.dtype for _ in numbers)), generate

    @extension("intrinsic")
    def store2(typing_context: Any, array: Any, at: Any, a: Any, b: Any) -> Any:
        return _stored(array, at, (a, b))

    @extension("intrinsic")
    def store4(typing_context: Any, array: Any, at: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return _stored(array, at, (a, b, c, d))

    load2, load4 = (extension("intrinsic")(_make_load(count)) for count in (2, 4))
