"""The folds of a cross-validation in several processes, here or on other machines: they are independent of each other.

`run_folds` hands folds to any `concurrent.futures.Executor` and saves what comes back here, in the process that owns
the run folder. A fold is a function of corpus, settings and seed alone: where it is computed changes nothing. (But
a processor of another kind may round otherwise: `Maker._orthogonal` in `npser.models`, `shortened` in `kernels.host`,
`matmul_transposed` in `kernels.cpu.sparse`.)
"""

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

from npser.cli import count, keep_memory
from npser.errors import RunFailed, UserError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from npser.corpus import Corpus
    from npser.crossval import Versions
    from npser.foldresult import FoldResult
    from npser.runfolder import RunFolder

LOST = 3  # times that a worker may die before the run gives up
LOOK_EVERY = 5.0  # seconds between two looks at whether a cluster has workers, and whether the run is interrupted


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs to compute a fold: plain values, so that it can be sent anywhere."""

    data: str  # --data and --test-data
    test_data: str | None
    config: Mapping[str, Any]  # config.json
    repeat: int
    fold: int
    checkpoint: str | None  # where the state of the unfinished fold is kept, None for nowhere
    about: Mapping[str, Any]  # recorded with the fold
    threads: int | None = None  # None for all that the worker has

    @property
    def name(self) -> str:
        return f"{self.repeat}.{self.fold}"


def compute(job: Job) -> "FoldResult":
    """Compute a fold, in a worker. RunFailed when the training diverges, UserError when its corpus is another one."""
    from npser.cli import computing, set_threads, versions

    config = job.config
    threads = set_threads(job.threads, config["backend"])
    from pathlib import Path

    from npser.crossval import make_folds, train_and_test
    from npser.progress import Silent
    from npser.runconfig import machine_of, settings_of

    with computing(config["backend"], config["precision"]):
        listing = config["utterances_sha256"], config["audio_sha256"]
        speeds = tuple(config["training"]["speeds"])
        corpus, spoken = _corpus(job.data, job.test_data, *listing, config["backend"], threads, speeds)
        folds = make_folds(corpus, config["cv"], config["folds"], config["repeats"], config["seed"])
        fold = next(fold for fold in folds if (fold.repeat, fold.number) == (job.repeat, job.fold))
        silent = Silent()
        silent.begin_fold(f"fold {job.name}", 0)
        path = Path(job.checkpoint) if job.checkpoint else None
        here = {"machine": machine_of(config), "threads": threads, "versions": versions()}
        return train_and_test(corpus, spoken, fold, settings_of(config), silent, path, {**job.about, **here})


@lru_cache(maxsize=1)
def _corpus(
    data: str, test_data: str | None, listing: str, audio: str, backend: str, threads: int, speeds: tuple[float, ...]
) -> "tuple[Corpus, Versions]":
    """The corpus and its frames, kept from one fold to the next, not from one run to another with other recordings."""
    from npser.corpus import cross_corpus, open_corpus
    from npser.frontend import read_versions
    from npser.runconfig import audio_sha256, listing_sha256

    corpus = open_corpus(data)
    if test_data:
        corpus = cross_corpus(corpus, open_corpus(test_data, "--test-data"))
    if listing_sha256(corpus) != listing:
        raise UserError(f"--data {data}: the worker finds other utterances there than this machine")
    if audio_sha256(corpus) != audio:
        raise UserError(f"--data {data}: the worker finds other recordings there, under the same names")
    return corpus, read_versions(corpus, backend, threads, speeds)


def run_folds(
    executor: Executor,
    jobs: Iterable[Job],
    folder: "RunFolder",
    at_once: Callable[[], int],
    total: int | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Compute the folds, at most `at_once()` of them at a time, and save each as soon as it is there.

    Whatever a fold raises is raised here, once those that are being computed are finished and kept; no other is begun.
    total: how many there were in the beginning, for the lines that count them (default: these); meanwhile: called
    every LOOK_EVERY seconds in which no fold is done.
    """
    waiting = list(jobs)
    total, running = total or len(waiting), dict[Future[Any], Job]()
    kept = total - len(waiting)
    failure: BaseException | None = None
    try:
        while running or (waiting and failure is None):
            # While none is at work, nobody is asked: it takes a fold to notice that a cluster is gone.
            while waiting and failure is None and (not running or len(running) < at_once()):
                job = waiting.pop(0)
                running[executor.submit(compute, job)] = job
            # Never for longer: where another thread was given a signal, as happens in a run that was stopped (Ctrl-Z),
            # Python tells this one only when it wakes.
            done, _ = wait(running, LOOK_EVERY, return_when=FIRST_COMPLETED)
            if meanwhile and not done:
                meanwhile()
            for future in done:
                job = running.pop(future)
                if error := _failure(future):
                    if failure is None and running and isinstance(error, UserError | RunFailed):
                        others = f"{count(len(running), 'folds')} at work {'is' if len(running) == 1 else 'are'}"
                        _say(f"fold {job.name} failed; {others} finished first")
                    failure = failure or error
                    continue
                result = future.result()
                folder.save_fold(result)
                kept += 1
                last = f", training loss {result.epochs[-1].loss:.4f}" if result.epochs else ""
                took = f" in {result.run['seconds']:.0f} s" if "seconds" in result.run else ""
                _say(f"fold {job.name} done{took}{last}; {kept} of {total}")
    finally:
        for future in running:
            future.cancel()
    if failure is not None:
        raise failure


