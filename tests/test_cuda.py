"""`kernels.cuda` on a machine without a GPU: in the simulator, and compiled for GPUs that are not there."""

import ctypes
import importlib.util
import os
import re
import struct
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import ROOT, has_gpu, needs_numba_cuda, run_module
from ptx_machine import ptx_of

import kernels

CAPABILITIES = ((8, 0), (9, 0))


@needs_numba_cuda
def test_simulated():
    """tests/cuda_simulated.py, in a process in which Numba simulates the GPU."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "tests" / "cuda_simulated.py")]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


# --- compiled for GPUs that are not there ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled():
    """(capability, kernel) -> (PTX, registers, bytes of shared memory, the assembler's log, its version)."""
    nvjitlink = pytest.importorskip("cuda.bindings.nvjitlink", reason="nvJitLink is not installed")
    from kernels.cuda import arrays, device, launching

    assert arrays  # with it, every module that has kernels is imported
    results = {}
    for name, kernel in device.KERNELS.items():
        for capability in CAPABILITIES:
            ptx = ptx_of(kernel, capability)
            _, log = launching.assemble(ptx, capability)
            registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
            # From 9.0 on, the system keeps 1 KB of a block's shared memory for itself, where there is any.
            shared = int(re.search(r"(\d+) bytes smem", log)[1]) - (1024 if capability >= (9, 0) else 0)
            results[capability, name] = ptx, registers, max(shared, 0), log, "{}.{}".format(*nvjitlink.version())
    return results


@needs_numba_cuda
def test_nothing_is_spilled_to_memory(compiled):
    for (capability, name), (ptx, registers, _, log, _) in compiled.items():
        assert ".target sm_{}{}".format(*capability) in ptx
        assert registers <= 128, name
        assert re.search(r" 0 bytes lmem", log), f"{name}: arrays in local memory"
        spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert spills, name
        assert all(set(each) == {"0"} for each in spills), f"{name} for {capability}: {spills}"


@needs_numba_cuda
def test_vector_loads_and_tensor_cores_are_there(compiled):
    for (_, name), (ptx, *_) in compiled.items():
        if re.match("product_(wide|flat)|conv_relu_pool_(1|many|dx)|conv3x3$|lstm_sequence", name):
            assert "ld.shared.v4.f32" in ptx, name
        if name.startswith("product_tensor"):
            assert ptx.count("mma.sync.aligned.m16n8k8.row.col.f32.tf32") == 32, name
            assert "cvt.rna.tf32.f32" in ptx, name


@needs_numba_cuda
def test_memory_is_read_and_written_four_numbers_at_a_time(compiled):
    for (_, name), (ptx, *_) in compiled.items():
        if re.match("product_(wide|flat)", name):
            assert "ld.global.v4" in ptx, name
        if re.match("product_(wide|flat)|conv_relu_pool_(1|many|dx)|conv3x3$", name):
            assert "st.global.v4" in ptx, name
        if re.match("product_tensor", name):
            assert "ld.global.v4" in ptx, name
            assert "st.global.v2" in ptx, name


@needs_numba_cuda
def test_no_place_in_an_array_is_counted_from_its_end(compiled):
    """Numba reads an array's size to do that: `index` keeps it out of the kernels in which it would cost most."""
    for (_, name), (ptx, *_) in compiled.items():
        if re.match("product|conv|lstm_sequence|sum_parts", name):
            assert not reads_slots(ptx, name, (5,)), name  # the sizes


@needs_numba_cuda
def test_no_double_precision_by_accident(compiled):
    """A Python float in a kernel makes everything near it float64."""
    wanted = {"squares", "scale", "tally"}
    double = {name for (_, name), (ptx, *_) in compiled.items() if re.search(r"\.f64\b", ptx)}
    assert double == wanted


# --- how they are launched ---------------------------------------------------------------------------------------

SLOTS = {"q": [".u64"], "i": [".u32"], "f": [".f32"], "P": [".u64"] * 7}


def reads_slots(ptx, name, slots):
    """Whether a kernel reads these slots of any of its arrays."""
    from kernels.cuda import device

    first, ours = 0, []
    for kind in device.KERNELS[name].kinds:
        ours += [str(first + slot) for slot in slots] if kind == "P" else []
        first += len(SLOTS[kind])
    return bool(re.search(rf"ld\.param\S* .*_param_({'|'.join(ours)})\]", ptx))


@needs_numba_cuda
def test_the_slots_of_arguments_are_those_of_the_ptx(compiled):
    """What `launching.Arguments` packs has the number, the order and the types that the kernel was compiled for."""
    from kernels.cuda import device, launching

    assert len(SLOTS["P"]) == launching.ARRAY_SLOTS
    for (_, name), (ptx, *_) in compiled.items():
        kernel = device.KERNELS[name]
        header = ptx[ptx.index(".entry ") :].split(")", 1)[0]
        found = re.findall(r"\.param (\.\w+) ", header)
        assert found == [t for kind in kernel.kinds for t in SLOTS[kind]], name
        assert launching.Arguments(kernel.kinds).layout.size == launching.SLOT * len(found)
        assert launching.entry_of(ptx) in header
        # Of an array, the address alone is used, and sometimes the size, which is right.
        assert not reads_slots(ptx, name, (0, 1, 2, 3, 6)), name


def test_arguments_are_packed():
    from kernels.cuda.launching import SLOT, Arguments

    arguments = Arguments(["P", "i", "f", "q"])
    arguments.pack(arguments.memory, 0, 0, 0, 5, 4, 0xABC0, 5, 4, -7, 0.25, -(2**40))
    slots = [arguments.memory.raw[at : at + SLOT] for at in range(0, len(arguments.memory.raw), SLOT)]
    assert struct.unpack("<7q", b"".join(slots[:7])) == (0, 0, 5, 4, 0xABC0, 5, 4)
    assert struct.unpack("<i", slots[7][:4]) == (-7,)
    assert struct.unpack("<f", slots[8][:4]) == (0.25,)
    assert struct.unpack("<q", slots[9]) == (-(2**40),)
    places = (ctypes.c_void_p * 10).from_address(arguments.address)
    assert list(places) == [ctypes.addressof(arguments.memory) + SLOT * slot for slot in range(10)]


@needs_numba_cuda
def test_a_launch_hands_the_driver_addresses_and_sizes(monkeypatch):
    """A kernel with a driver that writes down what it is told: views begin where they should."""
    from kernels.cuda import device

    told = []
    loaded = types.SimpleNamespace(launch=lambda *details: told.append(details))
    kernel = device.KERNELS["sgd"]
    monkeypatch.setattr(kernel, "_loaded", loaded)
    monkeypatch.setattr(device, "DIRECT", True)
    monkeypatch.setattr(device, "_stream_handle", lambda: 77)
    whole = (0, 0, 30, 4, 4096, 30, 4)
    memory = types.SimpleNamespace(address=4096, dtype=np.dtype(np.float32), slots=whole)
    base = device.Array(memory, (6, 5))
    view = device.Array(memory, (2, 5), first=10, base=base)
    monkeypatch.setattr(device, "_pool", {})
    kernel(3, view, base, base, 10, 0.5, 0.25, shared=64)
    assert told == [((3, 1, 1), 256, 64, 77, [0, 0, 10, 4, 4136, 10, 4, *whole, *whole, 10, 0.5, 0.25])]


@needs_numba_cuda
def test_compiled_kernels_are_kept(tmp_path, monkeypatch):
    pytest.importorskip("cuda.bindings.nvjitlink", reason="nvJitLink is not installed")
    from kernels.cuda import device, launching

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    launching._folder.cache_clear()
    calls = []

    def ptx():
        calls.append(1)
        return device.KERNELS["sgd"].ptx((8, 0))

    first, second = (launching.kept("sgd", (8, 0), "versions", ptx) for _ in range(2))
    launching._folder.cache_clear()
    assert first == second
    assert len(calls) == 1
    assert first[0][:4] == b"\x7fELF"
    assert first[1].encode() in first[0]
    (path,) = tmp_path.rglob("*.cubin")
    whole = path.read_bytes()
    for times, damaged in enumerate((b"", whole[:-1], whole[:-1] + b"?", whole.replace(b"\x7fELF", b"?ELF")), 2):
        path.write_bytes(damaged)
        again = launching.kept("sgd", (8, 0), "versions", ptx)
        assert len(calls) == times
        assert again[0][:4] == b"\x7fELF"
        assert launching.kept("sgd", (8, 0), "versions", ptx) == again  # and kept once more
        assert len(calls) == times
    launching._folder.cache_clear()


@needs_numba_cuda
def test_compilation_is_announced_where_it_will_happen(tmp_path, monkeypatch):
    from kernels.cuda import device, launching
    from npser import train

    said = []
    progress = types.SimpleNamespace(say=said.append)
    monkeypatch.setattr(kernels, "rung", lambda name: sys.modules[f"kernels.{name}"])
    monkeypatch.setattr(device, "_capability", lambda: (9, 0))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    launching._folder.cache_clear()
    monkeypatch.setattr(device, "DIRECT", False)
    train._warn_of_compilation("cuda", progress)
    monkeypatch.setattr(device, "DIRECT", True)
    train._warn_of_compilation("cuda", progress)
    assert said[0] == "compiling kernels (at every start) ..."
    assert said[1:] == ["compiling kernels (once; they are kept for the next start) ..."]
    folder = launching._folder(device._versions())
    (folder / "relu-80.cubin").touch()  # of another GPU
    train._warn_of_compilation("cuda", progress)
    assert said[2:] == said[1:2]
    (folder / "relu-90.cubin").touch()
    train._warn_of_compilation("cuda", progress)
    assert len(said) == 3
    launching._folder.cache_clear()


@needs_numba_cuda
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY"), True),
        (MemoryError("out of memory"), True),
        (RuntimeError("an illegal memory access was encountered"), False),
    ],
)
def test_too_little_memory_is_one_line(monkeypatch, error, line):
    """What waits in the pool is given back first; other faults are not taken for it."""
    from kernels.cuda import device

    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(device, "_pool", {("f", 3): ["waiting"]})
    monkeypatch.setattr(device, "stream", lambda: 0)
    monkeypatch.setattr(device, "cuda", types.SimpleNamespace(device_array=refuse))
    with pytest.raises(kernels.Unavailable if line else RuntimeError) as raised:
        device.empty((1000, 1000))
    assert (device._pool == {}) == line
    if line:
        message = "the GPU's memory does not suffice (4 MB more were asked for): use smaller batches, or the cpu"
        assert str(raised.value) == message


