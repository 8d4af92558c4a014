"""python -m bench.worker CANDIDATE THREADS: one candidate in a process of its own, told what to do by lines of JSON.

Requests come on standard input, one reply each goes to standard output:

    {"do": "prepare", "kind": .., "sizes": .., "reference": path}
        -> {"offered": false}, or {"error": .., "where": ..}: how far the result is from the reference; the reference
           candidate itself writes that file instead
    {"do": "begin"}              make what is timed and run it once     -> {"seconds": ..} of a second repetition
    {"do": "run", "seconds": ..} once, then repeat for so long          -> {"times": [..]} but for the first
    {"do": "rest"}               give back what is prepared              -> {}
    {"do": "remember"}           the largest memory of this process     -> {"bytes": ..}
    {"do": "peaks"}              what the machine can do                -> {"flops": .., "read": .., "update": ..}

What goes wrong is answered by {"failed": one line}. The end of the input ends the process.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from npser.cli import keep_memory


def pin(threads: int, blas_threads: int) -> None:
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
    os.environ["JAX_PLATFORMS"] = "cpu"


class Bench:
    """What the requests do; the state is the workload that is prepared."""

    def __init__(self, candidate: str) -> None:
        from bench import peers

        self.candidate = peers.named(candidate)
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

    def begin(self) -> dict[str, Any]:
        assert self.prepared is not None
        self.call = self.prepared.begin()
        self.prepared = None
        self.call()
        return {"seconds": self._timed()}

    def run(self, seconds: float) -> dict[str, Any]:
        self._timed()  # not counted: it finds the caches, and maybe the memory, full of other candidates' data
        times = [self._timed()]
        while sum(times) < seconds:
            times.append(self._timed())
        return {"times": times}

    def _timed(self) -> float:
        assert self.call is not None
        started = time.perf_counter()
        self.call()
        return time.perf_counter() - started

    def rest(self) -> dict[str, Any]:
        self.prepared = self.call = None
        return {}

    def remember(self) -> dict[str, Any]:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return {"bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}

    def peaks(self) -> dict[str, Any]:
        from bench.machine import measure

        return measure()


def serve(bench: Any, requests: TextIO, replies: TextIO) -> None:
    """Answer every request by the method of its name."""
    for line in requests:
        request = json.loads(line)
        try:
            reply = getattr(bench, request.pop("do"))(**request)
        except Exception as error:  # whatever a library raises is this candidate's result, and the others go on
            reply = {"failed": f"{type(error).__name__}: {first_line(str(error))}"}
        print(json.dumps(reply), file=replies, flush=True)


def first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:200] if lines else ""


def main() -> int:
    candidate, threads = sys.argv[1], int(sys.argv[2])
    pin(threads, threads if candidate == "reference" else 1)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no reply
    if candidate == "npser":
        keep_memory()  # as the project's own commands do
    serve(Bench(candidate), sys.stdin, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
