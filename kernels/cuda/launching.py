"""Kernels that are compiled once, kept in a file, and launched by the CUDA driver itself.

Numba compiles a kernel to PTX; what it does beyond that is done here, because a training step is some fifty launches
of a few microseconds each. Numba's launcher looks at every argument anew, which takes it longer than the kernel runs,
and it compiles all over again in every process.

An argument of a kernel lies in a slot of 8 bytes; an array is seven of them, of which the kernels use one, the address:

    0, 0, numbers, bytes of a number, address, numbers, bytes of a number

So Numba has it in all its versions; `tests/test_cuda.py` compares the slots with the parameters in the PTX. Where this
cannot work (no nvJitLink), or KERNELS_CUDA_LAUNCHER=numba is set, Numba launches.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import struct
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from kernels import Unavailable
from kernels.cache import cache_folder

SLOT = 8  # bytes
ARRAY_SLOTS = 7


# NVIDIA's libraries that this module and Numba need, and where their wheels for CUDA 13 and 12 have them.
WHEELS = {
    "nvJitLink": ("nvidia/cu[0-9]*/lib/libnvJitLink.so.*", "nvidia/nvjitlink/lib/libnvJitLink.so.*"),
    "nvvm": ("nvidia/cu[0-9]*/lib/libnvvm.so.*", "nvidia/cuda_nvcc/nvvm/lib64/libnvvm.so*"),
    "nvrtc": ("nvidia/cu[0-9]*/lib/libnvrtc.so.*", "nvidia/cuda_nvrtc/lib/libnvrtc.so.*"),
}


def load_libraries(folder: Path) -> None:
    """Load NVIDIA's libraries from the wheels in this folder, the one in which numba-cuda lies.

    cuda-pathfinder, which Numba asks for them, takes what is loaded already, and else looks into the interpreter's own
    site-packages: not into a folder on PYTHONPATH, or with the libraries of another CUDA that a PyTorch has there.
    """
    for patterns in WHEELS.values():
        for path in [path for pattern in patterns for path in sorted(folder.glob(pattern))][:1]:
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(path.resolve()))


def libraries() -> dict[str, str]:
    """Version and place of the libraries that turn a kernel into machine code, or what is wrong with them."""
    found = {}
    for name, module in (("nvvm", "nvvm"), ("nvJitLink", "nvjitlink")):
        try:
            version = import_module(f"cuda.bindings.{module}").version()
            path = import_module("cuda.pathfinder").load_nvidia_dynamic_lib(name).abs_path
            found[name] = "{}.{}, {}".format(*version, path)
        except Exception as error:
            found[name] = _line(error)
    return found


def obstacle() -> str:
    """Why kernels cannot be launched by the driver itself; nothing, if driver and linker can be reached."""
    if os.environ.get("KERNELS_CUDA_LAUNCHER") == "numba":
        return "KERNELS_CUDA_LAUNCHER"
    try:
        import_module("cuda.bindings.driver")
        import_module("cuda.bindings.nvjitlink").version()
    except Exception as error:  # missing, too old, or without its library: each has its own way to say so
        return _line(error)
    return ""


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def assemble(ptx: str, capability: tuple[int, int]) -> tuple[bytes, str]:
    """PTX -> machine code for GPUs of this compute capability, and what the assembler says of it."""
    nvjitlink = import_module("cuda.bindings.nvjitlink")
    options = ["-arch=sm_{}{}".format(*capability), "-verbose"]
    handle = nvjitlink.create(len(options), options)
    try:
        # NVVM writes the newest version of PTX that it knows, which an nvJitLink of another CUDA may not know. All know
        # 8.0, and no kernel has anything newer in it. GPUs of capabilities above 9.0 came with later versions.
        if capability <= (9, 0):
            ptx = re.sub(r"^\.version .*$", ".version 8.0", ptx, count=1, flags=re.MULTILINE)
        data = ptx.encode() + b"\0"
        try:
            nvjitlink.add_data(handle, nvjitlink.InputType.PTX, data, len(data), "kernel")
            nvjitlink.complete(handle)
        except nvjitlink.nvJitLinkError as error:
            log = bytearray(nvjitlink.get_error_log_size(handle))
            nvjitlink.get_error_log(handle, log)
            said = " ".join(log.decode(errors="replace").strip("\0").split())
            version = "{}.{}".format(*nvjitlink.version())
            raise Unavailable(f"nvJitLink {version} refuses a kernel ({said or error}): update it") from error
        code, log = bytearray(nvjitlink.get_linked_cubin_size(handle)), bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_linked_cubin(handle, code)
        nvjitlink.get_info_log(handle, log)
    finally:
        nvjitlink.destroy(handle)
    return bytes(code), log.decode()


def entry_of(ptx: str) -> str:
    """The name of the kernel in its PTX."""
    found = re.search(r"\.visible \.entry (\w+)\(", ptx)
    if found is None:
        raise ValueError("there is no kernel in this PTX")
    return found[1]


def kept(name: str, capability: tuple[int, int], versions: str, compiled: Callable[[], str]) -> tuple[bytes, str]:
    """(machine code, entry) of the kernel `name`: from its file, or of the PTX that `compiled` makes.

    The file begins with a line of entry and checksum: the driver would refuse a damaged one at every start.
    """
    path = _folder(versions) / f"{name}{_suffix(capability)}"
    try:
        line, code = path.read_bytes().split(b"\n", 1)
        entry, checksum = line.decode().split()
        if checksum == hashlib.sha256(code).hexdigest():
            return code, entry
    except (OSError, ValueError):
        pass
    ptx = compiled()
    made, entry_name = assemble(ptx, capability)[0], entry_of(ptx)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(f"{entry_name} {hashlib.sha256(made).hexdigest()}\n".encode() + made)
        os.replace(temporary, path)
    except OSError:  # a full disk: the next process compiles again
        temporary.unlink(missing_ok=True)
    return made, entry_name


def any_kept(capability: tuple[int, int], versions: str) -> bool:
    """Whether a kernel for such GPUs is kept already."""
    return any(_folder(versions).glob(f"*{_suffix(capability)}"))


def _suffix(capability: tuple[int, int]) -> str:
    return "-{}{}.cubin".format(*capability)


def slots(address: int, size: int, width: int) -> tuple[int, ...]:
    """What an array of so many numbers, of so many bytes each, puts into its slots."""
    return 0, 0, size, width, address, size, width


@lru_cache
def _folder(versions: str) -> Path:
    here = Path(__file__).parent
    return cache_folder([here.parent / "reference.py", *sorted(here.glob("*.py"))], versions)


class Arguments:
    """The slots of a kernel's arguments, in memory that the driver reads at every launch.

    kinds: a letter for each argument, as `struct` has it: "q" a whole number of 8 bytes, "i" of 4, "f" a real number of
    4, "P" an array.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        slots = [{"q": "q", "i": "i4x", "f": "f4x", "P": ARRAY_SLOTS * "q"}[kind] for kind in kinds]
        self.layout = struct.Struct("<" + "".join(slots))
        self.memory = ctypes.create_string_buffer(self.layout.size)
        first = ctypes.addressof(self.memory)
        count = self.layout.size // SLOT
        self._places = (ctypes.c_void_p * count)(*range(first, first + self.layout.size, SLOT))
        self.address = ctypes.addressof(self._places)
        self.pack = self.layout.pack_into


