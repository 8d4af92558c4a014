"""What several test files need: small corpora made on the spot, and the command line in a process of its own."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

# Before NumPy's BLAS starts its threads: they would spin on the cores that Numba's need.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import soundfile

# The same examples everywhere, and no failure because a machine is busy.
hypothesis.settings.register_profile("npser", deadline=None, derandomize=True)
hypothesis.settings.load_profile("npser")

ROOT = Path(__file__).resolve().parent.parent

needs_numba_cuda = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed: pip install -e '.[cuda13]'"
)


@pytest.fixture(autouse=True)
def signals_stay_as_they_were():
    """What a test ignores, every process of the tests after it would ignore, too."""

    def handlers() -> list[object]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before = handlers()
    yield
    assert handlers() == before


def write_tone(path: Path, hertz: float, seconds: float = 1.2, seed: int = 0) -> None:
    """A harmonic tone with a little noise, 16 kHz, 16 bit."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(16000 * seconds)) / 16000
    wave = sum(np.sin(2 * np.pi * hertz * n * t) / n for n in (1, 2, 3)) + 0.05 * rng.standard_normal(len(t))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.2 * wave, 16000, subtype="PCM_16")


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder corpus: 6 low tones called sadness, 8 high ones called happy."""
    folder = tmp_path_factory.mktemp("tones")
    for n in range(6):
        write_tone(folder / "sadness" / f"low{n}.wav", 150 + 10 * n, seed=n)
    for n in range(8):
        write_tone(folder / "happy" / f"high{n}.wav", 600 + 40 * n, seed=100 + n)
    return folder


def run_module(module: str, *arguments: str | Path, **options) -> subprocess.CompletedProcess:
    """python -m MODULE ARGUMENTS in a fresh process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False, **options)


def start_module(module: str, *arguments: str | Path) -> subprocess.Popen:
    """The same, not waited for."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def has_gpu() -> bool:
    """Whether `kernels.cuda` finds a GPU here."""
    import kernels

    try:
        kernels.rung("cuda")
    except kernels.Unavailable:
        return False
    return True
