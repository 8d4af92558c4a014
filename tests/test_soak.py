"""The script that watches the memory of long runs, tried on a short one."""

import re
import subprocess
import sys

from conftest import ROOT


def soak(*options):
    command = [sys.executable, ROOT / "tests" / "soak.py", "--every", "0.1", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, cwd=ROOT)


def test_soak_samples_and_compares(tmp_path):
    run = ("--arch", "lstm", "--epochs", "1000", "--segment-hop", "400", "--threads", "1")
    done = soak("--hours", "3", "--hour", "5", "--out", tmp_path / "out", "--", *run)
    peaks = [int(peak) for peak in re.findall(r"hour \d: peak (\d+) MB", done.stdout)]
    assert len(peaks) == 3, done.stdout + done.stderr
    assert min(peaks) > 10
    (change,) = re.findall(r"last against first: ([-+][0-9.]+) %", done.stdout)
    assert abs(float(change) - 100 * (peaks[-1] / peaks[0] - 1)) < 2
    assert done.returncode == (float(change) > 2)


def test_soak_notices_a_run_that_ends(tmp_path):
    done = soak("--hours", "1", "--out", tmp_path / "out", "--", "--arch", "lstm", "--folds", "1000")
    assert done.returncode == 1
    assert "ended by itself with status 2" in done.stdout
