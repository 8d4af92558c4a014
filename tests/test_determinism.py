"""The same seed gives the same parameters, bit for bit, after an epoch: with any number of threads, in any process."""

import hashlib
import io
import os
import random
import subprocess
import sys

import numba
import numpy as np
import pytest
from conftest import ROOT

from npser.features import Standardisation, WindowSet
from npser.models import ARCHITECTURES, build_model
from npser.optim import SGD
from npser.progress import Progress
from npser.trainer import Task, train_epochs

BINS = 16


def epoch(arch, seed=5, backend="cpu"):
    """A small network after an epoch of 42 windows, some of them twice, in batches of 8 (the last of them smaller)."""
    rng = np.random.default_rng(0)
    model = build_model(arch, backend=backend, filters=32, hidden=20, bins=BINS, classes=3, seed=seed)
    length = model.input_frames
    frames = [rng.standard_normal((length + 4 * n, BINS)).astype(np.float32) for n in (3, 9, 5, 4, 8, 7)]
    scale = Standardisation(np.zeros(BINS, np.float32), np.ones(BINS, np.float32))
    windows = WindowSet(frames, scale, length, 4)
    targets = np.array([0, 1, 2, 1, 0, 2])[windows.owner]
    progress = Progress(99, io.StringIO())
    progress.begin_fold("fold", 99)
    sgd = SGD(clip_norm=1.0 if arch == "lstm" else None)
    list(train_epochs(model, sgd, Task(windows, targets, (seed, 0, 0), 1, 8, sgd.clip_norm), progress))
    assert sgd.updates > 4
    return model.params | {f"v {name}": value for name, value in sgd.velocities.items()}


def digest(arch):
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in epoch(arch).values())).hexdigest()


def assert_identical(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_epoch_gives_the_same_bits_again(arch):
    first = epoch(arch)
    assert_identical(first, epoch(arch))
    other = epoch(arch, seed=6)
    assert any(value.tobytes() != other[name].tobytes() for name, value in first.items())  # the seed counts


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_number_of_threads_changes_no_bit(arch):
    most = numba.config.NUMBA_NUM_THREADS
    if most < 2:
        pytest.skip("Numba has one thread on this machine")
    try:
        runs = []
        for threads in sorted({1, 2, most}):
            numba.set_num_threads(threads)
            runs.append(epoch(arch))
    finally:
        numba.set_num_threads(most)
    for run in runs[1:]:
        assert_identical(runs[0], run)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_global_generators_are_neither_read_nor_moved(arch, backend):
    runs, states = [], []
    for seed in (1, 2):
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        before = np.random.get_state()[1].tobytes(), random.getstate()  # noqa: NPY002
        runs.append(epoch(arch, backend=backend))
        assert (np.random.get_state()[1].tobytes(), random.getstate()) == before  # noqa: NPY002
        states.append(before)
    assert states[0] != states[1]
    assert_identical(*runs)


def test_another_process_with_other_hashes_gives_the_same_bits():
    """Sets of strings are in another order there."""
    program = "from test_determinism import *; print(*map(digest, ARCHITECTURES))"
    found = []
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert found[0] == found[1] == [digest(arch) for arch in ARCHITECTURES]
