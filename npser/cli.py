"""What every command has in common: how it ends, and what it says of itself."""

import argparse
import ctypes
import errno
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, TextIO

from npser.errors import RunFailed, UserError, printable

_NOT_PRINTED = {errno.ENOSPC, errno.EIO, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # of standard output


class _Help(argparse.HelpFormatter):
    """Breaks lines between words alone, never at a hyphen of an option or a name; an indented line stays one."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent, **_WHOLE_WORDS)
            for line in re.sub(r"(?<=\S)\n(?=\S)", " ", text).splitlines()
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, **_WHOLE_WORDS)


_WHOLE_WORDS: Any = {"break_long_words": False, "break_on_hyphens": False}


class Parser(argparse.ArgumentParser):
    """An option parser that says what is wrong in one line, without repeating all options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _Help, **settings})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: {printable(message)} (--help tells the options)\n")


def count(number: int, plural: str) -> str:
    """1 file, 2 files."""
    return f"{number} {plural.removesuffix('s') if number == 1 else plural}"


def keep_memory() -> None:
    """Tell glibc's allocator to keep what is freed for the next array of that size.

    By default it gives every large block back to the system at once, and each page of the next one is fetched by a
    fault and cleared: a tenth of a training step of tdcnn. Does nothing where the C library is another one.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**30)


def run(command: str, main: Callable[[], int]) -> None:
    """Run a command to its exit status: 0 ok, 1 the run failed, 2 wrong use or bad input, 130 interrupted.

    SIGTERM, which batch systems send, is an interruption as Ctrl-C is: nothing half-written stays. A second one while
    the first is being answered changes nothing.
    """
    _on_signals(_interrupt)
    keep_memory()
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()  # closed by whoever started us
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    try:
        try:
            status = main()
            sys.stdout.flush()
        except Exception as error:
            if _interrupted.is_set():  # what was broken off has made another error of it: Python does, in a class
                raise KeyboardInterrupt from error
            raise
        finally:
            _on_signals(signal.SIG_IGN)  # the end is near: its message is not to be interrupted
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        status = 2
    except RunFailed as error:
        print(f"{command}: {error}", file=sys.stderr)
        status = 1
    except MemoryError as error:
        print(f"{command}: out of memory ({str(error) or 'of this process'}): take less at once", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        exec("")  # one that broke off an exec, as imports have, marks Python to end by SIGINT, whatever the status is
        print(f"{command}: interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        _drop_output()
        status = 0
    except OSError as error:
        if error.filename is not None or error.errno not in _NOT_PRINTED:
            raise
        _drop_output()
        print(f"{command}: standard output cannot be written ({error.strerror})", file=sys.stderr)
        status = 1
    sys.exit(status)


def _drop_output() -> None:
    """What is still to be printed goes nowhere, so that Python does not try once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _nowhere() -> TextIO:
    return open(os.devnull, "w")  # until the end


def _on_signals(handler: Any) -> None:
    """What SIGINT and SIGTERM do from now on; one that is ignored, as in a shell's background, stays so."""
    if threading.current_thread() is threading.main_thread():  # no other may say so
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)


_interrupted = threading.Event()


def _interrupt(number: int, frame: object) -> NoReturn:
    _on_signals(signal.SIG_IGN)
    _interrupted.set()
    raise KeyboardInterrupt


def answer_interruption() -> None:
    """Raise an interruption once more: what raises as Python destroys an object, or calls back, is dropped there.

    To be called now and then by work that lasts.
    """
    if _interrupted.is_set():
        raise KeyboardInterrupt


def whole(least: int, most: int = 2**63 - 1) -> Any:
    """An argparse type: a whole number, at least and at most so large."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number of at least {least}")
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"{text} is more than {most}")
        return int(text)

    return parse


def cores(wanted: int | None) -> int:
    """How many cores to use, those that --threads wants or all; UserError where there are fewer."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted is not None and wanted > available:
        raise UserError(f"--threads {wanted}: this machine has {count(available, 'cores')}: use at most so many")
    return wanted or available


def set_threads(wanted: int | None, backend: str) -> int:
    """Pin Numba, and (before NumPy is imported) the BLAS that it brings; returns the number of threads."""
    threads = cores(wanted)
    # The compiled kernels do without BLAS; a pool of its threads would only spin on the cores that they need.
    for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        os.environ[variable] = str(threads if backend == "reference" else 1)
    try:
        import numba

        numba.set_num_threads(threads)
    except ValueError as error:
        layer = os.environ.get("NUMBA_THREADING_LAYER")
        if layer and "threading layer" in str(error):
            raise UserError(f"NUMBA_THREADING_LAYER={layer}: Numba finds no such layer here: unset it") from None
        raise UserError(
            f"--threads {threads}: NUMBA_NUM_THREADS={os.environ.get('NUMBA_NUM_THREADS')} allows fewer: unset it"
        ) from None
    return threads


@contextmanager
def computing(backend: str, precision: str = "float32") -> Iterator[None]:
    """Asks for the GPU at once, if that is the backend; within, one that is not there or too small is a UserError."""
    if precision != "float32" and backend != "cuda":
        raise UserError(f"--precision {precision}: the {backend} has float32 only: add --backend cuda")
    import kernels

    try:
        if backend == "cuda":
            kernels.rung("cuda").settings.precision = precision
        yield
    except kernels.Unavailable as error:
        raise UserError(f"--backend {backend}: {error}") from error


@lru_cache
def versions() -> dict[str, Any]:
    """The program, its commit if it runs from a checkout, and the packages that compute.

    Asked once in a process, early: what is committed later is not what it runs.
    """

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    named = {package: of(package) for package in ("npser", "numpy", "numba", "numba-cuda", "scipy", "soundfile")}
    return {"python": platform.python_version(), **named, "commit": commit_of(Path(__file__).resolve().parent.parent)}


def commit_of(checkout: Path) -> str | None:
    """The checkout's commit, "-dirty" if anything but measured results was changed since; None without a checkout."""
    if not (checkout / ".git").exists():
        return None
    changed = ["status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results"]

    def git(arguments: list[str]) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git(["rev-parse", "--short=12", "HEAD"]) + ("-dirty" if git(changed) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> str:
    """The processor's name, as well as it can be told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"
