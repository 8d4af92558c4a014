"""bench/gpu_check.py on a machine without a GPU: tried in the simulator, and part by part."""

import json
import os
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, needs_numba_cuda

import kernels


def every_operation():
    """The names of whatever launches kernels."""
    from kernels import cuda
    from kernels.cuda import arrays

    others = "PRECISIONS allow_simulator cache_is_cold device_name dropout_key keeps_kernels require settings"
    others += " synchronise WAITS asarray asnumpy assign diverged"
    return {*cuda.__all__, *arrays.__all__} - set(others.split())


@needs_numba_cuda
def test_the_check_of_a_gpu_tries_itself(tmp_path, tones):
    """bench/gpu_check.py in the simulator, twice: the second call goes on where the first one ended."""
    only = ("launching", "parity float32", "memcheck float32", "bench infer", "cross-validation lstm")
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), "--dry", "--wavs", str(tones)]
    command += [part for word in only for part in ("--only", word)]
    command += ["--train", "--backend cpu --epochs 1 --folds 2 --repeats 1"]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    for out, more in ((tmp_path / "one", ()), (tmp_path / "two", ("--resume", str(tmp_path / "one")))):
        result = subprocess.run(
            [*command, "--out", str(out), *more], capture_output=True, text=True, env=environment, check=False
        )
        found = json.loads((out / "gpu_check.json").read_text())
        # The benchmark refuses the simulator, and so should the check as a whole.
        assert result.returncode == 1, result.stderr
        assert found["bench infer"]["section failed"] == "exit status 2: see log.txt"
        assert "the simulator is for tests" in (out / "log.txt").read_text()
        assert found["launching"]["agrees"] is True
        assert found["launching"]["not by the driver"] == {"because": "NUMBA_ENABLE_CUDASIM", "agrees": True}
        assert found["launching"]["libraries"].keys() == {"nvvm", "nvJitLink"}
        operations = [value for value in found["parity float32"].values() if isinstance(value, dict)]
        assert len(operations) == 2 * 5 + 2 * 3 + 2 * 7 + 8 + 12
        assert all(operation["agrees"] for operation in operations)
        assert {title.split()[0] for title in found["parity float32"]} >= every_operation()
        assert "skipped" in found["memcheck float32"] or "report" in found["memcheck float32"]
        assert found["cross-validation lstm"]["finished_folds"] == 2
        with tarfile.open(out / "lstm.tar.gz") as archive:
            assert sum(name.startswith("lstm/folds/") for name in archive.getnames()) == 2
        assert all(path.is_file() for path in out.iterdir())
        assert {path.name for path in out.iterdir()} == {"gpu_check.json", "log.txt", "lstm.tar.gz"}
    assert "launching" not in result.stdout  # the second call found it done


def test_the_check_finds_packages_where_it_found_them_itself(tmp_path, monkeypatch):
    from bench import gpu_check

    monkeypatch.setenv("PYTHONPATH", "carried")
    check = gpu_check.Check(gpu_check.parser().parse_args(["--out", str(tmp_path / "out")]))
    assert check.environment["PYTHONPATH"] == os.pathsep.join([str(ROOT), "carried"])


@needs_numba_cuda
@pytest.mark.parametrize("poisoned", ["softmax", "dense_update_weights"])
def test_the_check_finds_what_is_not_a_number(poisoned):
    """In one place of one result, of one operation that must not hide behind the others."""
    code = f"""
import sys
sys.argv[1:] = ["--out", "x", "--dry", "--section", "parity float32"]
import kernels
from kernels.cuda import allow_simulator
allow_simulator()
k = kernels.rung("cuda")
from kernels.cuda import arrays
right = k.{poisoned}
def wrong(*operands):
    result = right(*operands)
    spoilt = operands[3] if result is None else result
    value = arrays.asnumpy(spoilt)
    value.flat[0] = float("nan")
    arrays.assign(spoilt, value)
    return result
k.{poisoned} = wrong
from bench import gpu_check
gpu_check.main()
"""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    wrong = [name for name, value in found.items() if isinstance(value, dict) and not value["agrees"]]
    assert wrong, found
    assert all(name.startswith(poisoned) for name in wrong)


