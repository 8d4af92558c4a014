"""`kernels.cuda` on a machine without a GPU: in the simulator, and compiled for GPUs that are not there."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run_module

import kernels

needs_numba_cuda = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed: pip install -e '.[cuda13]'"
)
CAPABILITIES = ((8, 0), (9, 0))


@needs_numba_cuda
def test_simulated():
    """tests/cuda_simulated.py, in a process in which Numba simulates the GPU."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "tests" / "cuda_simulated.py")]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


# --- compiled for GPUs that are not there ------------------------------------------------------------------------


def assemble(ptx, capability):
    """What the assembler says of PTX: nvJitLink holds the same one as ptxas, and comes with numba-cuda."""
    nvjitlink = pytest.importorskip("cuda.bindings.nvjitlink", reason="nvJitLink is not installed")
    options = ["-arch=sm_{}{}".format(*capability), "-verbose"]
    handle = nvjitlink.create(len(options), options)
    data = ptx.encode() + b"\0"
    nvjitlink.add_data(handle, nvjitlink.InputType.PTX, data, len(data), "kernel")
    nvjitlink.complete(handle)
    log = bytearray(nvjitlink.get_info_log_size(handle))
    nvjitlink.get_info_log(handle, log)
    return log.decode(), "{}.{}".format(*nvjitlink.version())


@pytest.fixture(scope="module")
def compiled():
    """(capability, kernel) -> (PTX, registers, bytes of shared memory, the assembler's log, its version)."""
    from kernels.cuda import arrays, device

    assert arrays  # with it, every module that has kernels is imported
    results = {}
    for name, kernel in device.KERNELS.items():
        for capability in CAPABILITIES:
            ptx, _ = device.cuda.compile_ptx(kernel.function, kernel.signature, cc=capability, **kernel.options)
            log, version = assemble(ptx, capability)
            registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
            # From 9.0 on, the system keeps 1 KB of a block's shared memory for itself, where there is any.
            shared = int(re.search(r"(\d+) bytes smem", log)[1]) - (1024 if capability >= (9, 0) else 0)
            results[capability, name] = ptx, registers, max(shared, 0), log, version
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
def test_no_double_precision_by_accident(compiled):
    """A Python float in a kernel makes everything near it float64."""
    wanted = {"squares", "scale", "tally"}
    double = {name for (_, name), (ptx, *_) in compiled.items() if re.search(r"\b(add|mul|fma|div)\S*\.f64", ptx)}
    assert double == wanted


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


def gpu_is_there():
    try:
        kernels.rung("cuda")
    except kernels.Unavailable:
        return False
    return True


@pytest.mark.skipif(gpu_is_there(), reason="there is a GPU")
def test_no_gpu_is_one_line(tmp_path):
    line = refused("--out", tmp_path / "out")
    assert line.startswith("npser.train: --backend cuda: ")
    assert "npser[cuda13]" in line if importlib.util.find_spec("numba_cuda") is None else "no CUDA GPU" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(gpu_is_there(), reason="there is a GPU")
def test_predict_refuses_in_one_line_too(tmp_path):
    result = run_module("npser.predict", tmp_path / "m.npz", tmp_path / "a.wav", "--backend", "cuda")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("npser.predict: --backend cuda: ")


@pytest.mark.skipif(gpu_is_there(), reason="there is a GPU")
def test_a_worker_without_a_gpu_says_so():
    from npser import workers
    from npser.errors import UserError

    config = {"backend": "cuda", "precision": "float32", "threads": 1}
    with pytest.raises(UserError, match=r"^--backend cuda: "):
        workers.compute(workers.Job("demo", None, config, 0, 0, None, {}))


@needs_numba_cuda
def test_the_simulator_is_refused(tmp_path):
    assert "NUMBA_ENABLE_CUDASIM" in refused("--out", tmp_path / "out", NUMBA_ENABLE_CUDASIM="1")


@pytest.mark.skipif(gpu_is_there(), reason="there is a GPU")
def test_models_say_so_too():
    from npser.errors import UserError
    from npser.models import build_model

    with pytest.raises(UserError, match="backend cuda: "):
        build_model("lstm", backend="cuda")


def test_precision_needs_the_gpu():
    result = run_module("npser.train", "--arch", "lstm", "--precision", "tf32")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--precision tf32" in result.stderr


@needs_numba_cuda
def test_only_one_module_imports_numba_cuda():
    pattern = re.compile(
        r"^\s*(from numba import .*\bcuda\b|import numba\.cuda|from numba\.cuda|import numba_cuda)", re.M
    )
    files = [*ROOT.glob("kernels/**/*.py"), *ROOT.glob("npser/**/*.py")]
    assert [f.name for f in files if pattern.search(f.read_text())] == ["device.py"]
