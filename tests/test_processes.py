"""Whatever process the kernels and commands find themselves in, they work or say one clear line: no hang, no abort."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from kernels import Unavailable
from kernels.cache import cache_folder
from npser import cli

STEP = """
import numpy as np
from npser.models import build_model
from npser.optim import SGD

def step(arch="lstm", seed=0):
    model = build_model(arch, filters=4, hidden=8, bins=16, classes=3, seed=seed)
    x = np.random.default_rng(seed).standard_normal((6, model.input_frames, 16)).astype(np.float32)
    sgd = SGD()
    for _ in range(3):
        model.train_step(x, np.arange(6) % 3, sgd)
    return model.predict_proba(x)
"""


def python(program, **environment):
    """A program in a fresh process; None takes a variable away."""
    merged = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    merged = {name: value for name, value in merged.items() if value is not None}
    command = [sys.executable, "-c", STEP + program]
    return subprocess.run(command, env=merged, capture_output=True, text=True, timeout=1800, check=False)


def layers():
    """The threading layers that Numba has on this machine."""
    program = "import numba; numba.set_num_threads(1); print(numba.threading_layer())"
    return [
        layer for layer in ("omp", "workqueue", "tbb") if not python(program, NUMBA_THREADING_LAYER=layer).returncode
    ]


LAYERS = layers()

THREADS = """
import threading
alone = [step(seed=n) for n in range(4)]
found = [None] * 4
def work(n):
    for _ in range(5):
        found[n] = step(seed=n)
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
for a, b in zip(alone, found): np.testing.assert_array_equal(a, b)
print("same")
"""


@pytest.mark.parametrize("layer", LAYERS)
def test_training_in_several_threads_at_once_gives_the_same(layer):
    done = python(THREADS, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same\n"


FORK = """
import os, sys
if os.environ["WHEN"] == "before":
    step()
child = os.fork()
if child == 0:
    status = 3
    try:
        step()
        status = 0
    except Exception as error:
        print(error)
        status = 2
    finally:
        sys.stdout.flush()
        os._exit(status)
_, status = os.waitpid(child, 0)
step()  # the parent computes on
print("child", os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_forked_child_computes_or_is_told_why_not(layer, when):
    """Only GNU OpenMP does not survive a fork, and only once its threads have been at work."""
    done = python(FORK, NUMBA_THREADING_LAYER=layer, WHEN=when, NUMBA_NUM_THREADS=None)
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    if last == "child 2":
        (line,) = said
        assert "forked" in line
        assert "spawn" in line
        assert (layer, when) == ("omp", "before")
    else:
        assert last == "child 0"
        assert not said


@pytest.mark.parametrize(
    "variables", [{"OMP_NUM_THREADS": "1"}, {"NUMBA_NUM_THREADS": "1", "OMP_WAIT_POLICY": "active"}]
)
@pytest.mark.parametrize("layer", LAYERS)
def test_environments(layer, variables):
    program = "p = step('tdcnn'); assert np.isfinite(p).all(); print(p.shape)"
    done = python(program, NUMBA_THREADING_LAYER=layer, **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(6, 3)\n"


def test_no_threads_at_all_are_one_line():
    command = [sys.executable, "-m", "npser.train", "--arch", "lstm"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_NUM_THREADS": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 2
    assert "NUMBA_NUM_THREADS=0 allows fewer: unset it" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_threading_layer_that_is_not_there_is_one_line():
    if "tbb" in LAYERS:
        pytest.skip("TBB is installed")
    command = [sys.executable, "-m", "npser.train", "--arch", "lstm"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_THREADING_LAYER": "tbb"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "NUMBA_THREADING_LAYER=tbb" in line


def test_a_read_only_installation_without_a_home(tmp_path):
    """The package on a read-only file system, HOME nowhere: kernels are kept in the temporary folder."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs unshare(1) and user name spaces")
    (tmp_path / "package").mkdir()
    (tmp_path / "temporary").mkdir()
    script = f"""mount --bind {ROOT} {tmp_path}/package && mount -o remount,bind,ro {tmp_path}/package || exit 99
        cd {tmp_path}; touch package/x 2>/dev/null && exit 98
        exec {sys.executable} -c '{STEP.replace("'", '"')}print(step().shape)'"""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}/package", "HOME": "/proc/nobody"}
    environment["TMPDIR"] = str(tmp_path / "temporary")
    command = ["unshare", "-Urm", "sh", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(6, 3)\n"
    assert list((tmp_path / "temporary").rglob("*.nbi"))


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders have no owners here")
def test_kernels_are_loaded_from_no_folder_that_others_can_write(tmp_path, monkeypatch):
    """The temporary folder is everybody's, and compiled code is run."""
    usual = tmp_path / "blocked"
    usual.write_text("a file, so that no folder can be made in it")
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(usual))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = cache_folder([])
    ours = made.parent
    assert ours.parent == tmp_path
    assert ours.stat().st_mode & 0o077 == 0
    ours.chmod(0o777)
    with pytest.raises(Unavailable, match="NUMBA_CACHE_DIR"):
        cache_folder([])
    ours.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").chmod(0o700)
    ours.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unavailable):
        cache_folder([])


def test_without_a_home_kernels_are_kept_in_the_temporary_folder(tmp_path, monkeypatch):
    """Not in a folder called ~ below the current one, whoever has made that."""
    monkeypatch.chdir(tmp_path)
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # where nobody is found
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert cache_folder([]).is_relative_to(tmp_path / "temporary")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "here")
    assert cache_folder([]).is_relative_to(tmp_path / "here")


def test_kernels_of_another_processor_or_compiler_are_kept_apart():
    """Numba numbers its files without asking for which processor another process has just written one."""
    code = "from kernels.cpu.tools import CACHE_FOLDER; print(CACHE_FOLDER)"
    unset = dict.fromkeys(("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_BOUNDSCHECK", "NUMBA_OPT"))
    folders = {
        python(code, **unset | environment).stdout
        for environment in ({}, {"NUMBA_CPU_NAME": "generic"}, {"NUMBA_BOUNDSCHECK": "1"}, {"NUMBA_OPT": "1"})
    }
    assert len(folders) == 4


def test_a_full_disk_costs_the_next_process_a_compilation(tmp_path):
    code = (
        "import errno, numpy as np\n"
        "from numba.core.caching import IndexDataCacheFile\n"
        "def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "IndexDataCacheFile.save = full\n"
        "from kernels import cpu\n"
        "print(cpu.relu_forward(np.array([-1, 2], np.float32)))"
    )
    result = python(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert result.stdout == "[0. 2.]\n", result.stderr


@pytest.fixture
def signals_restored():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_memory_that_ends_is_one_line(capsys, signals_restored):
    def main():
        raise MemoryError("Unable to allocate 3 TiB")

    with pytest.raises(SystemExit) as end:
        cli.run("npser.train", main)
    assert end.value.code == 1
    assert capsys.readouterr().err == "npser.train: out of memory (Unable to allocate 3 TiB): take less at once\n"