@needs_numba_cuda
def test_the_check_says_why_the_driver_does_not_launch(tmp_path, monkeypatch):
    """As where nvJitLink is missing: a disagreement, unless Numba's launcher was asked for."""
    from bench import gpu_check
    from kernels.cuda import arrays, device, lstm

    there = types.SimpleNamespace(device_name=lambda: "GPU", relu_forward=lambda x: np.maximum(x, 0))
    monkeypatch.setattr(kernels, "rung", lambda name: there)
    monkeypatch.setattr(arrays, "asarray", lambda x: x)
    monkeypatch.setattr(arrays, "asnumpy", lambda x: x)
    monkeypatch.setattr(lstm, "sequence_memory", lambda *arguments: (0, 0, 48))
    monkeypatch.setattr(device, "synchronise", lambda: None)
    for direct, obstacle, wrong in (
        (True, "", []),
        (False, "RuntimeError: no nvJitLink", ["not by the driver"]),
        (False, "KERNELS_CUDA_LAUNCHER", []),
    ):
        monkeypatch.setattr(device, "DIRECT", direct)
        monkeypatch.setattr(device, "OBSTACLE", obstacle)
        results = gpu_check.check_launching()
        assert results["agrees"] is True
        assert results.get("not by the driver", {}).get("because", "") == obstacle
        assert list(gpu_check.disagreements(results)) == wrong
        check = gpu_check.Check(gpu_check.parser().parse_args(["--out", str(tmp_path)]))
        check.results["launching"] = results
        assert check.wanted("launching") == bool(wrong)  # in a later call: there may be one by then
        check.results["launching"] = {"agrees": False}
        assert check.wanted("launching")


def test_the_check_measures_before_it_calls_the_sanitizer(tmp_path, monkeypatch):
    """Six runs of a minute, of which memcheck alone reports what the driver refuses, and is told not to."""
    from bench import gpu_check

    names = list(gpu_check.SECTIONS)
    sanitized = [f"{tool} {precision}" for tool, precision in gpu_check.SANITIZED]
    assert names[-len(sanitized) :] == sanitized
    assert sanitized[0] == "memcheck float32"
    assert names[0] == "launching"
    assert names.index("ten steps tdcnn") < names.index("bench train lstm")
    (tmp_path / "compute-sanitizer").write_text("#!/bin/sh\n")
    (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    check = gpu_check.Check(gpu_check.parser().parse_args(["--out", str(tmp_path / "out")]))
    commands = []
    monkeypatch.setattr(check, "run", lambda command, limit: (commands.append(command), (0, "{}"))[1])
    for name in sanitized:
        check.section(name)
    assert [tuple(command[3:5]) == ("--report-api-errors", "no") for command in commands] == [True, True] + [False] * 4
    assert all(command[1] == "--tool" for command in commands)
    assert [command[-1] for command in commands] == ["small float32", "small tf32"] * 3


def test_the_check_ends_what_a_section_leaves_behind(tmp_path):
    """A child of a child that ignores the interruption, as a program under compute-sanitizer may."""
    from bench import gpu_check

    check = gpu_check.Check(gpu_check.parser().parse_args(["--out", str(tmp_path / "out")]))
    left = tmp_path / "left"
    script = f"echo '{{}}'; (trap '' INT; exec sleep 300) & echo $! > {left}; wait"
    status, printed = check.run(["sh", "-c", script], 1.0)
    assert (status, printed) == (None, "{}\n")
    deadline = time.monotonic() + 60
    while not has_ended(left.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert has_ended(left.read_text().strip())


def has_ended(process):
    """Also of one that nobody has taken away yet, a zombie."""
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@needs_numba_cuda
def test_recordings_and_results_that_did_not_travel_are_missed_at_once(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), "--dry", "--out", str(tmp_path / "out")]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    for option, said in (("--wavs", "holds no recording"), ("--resume", "holds no gpu_check.json")):
        result = subprocess.run(
            [*command, option, str(tmp_path)], capture_output=True, text=True, env=environment, check=False
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert said in result.stderr


@needs_numba_cuda
def test_what_the_check_calls_a_disagreement():
    from bench.gpu_check import disagreements

    results = {"parity": {"softmax": {"agrees": False}, "relu": {"agrees": True}}, "bench": {"section failed": "x"}}
    assert list(disagreements(results)) == ["parity / softmax", "bench"]