@needs_numba_cuda
def test_a_kernel_that_the_driver_does_not_take_is_one_line():
    driver = pytest.importorskip("cuda.bindings.driver", reason="the driver's bindings are not installed")
    from kernels.cuda.launching import Loaded

    loaded = Loaded.__new__(Loaded)
    loaded.driver, loaded.name = driver, "relu"
    with pytest.raises(kernels.Unavailable, match=r"^the GPU's memory does not suffice for the kernel relu"):
        loaded._done((driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None))
    with pytest.raises(kernels.Unavailable, match=r"too old for the installed numba-cuda \(CUDA_ERROR_INVALID_IMAGE\)"):
        loaded._done((driver.CUresult.CUDA_ERROR_INVALID_IMAGE, None))
    with pytest.raises(RuntimeError, match="the CUDA driver refuses the kernel relu: CUDA_ERROR_INVALID_VALUE"):
        loaded._done((driver.CUresult.CUDA_ERROR_INVALID_VALUE,))
    assert loaded._done((driver.CUresult.CUDA_SUCCESS, 5)) == 5


@needs_numba_cuda
def test_a_thread_without_a_context_is_given_one(monkeypatch):
    """Loading and launching where Numba has done nothing yet: once more, with its context; other faults stay faults."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="the driver's bindings are not installed")
    from kernels.cuda import launching

    asked, entered, refused = [], [], driver.CUresult.CUDA_ERROR_INVALID_CONTEXT

    def answer(name):
        def call(*arguments):
            asked.append(name)
            return (driver.CUresult.CUDA_SUCCESS if entered else refused, name)[: 1 if name == "cuLaunchKernel" else 2]

        return call

    names = ("cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel")
    there = types.SimpleNamespace(CUresult=driver.CUresult, **{name: answer(name) for name in names})
    monkeypatch.setattr(launching, "import_module", lambda name: there)
    loaded = launching.Loaded(b"code", "entry", ["q"], "relu", lambda: entered.append(1))
    assert (asked, entered) == ([names[0], names[0], names[1]], [1])
    entered.clear()
    loaded.launch((1, 1, 1), 32, 0, 0, [5])
    assert (asked[3:], entered) == ([names[2], names[2]], [1])
    entered.clear()
    refused = driver.CUresult.CUDA_ERROR_LAUNCH_FAILED
    with pytest.raises(RuntimeError, match="refuses the kernel relu: CUDA_ERROR_LAUNCH_FAILED"):
        loaded.launch((1, 1, 1), 32, 0, 0, [5])
    assert (asked[5:], entered) == ([names[2]], [])


@needs_numba_cuda
def test_ptx_that_is_newer_than_the_linker_is_assembled():
    """The version that NVVM writes is not what a kernel needs; what the linker refuses, it says why."""
    pytest.importorskip("cuda.bindings.nvjitlink", reason="nvJitLink is not installed")
    from kernels.cuda import device, launching

    for capability in CAPABILITIES:
        ptx = ptx_of(device.KERNELS["sgd"], capability)
        newer = re.sub(r"\.version .*", ".version 99.0", ptx)
        assert newer != ptx
        assert launching.assemble(newer, capability)[0] == launching.assemble(ptx, capability)[0]
    for broken, capability in ((newer, (10, 0)), (ptx.replace("ld.param.u64", "ld.nowhere.u64"), (9, 0))):
        line = r"^nvJitLink [\d.]+ refuses a kernel \([^\n]*\bline \d+[^\n]*\): update it$"
        with pytest.raises(kernels.Unavailable, match=line):
            launching.assemble(broken, capability)


def in_a_folder(code, **more):
    """What a process prints that has all packages by PYTHONPATH alone, as after `pip install --target`.

    Without site-packages of its own (-S), where Python and NVIDIA's libraries look for more than modules.
    """
    folders = {ROOT: 0} | {
        os.path.dirname(os.path.dirname(importlib.util.find_spec(name).origin)): 0 for name in PACKAGES
    }
    environment = {key: value for key, value in os.environ.items() if not re.match("CUDA_|CONDA_|KERNELS_", key)}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, folders))} | more
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


PACKAGES = ("numpy", "numba", "numba_cuda")


@needs_numba_cuda
@pytest.mark.parametrize("simulated", ["", "1"])
def test_packages_in_a_folder_are_found(simulated):
    """numba-cuda is there in the place of Numba's numba.cuda, and NVIDIA's libraries are those beside it."""
    pytest.importorskip("cuda.bindings.nvjitlink", reason="nvJitLink is not installed")
    code = """
