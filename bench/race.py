"""How candidates take turns: worker processes, rounds, and the statistics of their times."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench.peers import NO_RIVALS, OURS, REFERENCE, Candidate
from bench.workloads import Workload

PAUSE = 0.25  # seconds before each turn: OpenMP's idle threads spin for up to 0.2
MOST_ROUNDS = 9


class Failed(Exception):
    """A candidate cannot do its work: one line."""


class Worker:
    """A process that holds one candidate."""

    def __init__(
        self, name: str, threads: int, device: str = "cpu", kernels: Path | None = None, own_allocator: bool = False
    ) -> None:
        """kernels: where ours are kept once they are compiled, if not in the user's cache folder; own_allocator: its
        settings are those that the candidate has by itself."""
        root = Path(__file__).resolve().parent.parent
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        self.complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "bench.worker",
                name,
                str(threads),
                device,
                *(["--own-allocator"] if own_allocator else []),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            text=True,
            env=os.environ | {"PYTHONPATH": path} | ({"NUMBA_CACHE_DIR": str(kernels)} if kernels else {}),
            start_new_session=True,  # Ctrl-C is for the parent alone, which then ends the whole session
        )

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        """One request and its reply. Raises Failed when the candidate says so, or is gone."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps({"do": do, **details}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed(self._last_words())
        reply: dict[str, Any] = json.loads(line)
        if "failed" in reply:
            raise Failed(reply["failed"])
        return reply

    def _last_words(self) -> str:
        status = self.process.wait()
        self.complaints.seek(0)
        lines = self.complaints.read().strip().splitlines()
        ended = (
            f"its process was ended by signal {-status}" if status < 0 else f"its process ended with status {status}"
        )
        return f"{ended}: {lines[-1][:200]}" if lines else ended

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """End the process and whatever it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.complaints):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@dataclass
class Row:
    """A workload and what came of it. Times are seconds, one a round: the median of that round."""

    section: str
    workload: Workload
    times: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # largest difference from the reference, relative
    troubles: dict[str, str] = field(default_factory=dict)  # of those that were not timed: why
    wrong: list[str] = field(default_factory=list)  # those among them whose result was not the reference's

    def seconds(self, name: str) -> float | None:
        return median(self.times[name]) if self.times.get(name) else None

    @property
    def faulty(self) -> bool:
        """Is a result wrong, or did ours, or the reference, fail? A peer that cannot do its work is no fault."""
        return bool(self.wrong) or not self.troubles.keys().isdisjoint((OURS.name, REFERENCE.name))

    @property
    def fastest_peer(self) -> str | None:
        peers = [name for name in self.times if name not in NO_RIVALS]
        return min(peers, key=lambda name: median(self.times[name]), default=None)

    @property
    def ratio(self) -> tuple[float, float, float] | None:
        """Time of the fastest peer over ours, and the quartiles of that ratio in the single rounds."""
        peer, ours = self.fastest_peer, self.times.get(OURS.name)
        if peer is None or not ours:
            return None
        low, high = quartiles([a / b for a, b in zip(self.times[peer], ours, strict=True)])
        return median(self.times[peer]) / median(ours), low, high

    def as_json(self) -> dict[str, Any]:
        w = self.workload
        return {
            "section": self.section,
            "title": w.title,
            "kind": w.kind,
            "sizes": {name: Path(x).name if isinstance(x, str) else x for name, x in w.sizes.items()},
            "operations": w.operations,
            "bytes": w.traffic,
            "fastest_peer": self.fastest_peer,
            "ratio": self.ratio,
            "candidates": {
                name: {
                    "median": median(times),
                    "quartiles": quartiles(times),
                    "rounds": times,
                    "difference": self.errors.get(name),
                }
                for name, times in self.times.items()
            },
            "troubles": self.troubles,
            "wrong": self.wrong,
        }


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def interleave(
    names: Sequence[str],
    turn: Callable[[str], float],
    least: int,
    most: int,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, list[float]]:
    """Rounds in which everyone has a turn, each beginning with the next one: name -> what its turns returned.

    At least `least` rounds and at most `most`; in between, none is begun when `seconds` have passed.
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    started = clock()
    for n in range(most):
        if n >= least and clock() - started >= seconds:
            break
        first = n % len(names) if names else 0
        for name in (*names[first:], *names[:first]):
            times[name].append(turn(name))
    return times


@dataclass(frozen=True)
class Pace:
    """How long things may take: seconds of a turn, seconds of a row's rounds, rounds at least."""

    turn: float = 0.3
    row: float = 12.0
    least_rounds: int = 3


