"""python -m bench: the command. See the package's docstring for what is measured, and how."""

import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from npser.cli import Parser, cores, machine, run, versions, whole
from npser.errors import RunFailed, UserError

TIMED = ("kernels", "train", "infer")  # sections that are compared with peers
SECTIONS = (*TIMED, "growth", "all")
PACKAGES = ("torch", "jax", "onnxruntime")


def parser() -> Parser:
    from bench.peers import CANDIDATES, CUDA_CANDIDATES, OURS

    peers = list(dict.fromkeys(c.name for c in (*CANDIDATES, *CUDA_CANDIDATES) if c.name != OURS.name))
    p = Parser(prog="python -m bench", description="How fast the kernels are, beside PyTorch, JAX and ONNX Runtime.")
    p.add_argument("section", nargs="?", choices=SECTIONS, default="all", help="what to time (default: all)")
    p.add_argument("--quick", action="store_true", help="about a minute: a few rows at batch 32, few rounds")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    p.add_argument(
        "--rows",
        metavar="TEXT",
        action="append",
        default=[],
        help="only the rows whose title holds TEXT from a word's beginning on, such as 'B 32'; may be repeated",
    )
    p.add_argument(
        "--without",
        metavar="NAME",
        action="append",
        default=[],
        choices=peers,
        help=f"leave out a candidate; may be repeated: {', '.join(peers)}",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured to FILE, too")
    p.add_argument("--threads", type=whole(1), metavar="N", help="threads of every candidate (default: all cores)")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    # This process only waits, and reads recordings before the clock runs: NumPy needs no threads of its own here.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    threads = cores(options.threads)
    if options.json:
        _check_writable(options.json)
    if options.section == "growth" and (options.quick or options.device != "cpu"):
        raise UserError("growth: has no short form, and is measured on the cpu alone: leave --quick and --device away")
    if options.device == "cuda":
        _require_gpu()

    from bench.race import Failed

    this = Run(shlex.join(["python", "-m", "bench", *arguments]), options, threads)
    try:
        with tempfile.TemporaryDirectory(prefix="npser-bench-") as folder:
            this.everything(Path(folder))
        this.complete = True
    except Failed as failure:
        raise RunFailed(str(failure)) from failure
    finally:
        this.write_json()
    return 1 if this.faulty else 0


def _require_gpu() -> None:
    """UserError, one line, without a GPU; the simulator is none."""
    import kernels

    try:
        kernels.rung("cuda")
    except kernels.Unavailable as error:
        raise UserError(f"--device cuda: {error}") from error


def _gpu() -> str:
    from kernels.cuda import device_name

    return device_name()


def _check_writable(path: Path) -> None:
    """Better now than after an hour."""
    try:
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from error


class Progress:
    """Rows done and time left, on standard error.

    A row is taken to last so many times as long as its operations would at the machine's peak, and a constant on top;
    how long that really is, is learned from the rows that are done.
    """

    CONSTANT, FACTOR = 8.0, 100.0

    def __init__(self, peak: float) -> None:
        self.peak = peak
        self.started = time.monotonic()
        self.total = self.done = 0.0
        self.rows = self.rows_done = 0

    def weight(self, operations: float) -> float:
        return self.CONSTANT + self.FACTOR * operations / self.peak

    def expect(self, operations: Iterable[float]) -> None:
        for each in operations:
            self.total += self.weight(each)
            self.rows += 1

    def row_done(self, operations: float) -> None:
        from npser.progress import duration

        self.done += self.weight(operations)
        self.rows_done += 1
        left = (self.total - self.done) * (time.monotonic() - self.started) / self.done
        print(f"{self.rows_done} of {self.rows} rows, about {duration(left)} left", file=sys.stderr, flush=True)


class Run:
    """One run of the command: prints as it goes, and gathers what --json writes."""

    def __init__(self, command: str, options: Any, threads: int) -> None:
        self.command, self.options, self.threads = command, options, threads
        self.rows: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []
        self.starts: list[dict[str, Any]] = []
        self.growth: dict[str, dict[str, float | None]] = {}
        self.absent: dict[str, str] = {}
        self.about: dict[str, Any] = {}
        self.peaks: dict[str, float] = {}
        self.complete = self.faulty = False

    @property
    def sections(self) -> tuple[str, ...]:
        return TIMED if self.options.section == "all" else tuple(s for s in TIMED if s == self.options.section)

    def everything(self, folder: Path) -> None:
        from bench import peers

        self.introduce()
        wanted = {c for section in self.sections for c in self._candidates(section)}
        for candidate in peers.ON_DEVICE[self.options.device]:
            if candidate in wanted:
                missing = candidate.missing()
                state = f"absent: {', '.join(missing)} not installed (pip install 'npser[bench]')" if missing else ""
                print(f"  {candidate.name:14} {state or candidate.what}")
                if missing:
                    self.absent[candidate.name] = state
        print("times in ms; the columns are explained in bench/__init__.py\n", flush=True)

        work = {section: [w for w in self._workloads(section, folder) if self._wanted(w)] for section in self.sections}
        on_cpu = self.options.device == "cpu"
        growth = self.options.section in ("all", "growth") and not self.options.quick and on_cpu
        grown = [each for each in self._growth(folder) if self._wanted(each[2])] if growth else []
        if not any(work.values()) and not grown:
            raise UserError(f"--rows {' '.join(self.options.rows)}: no row has that in its title")
        self.progress = Progress(self.peaks["flops"])
        self.progress.expect(w.operations for workloads in work.values() for w in workloads)
        self.progress.expect(w.operations for _, _, w, _ in grown)
        for section, workloads in work.items():
            if workloads:
                self.time_section(section, workloads, folder)
            if section == "train" and not self.options.quick and on_cpu:
                self.measure_memory()
                self.measure_starts(folder)
        if grown:
            self.time_growth(grown, folder)

    def _wanted(self, workload: Any) -> bool:
        rows = self.options.rows
        return not rows or any(re.search(rf"(?<!\w){re.escape(text)}", workload.title) for text in rows)

    def introduce(self) -> None:
        """The machine, the programs, and what the machine can do."""
        found: dict[str, Any] = {name: value for name, value in versions().items() if value}
        for package in PACKAGES:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        where = machine() if self.options.device == "cpu" else f"{_gpu()}; {machine()}"
        print(f"{self.command}\n{where}; {self.threads} threads; {now}")
        print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
        self.peaks = self.measure_machine()
        print(
            f"measured peaks: {self.peaks['flops'] / 1e9:.0f} GFLOP/s of multiply-adds; memory "
            f"{self.peaks['read'] / 1e9:.1f} GB/s read, {self.peaks['update'] / 1e9:.1f} GB/s read and written"
        )
        about = {"command": self.command, "machine": where, "threads": self.threads, "date": now}
        self.about = about | {"versions": found}

    def measure_machine(self) -> dict[str, float]:
        """See `bench.machine.measure`; in a process of its own, with our threads."""
        from bench.race import Worker

        worker = Worker("npser", self.threads, self.options.device)
        try:
            return worker.ask("peaks")
        finally:
            worker.close()

    def _candidates(self, section: str) -> list[Any]:
        from bench import suites

        return [
            c
            for c in suites.candidates(section, self.options.quick, self.options.device)
            if c.name not in self.options.without
        ]

    def _workloads(self, section: str, folder: Path) -> Iterable[Any]:
        from bench import suites, workloads

        quick = self.options.quick
        if section == "kernels":
            return suites.kernels(quick)
        trained = None if quick or self.options.device != "cpu" else folder / "trained.npz"
        if trained and not trained.exists():
            print(f"training convolutions for {workloads.UPDATES} updates ...", file=sys.stderr, flush=True)
            workloads.train_convolutions(trained)
        if section == "train":
            return suites.train(quick, trained)
        if self.options.device != "cpu":
            return suites.infer(quick, trained, folder, folder, "", self.options.device)
        few, corpus = folder / "utterances.npz", folder / "corpus.npz"
        name = "emodb" if os.environ.get("NPSER_DATA") else "demo"
        if not quick:
            print(f"reading the corpus {name} ...", file=sys.stderr, flush=True)
            workloads.record(few, "demo", suites.UTTERANCES)
            workloads.record(corpus, name, None)
        return suites.infer(quick, trained, few, corpus, name)

    def _growth(self, folder: Path) -> Iterable[tuple[str, str, Any, int]]:
        """(series, point, workload, threads) of what the other sections do not time anyhow."""
        from bench import suites, workloads

        few = folder / "utterances.npz"
        if not few.exists():
            workloads.record(few, "demo", suites.UTTERANCES)
        for series, point, workload in suites.growth(folder, few):
            yield series, point, workload, self.threads
        for workload in suites.threaded():
            for threads in range(1, self.threads + 1):
                yield f"{workload.title}, against threads", str(threads), workload, threads

    def time_section(self, section: str, workloads: Sequence[Any], folder: Path) -> None:
        from bench.race import Race
        from bench.tables import Table

        columns = [c for c in self._candidates(section) if not c.missing()]
        table = Table(columns, self.peaks)
        print(table.head(section), flush=True)
        with Race(columns, self.threads, self._pace(), folder, self.options.device) as race:
            for workload in workloads:
                self._keep(race.run(section, workload), table)
        print(flush=True)

    def _keep(self, row: Any, table: Any) -> None:
        print(table.line(row), flush=True)
        self.rows.append(row.as_json())
        self.faulty |= row.faulty
        self.progress.row_done(row.workload.operations)
        self.write_json()  # a run that is killed keeps its rows

    def measure_memory(self) -> None:
        from bench import suites
        from bench.race import Failed, peak_memory
        from bench.tables import memory_line

        rows = [workload for workload in suites.memory() if self._wanted(workload)]
        if rows:
            print("peak memory of a fresh process, MB")
        for workload in rows:
            megabytes: dict[str, float | None] = {}
            troubles = {}
            for candidate in suites.MEMORY:
                if candidate.missing() or candidate.name in self.options.without:
                    continue
                try:
                    megabytes[candidate.name] = peak_memory(candidate, workload, self.threads) / 1e6
                except Failed as failure:
                    megabytes[candidate.name], troubles[candidate.name] = None, str(failure)
            print(memory_line(workload.title, megabytes, troubles), flush=True)
            self.memory.append({"title": workload.title, "megabytes": megabytes, "troubles": troubles})
        print(flush=True)

    def measure_starts(self, folder: Path) -> None:
        from bench import suites
        from bench.race import first_step
        from bench.tables import start_line

        rows = [workload for workload in suites.memory() if self._wanted(workload)]
        if rows:
            print("from the start of a process to the end of its first training step, s")
        for workload in rows:
            kernels = folder / f"kernels of {workload.title}"
            cold, warm = (first_step(workload, self.threads, kernels) for _ in range(2))
            print(start_line(workload.title, cold, warm), flush=True)
            self.starts.append({"title": workload.title, "cold": cold, "warm": warm})
        print(flush=True)

    def time_growth(self, grown: Sequence[tuple[str, str, Any, int]], folder: Path) -> None:
        """The growth table: our times against batch (measured already), width, windows and threads."""
        from bench import suites
        from bench.peers import OURS
        from bench.race import Race
        from bench.tables import growth_line

        print("growth of our own times, ms")
        for done in self.rows:
            if done["kind"] in ("train", "infer") and "trained" not in done["sizes"]:
                series = done["title"].split(", B")[0] + ", against batch"
                ours = done["candidates"].get(OURS.name)
                self.growth.setdefault(series, {})[str(done["sizes"]["B"])] = ours["median"] if ours else None
        for series, points in self.growth.items():
            print(growth_line(series, points), flush=True)
        numbers = sorted({threads for *_, threads in grown})
        for threads in numbers:
            with Race(suites.COLUMNS["growth"], threads, self._pace(), folder) as race:
                for series, point, workload, _ in (each for each in grown if each[3] == threads):
                    row = race.run("growth", workload)
                    self.growth.setdefault(series, {})[point] = row.seconds(OURS.name)
                    self.faulty |= row.faulty
                    self.progress.row_done(workload.operations)
        for series in dict.fromkeys(series for series, *_ in grown):
            print(growth_line(series, dict(sorted(self.growth[series].items(), key=lambda p: int(p[0])))), flush=True)

    def _pace(self) -> Any:
        from bench.race import Pace

        if self.options.quick:
            return Pace(turn=0.15, row=0.0)
        return Pace() if self.options.device == "cpu" else Pace(turn=0.1, row=4.0)  # a GPU is its candidate's alone

    def write_json(self) -> None:
        """Whatever has been measured, also when the run was ended early."""
        if not self.options.json or not self.about:
            return
        from npser.files import write_atomically

        everything = {
            **self.about,
            "complete": self.complete,
            "peaks": self.peaks,
            "absent": self.absent,
            "rows": self.rows,
            "memory": self.memory,
            "starts": self.starts,
            "growth": self.growth,
        }
        write_atomically(self.options.json, json.dumps(everything, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    run("bench", main)
