"""python -m bench.worker CANDIDATE THREADS DEVICE: one candidate in a process of its own, told by lines of JSON.

Requests come on standard input, one reply each goes to standard output:

    {"do": "prepare", "kind": .., "sizes": .., "reference": path}
        -> {"offered": false}, or {"error": .., "where": ..}: how far the result is from the reference; the reference
           candidate itself writes that file instead
    {"do": "first"}              make what is timed and run it once     -> {}
    {"do": "begin"}              the same                               -> {"seconds": ..} of a second repetition
    {"do": "run", "seconds": ..} once, then repeat for so long          -> {"times": [..]} but for the first; on a GPU
           each is the mean of as many repetitions as last BURST seconds
    {"do": "rest"}               give back what is prepared, the host's memory to the system, too -> {}
    {"do": "remember"}           the largest memory of this process     -> {"bytes": ..}
    {"do": "peaks"}              what the machine can do                -> {"flops": .., "read": .., "update": ..}

What goes wrong is answered by {"failed": one line}. The end of the input ends the process.
"""

import contextlib
import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from npser.cli import keep_memory

BURST = 0.02  # seconds that a GPU is timed for at once: launches go on while it works, as in training


def pin(threads: int, blas_threads: int, device: str = "cpu") -> None:
    """Bind this process, and every thread pool that is still to start, to the first `threads` cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for variable in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(threads)
    for variable in ("OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):  # NumPy's, which no candidate is timed with
        os.environ[variable] = str(blas_threads)
    # XLA's own pool counts the cores that the process may use; this makes sure of the libraries below it.
    flags = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()} intra_op_parallelism_threads={threads}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ["JAX_PLATFORMS"] = device
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # a GPU is shared with the other candidates


class Bench:
    """What the requests do; the state is the workload that is prepared."""

    def __init__(self, candidate: str, device: str = "cpu") -> None:
        from bench import peers

        self.candidate, self.device = peers.named(candidate, device), device
        self.seconds: Callable[[Callable[[], object], int], float] = peers.by_the_clock
        self.count = 1  # repetitions that are timed at once
        self.prepared: peers.Prepared | None = None
        self.call: Callable[[], object] | None = None

    def prepare(self, kind: str, sizes: dict[str, Any], reference: str | None) -> dict[str, Any]:
        import numpy as np

        from bench import workloads
        from bench.peers import REFERENCE

        self.prepared = self.candidate.prepare(kind, workloads.inputs(kind, sizes), sizes)
        if self.prepared is None:
            return {"offered": False}
        if reference is None:  # nothing to compare
            return {"error": 0.0, "where": ""}
        outputs = workloads.sampled(self.prepared.outputs())
        if self.candidate == REFERENCE:
            np.savez(reference, **outputs)  # type: ignore[arg-type]
            self.prepared = None
            return {}
        with np.load(reference) as expected:
            error, where = workloads.difference(outputs, expected)
        return {"error": error, "where": where}

    def first(self) -> dict[str, Any]:
        assert self.prepared is not None
        self.call, self.seconds, self.count = self.prepared.begin(), self.prepared.seconds, 1
        self.prepared = None
        self._timed()
        return {}

    def begin(self) -> dict[str, Any]:
        self.first()
        once = self._timed()
        if self.candidate.device != "cpu":
            self.count = max(1, min(1000, int(BURST / max(once, 1e-6))))
        return {"seconds": once}

    def run(self, seconds: float) -> dict[str, Any]:
        self._timed()  # not counted: it finds the caches, and maybe the memory, full of other candidates' data
        times = [self._timed()]
        while self.count * sum(times) < seconds:
            times.append(self._timed())
        return {"times": times}

    def _timed(self) -> float:
        assert self.call is not None
        return self.seconds(self.call, self.count) / self.count

    def rest(self) -> dict[str, Any]:
        self.prepared = self.call = None
        gc.collect()
        give_back_memory()
        return {}

    def remember(self) -> dict[str, Any]:
        import resource

        status = Path("/proc/self/status")
        if status.exists():  # getrusage's peak begins, on Linux, with that of the process that started this one
            peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            return {"bytes": 1024 * int(peak.split()[1])}
        unit = 1 if sys.platform == "darwin" else 1024
        return {"bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}

    def peaks(self) -> dict[str, Any]:
        found: dict[str, Any] = import_module("bench.machine" if self.device == "cpu" else "bench.gpu").measure()
        return found


def serve(bench: Any, requests: TextIO, replies: TextIO) -> None:
    """Answer every request by the method of its name."""
    for line in requests:
        request = json.loads(line)
        try:
            reply = getattr(bench, request.pop("do"))(**request)
        except Exception as error:  # whatever a library raises is this candidate's result, and the others go on
            reply = {"failed": f"{type(error).__name__}: {first_line(str(error))}"}
        print(json.dumps(reply), file=replies, flush=True)


def give_back_memory() -> None:
    """What `keep_memory` has kept goes back to the system. Does nothing where the C library is not glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:200] if lines else ""


def main() -> int:
    candidate, threads, device = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    pin(threads, threads if candidate == "reference" else 1, device)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no reply
    if candidate == "npser" or "--own-allocator" not in sys.argv:
        keep_memory()  # as the project's own commands do; it serves the others no less
    serve(Bench(candidate, device), sys.stdin, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