class Loaded:
    """A kernel on the device."""

    def __init__(self, code: bytes, entry: str, kinds: Sequence[str], name: str, enter: Callable[[], object]) -> None:
        """enter: make the GPU's context the calling thread's."""
        self.driver = import_module("cuda.bindings.driver")
        self.name, self.arguments, self._enter = name, Arguments(kinds), enter
        self.module = self._done(self._call(self.driver.cuModuleLoadData, code))
        self.function = self._done(self._call(self.driver.cuModuleGetFunction, self.module, entry.encode()))
        self._launch = self.driver.cuLaunchKernel
        self._lock = threading.Lock()  # the arguments of one launch at a time

    def _call(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
        """What the driver answers. A thread in which Numba has done nothing yet has no context, and gets it first."""
        results = function(*arguments)
        if results[0] and results[0] == self.driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            self._enter()
            results = function(*arguments)
        return results

    def _done(self, results: tuple[Any, ...]) -> Any:
        status, *values = results
        if status == self.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:  # code takes memory, too
            raise Unavailable(f"the GPU's memory does not suffice for the kernel {self.name}: use the cpu")
        if status in (self.driver.CUresult.CUDA_ERROR_INVALID_IMAGE, self.driver.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU):
            raise Unavailable(f"the CUDA driver is too old for the installed numba-cuda ({status.name}): update it")
        if status != self.driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the CUDA driver refuses the kernel {self.name}: {status.name}")
        return values[0] if values else None

    def launch(self, blocks: tuple[int, int, int], threads: int, shared: int, stream: int, values: list[Any]) -> None:
        """values: what goes into the slots."""
        arguments = self.arguments
        x, y, z = blocks
        grid = (x, y, z, threads, 1, 1)
        with self._lock:
            arguments.pack(arguments.memory, 0, *values)
            results = self._call(self._launch, self.function, *grid, shared, stream, arguments.address, 0)
        if results[0]:
            self._done(results)

    def allow_shared(self, size: int) -> bool:
        """Tell the driver that launches have so many bytes of dynamic shared memory; False if it refuses."""
        attribute = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = self._call(self.driver.cuFuncSetAttribute, self.function, attribute, size)
        return bool(status == self.driver.CUresult.CUDA_SUCCESS)