class Race:
    """Runs workloads on candidates, one worker each for as long as it lives."""

    def __init__(
        self, candidates: Sequence[Candidate], threads: int, pace: Pace, folder: Path, device: str = "cpu"
    ) -> None:
        self.candidates, self.threads, self.pace, self.folder = candidates, threads, pace, folder
        self.device = device
        self.workers: dict[str, Worker] = {}

    def __enter__(self) -> "Race":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def worker(self, name: str) -> Worker:
        if name not in self.workers or not self.workers[name].alive:
            self.workers[name] = Worker(name, self.threads, self.device)
        return self.workers[name]

    def run(self, section: str, workload: Workload) -> Row:
        """Prove every candidate right, then time those that are."""
        row, reference = Row(section, workload), self.folder / "reference.npz"
        order = {"kind": workload.kind, "sizes": workload.sizes, "reference": str(reference)}
        try:
            self.worker(REFERENCE.name).ask("prepare", **order)
            self.worker(REFERENCE.name).ask("rest")
        except Failed as failure:
            row.troubles[REFERENCE.name] = str(failure)
            self._forget(REFERENCE.name)
            return row
        needed = 0.0  # bytes that a candidate of this row may hold, judged by those before it
        for candidate in self.candidates:
            name = candidate.name
            try:
                if needed - self._held(name) > available_memory():
                    raise Failed("left out: an earlier candidate took more memory than is free now")
                reply = self.worker(name).ask("prepare", **order)
                if not reply.get("offered", True):
                    continue
                row.errors[name] = reply["error"]
                if not reply["error"] <= candidate.tolerance(workload.tolerance):
                    row.wrong.append(name)
                    raise Failed(f"wrong: {reply['where']} differs from the reference by {reply['error']:.2g}")
                self.worker(name).ask("begin")
                needed = max(needed, 1.5 * self._held(name))  # a check takes more
                row.times[name] = []
            except Failed as failure:
                row.troubles[name] = str(failure)
                self._forget(name)
        row.times = self._rounds(row, list(row.times), min(workload.least_rounds, self.pace.least_rounds))
        for name in [candidate.name for candidate in self.candidates if candidate.name in self.workers]:
            try:
                self.workers[name].ask("rest")
            except Failed:  # its times stand; the next row starts another
                self._forget(name)
        return row

    def _rounds(self, row: Row, names: list[str], least: int) -> dict[str, list[float]]:
        def turn(name: str) -> float:
            time.sleep(PAUSE)
            if name in row.troubles:
                return float("nan")
            try:
                return median(self.worker(name).ask("run", seconds=self.pace.turn)["times"])
            except Failed as failure:
                row.troubles[name] = str(failure)
                self._forget(name)
                return float("nan")

        times = interleave(names, turn, least, MOST_ROUNDS, self.pace.row)
        return {name: values for name, values in times.items() if name not in row.troubles}

    def _held(self, name: str) -> int:
        """Bytes that a candidate's process holds now."""
        return held_memory(self.workers[name].process.pid) if name in self.workers else 0

    def _forget(self, name: str) -> None:
        """End a candidate that failed: its process may hold memory, or be in any state. The next row starts another."""
        if name in self.workers:
            self.workers.pop(name).close()


def held_memory(pid: int) -> int:
    """Bytes that a process holds now; 0 where that cannot be told."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def available_memory() -> float:
    """Bytes that a new process could have; infinite where that cannot be told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


def peak_memory(candidate: Candidate, workload: Workload, threads: int) -> int:
    """Bytes that a fresh process takes at most for four training steps (`begin` runs two, a run as many)."""
    worker = Worker(candidate.name, threads, own_allocator=True)
    try:
        if not worker.ask("prepare", kind="memory", sizes=workload.sizes, reference=None).get("offered", True):
            raise Failed("not offered")
        worker.ask("begin")
        worker.ask("run", seconds=0)
        bytes_taken: int = worker.ask("remember")["bytes"]
        return bytes_taken
    finally:
        worker.close()


def first_step(workload: Workload, threads: int, kernels: Path) -> float:
    """Seconds from the start of a process of ours to the end of its first training step; see `Worker` for kernels."""
    began = time.monotonic()
    worker = Worker(OURS.name, threads, kernels=kernels)
    try:
        worker.ask("prepare", kind="memory", sizes=workload.sizes, reference=None)
        worker.ask("first")
        return time.monotonic() - began
    finally:
        worker.close()