from kernels.cuda import device, elementwise, launching
print(device.cuda.__file__)
if not device.SIMULATED:
    assert device.DIRECT, device.OBSTACLE
    launching.assemble(device.KERNELS["dropout"].ptx((9, 0)), (9, 0))
    print(*launching.libraries().values(), sep="\\n")
"""
    printed = in_a_folder(code, **({"NUMBA_ENABLE_CUDASIM": simulated} if simulated else {})).splitlines()
    folder = os.path.dirname(importlib.util.find_spec("numba_cuda").origin)
    assert printed[0].startswith(folder)
    assert len(printed) == (1 if simulated else 3)
    assert all(os.path.join(os.path.dirname(folder), "nvidia") in line for line in printed[1:])


@needs_numba_cuda
def test_numbas_own_cuda_is_one_line():
    """Imported before numba-cuda could take its place; it does not know what kernels are compiled with."""
    code = """
import numba.cuda, kernels
try:
    kernels.rung("cuda")
except kernels.Unavailable as error:
    print(error)
"""
    printed = in_a_folder(code)
    assert printed.count("\n") == 1
    assert "not the package numba-cuda's" in printed


@needs_numba_cuda
def test_a_gpu_that_has_no_room_for_this_program_is_one_line(monkeypatch):
    """Other programs have all its memory, or it is theirs alone: the driver makes no context."""
    from kernels.cuda import device

    def refuse():
        raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: The call failed.\nOr something like that. And more.")

    device._capability.cache_clear()
    there = types.SimpleNamespace(is_available=lambda: True, get_current_device=refuse)
    monkeypatch.setattr(device, "cuda", there)
    line = r"^the GPU refuses to work for this program \(CUDA_ERROR_OUT_OF_MEMORY: The call failed\): use the cpu$"
    with pytest.raises(kernels.Unavailable, match=line):
        device.require()
    old = types.SimpleNamespace(compute_capability=(7, 5))
    there.get_current_device = lambda: old
    with pytest.raises(kernels.Unavailable, match=r"below 8\.0"):
        device.require()
    device._capability.cache_clear()


@needs_numba_cuda
def test_a_driver_without_a_compiler_is_one_line(monkeypatch):
    from kernels.cuda import device

    without = types.SimpleNamespace(is_available=lambda: False, cuda_error=lambda: None)
    monkeypatch.setattr(device, "cuda", without)
    with pytest.raises(kernels.Unavailable, match=r"^no CUDA GPU can be used here \(NVVM is missing, [^\n]+$"):
        device.require()


@needs_numba_cuda
def test_the_table_of_registers_is_true(compiled):
    """Registers are compared where the assembler is the one that the table names; shared memory always."""
    import kernels.cuda

    assembler = re.search(r"nvJitLink (\d+\.\d+)", kernels.cuda.__doc__)[1]
    rows = re.findall(r"^\| (\w+) +\| +(\d+) +\| +(\d+) +\|$", kernels.cuda.__doc__, re.MULTILINE)
    table = {name: (int(registers), int(shared)) for name, registers, shared in rows}
    found = {
        name: (registers, shared)
        for (capability, name), (_, registers, shared, _, _) in compiled.items()
        if capability == (9, 0) and re.match("product|conv|lstm", name)
    }
    assert table.keys() == found.keys()
    assert {name: shared for name, (_, shared) in table.items()} == {name: s for name, (_, s) in found.items()}
    (version,) = {version for *_, version in compiled.values()}
    if version != assembler:
        pytest.skip(f"registers are those of nvJitLink {assembler}, this is {version}")
    assert table == found


# --- one line where there is no GPU ------------------------------------------------------------------------------


def refused(*arguments, **environment):
    result = run_module("npser.train", "--arch", "lstm", "--backend", "cuda", *arguments, env=environment)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_no_gpu_is_one_line(tmp_path):
    line = refused("--out", tmp_path / "out")
    assert line.startswith("npser.train: --backend cuda: ")
    assert "npser[cuda13]" in line if importlib.util.find_spec("numba_cuda") is None else "no CUDA GPU" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_predict_refuses_in_one_line_too(tmp_path):
    result = run_module("npser.predict", tmp_path / "m.npz", tmp_path / "a.wav", "--backend", "cuda")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("npser.predict: --backend cuda: ")


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_worker_without_a_gpu_says_so():
    from npser import workers
    from npser.errors import UserError

    config = {"backend": "cuda", "precision": "float32", "threads": 1}
    with pytest.raises(UserError, match=r"^--backend cuda: "):
        workers.compute(workers.Job("demo", None, config, 0, 0, None, {}))


@needs_numba_cuda
def test_the_simulator_is_refused(tmp_path):
    assert "NUMBA_ENABLE_CUDASIM" in refused("--out", tmp_path / "out", NUMBA_ENABLE_CUDASIM="1")


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_models_say_so_too():
    from npser.errors import UserError
    from npser.models import build_model

    with pytest.raises(UserError, match="backend cuda: "):
        build_model("lstm", backend="cuda")


@pytest.mark.parametrize("command", [("npser.train", "--arch", "lstm"), ("npser.predict", "m.npz", "a.wav")])
def test_precision_needs_the_gpu(command):
    result = run_module(*command, "--precision", "tf32")
    line = f"{command[0]}: --precision tf32: the cpu has float32 only: add --backend cuda\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", line)


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_the_benchmark_needs_one_too(tmp_path):
    result = run_module("bench", "train", "--device", "cuda", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("bench: --device cuda: ")


@needs_numba_cuda
def test_the_simulator_is_not_timed(tmp_path):
    result = run_module("bench", "train", "--device", "cuda", cwd=tmp_path, env={"NUMBA_ENABLE_CUDASIM": "1"})
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "the simulator is for tests" in result.stderr


@needs_numba_cuda
def test_workers_share_the_gpu_and_a_missing_one_is_one_line(tmp_path):
    line = refused("--out", tmp_path / "out", "--workers", "2", "--threads", "2", NUMBA_ENABLE_CUDASIM="1")
    assert "NUMBA_ENABLE_CUDASIM" in line


@needs_numba_cuda
def test_only_one_module_imports_numba_cuda():
    pattern = re.compile(
        r"^\s*(from numba import .*\bcuda\b|import numba\.cuda|from numba\.cuda|import numba_cuda)"
        r"|import_module\(.numba\.cuda",
        re.M,
    )
    files = [*ROOT.glob("kernels/**/*.py"), *ROOT.glob("npser/**/*.py")]
    assert [f.name for f in files if pattern.search(f.read_text())] == ["device.py"]