def _failure(future: "Future[Any]") -> BaseException | None:
    """What a fold that is done has raised; None where it has a result."""
    try:
        return future.exception()
    except CancelledError as error:
        return error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_locally(
    jobs: Iterable[Job],
    folder: "RunFolder",
    workers: int,
    make: "Callable[[int], AbstractContextManager[Executor]] | None" = None,
) -> None:
    """`run_folds` in processes of this machine; when one dies, the folds that are not finished start again.

    make: a pool of so many workers (default: spawned processes).
    """
    left = list(jobs)
    total = len(left)
    _announce(total, min(workers, len(left)), "this machine")
    for _ in range(LOST):
        try:
            with (make or spawned)(min(workers, len(left))) as executor:
                run_folds(executor, left, folder, lambda: workers, total)
            return
        except BrokenProcessPool:  # a dead process takes its pool along
            _say("a worker died (killed, or out of memory): unfinished folds start again")
            finished = set(folder.finished())
            left = [job for job in left if (job.repeat, job.fold) not in finished]
    raise RunFailed(f"workers died {LOST} times: use fewer --workers; the finished folds are kept")


def _announce(folds: int, workers: int, where: str) -> None:
    """The first line, because minutes may pass before the next."""
    done_by = f"{count(folds, 'folds')} for {count(workers, 'workers')} on {where}"
    _say(f"{done_by}; a line for each that is done")


@contextmanager
def _without_interruption() -> Iterator[None]:
    """Ctrl-C waits until the end of this; processes that are started meanwhile never hear of one.

    A terminal sends it to them, too, and Python would print tracebacks until the first lines of ours are reached there.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # started with the first process otherwise, which unblocks the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Pool(ProcessPoolExecutor):
    """Its processes, which a task starts where none is idle, never hear of Ctrl-C."""

    def submit(self, *call: Any, **named: Any) -> Future[Any]:
        with _without_interruption():
            return super().submit(*call, **named)


@contextmanager
def spawned(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Spawned processes, never forked ones: GNU OpenMP aborts in a forked child's first parallel region.

    They end with this process, whatever ends it, and at once when the run is interrupted or fails: nobody would take
    what they still compute.
    """
    context = multiprocessing.get_context("spawn")
    listener, lifeline = context.Pipe(duplex=False)
    with listener, lifeline, _Pool(workers, context, _end_with_parent, (listener,)) as executor:
        try:
            yield executor
        except BaseException:
            lifeline.close()
            raise


def _end_with_parent(listener: "Connection") -> None:
    """In a worker: a thread waits for the end of the pipe, whose other side only the parent holds, and exits then.

    A worker of a killed parent would wait for work for ever, and write checkpoints beside the run that is resumed.
    Ctrl-C reaches all processes of a terminal; the parent answers it for all.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it could not be blocked before the start
    keep_memory()

    def wait_for_the_end() -> None:
        with contextlib.suppress(EOFError, OSError):
            listener.recv()
        os._exit(1)

    threading.Thread(target=wait_for_the_end, daemon=True).start()


def run_on_dask(jobs: Iterable[Job], folder: "RunFolder", address: str) -> None:
    """`run_folds` on the workers of a dask.distributed scheduler; a fold whose worker is lost goes to another one.

    UserError when no scheduler answers or its workers cannot be used, RunFailed when the scheduler is lost.
    """
    try:
        from distributed import Client, KilledWorker, Security
        from distributed.client import ClosedClientError
        from distributed.comm import connect
    except ImportError as error:
        raise UserError("--dask: needs dask.distributed: pip install 'npser[dask]'") from error

    def finds_npser() -> bool:  # goes to the workers as code, because its name would need npser there
        from importlib.util import find_spec

        return find_spec("npser") is not None

    async def knock() -> None:
        comm = await connect(address, timeout=10, **Security().get_connection_args("client"))
        comm.abort()

    for logger in ("distributed", "distributed.client"):  # what they would log is said below, in one line
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    try:
        asyncio.run(knock())  # a Client that finds nobody prints tracebacks of its own as it goes
        client = Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--dask {address}: no scheduler answers there ({' '.join(str(error).split())})") from error
    with client:
        threads = client.nthreads().values()
        if not threads:
            raise UserError(f"--dask {address}: no worker is connected: dask worker --nthreads 1 {address}")
        if max(threads) > 1:  # the kernels run threads of their own, and must not be called from several at once
            raise UserError(f"--dask {address}: workers must compute one fold at a time: start them with --nthreads 1")
        if bare := [worker for worker, found in client.run(finds_npser).items() if not found]:
            raise UserError(f"--dask {address}: the worker {bare[0]} has no npser: install it there")
        jobs = [replace(job, about={**job.about, "workers": len(threads)}) for job in jobs]
        _announce(len(jobs), len(threads), address)
        deserted = False

        def look() -> None:
            nonlocal deserted
            with contextlib.suppress(Exception):  # where the scheduler is gone, too, the folds will say so
                before, deserted = deserted, not client.nthreads()
                if deserted and not before:
                    _say(f"no worker is left on {address}: waiting for another one (Ctrl-C ends the run)")

        def workers() -> int:
            try:
                return max(1, len(client.nthreads()))
            except Exception:  # the scheduler is gone: the folds will say so
                return 1

        try:
            run_folds(client.get_executor(pure=False), jobs, folder, workers, meanwhile=look)
        except KilledWorker as error:
            raise RunFailed("--dask: a fold lost its worker several times; the finished folds are kept") from error
        except (CancelledError, ClosedClientError) as error:
            raise RunFailed(
                f"--dask {address}: the scheduler is gone; the finished folds are kept, the same command goes on"
            ) from error
