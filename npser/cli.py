"""What every command has in common: how it ends, and what it says of itself."""

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from npser.errors import RunFailed, UserError


class Parser(argparse.ArgumentParser):
    """An option parser that says what is wrong in one line, without repeating all options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: {message} (--help tells the options)\n")


def run(command: str, main: Callable[[], int]) -> None:
    """Run a command to its exit status: 0 ok, 1 the run failed, 2 wrong use or bad input, 130 interrupted."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        status = 2
    except RunFailed as error:
        print(f"{command}: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)


def versions() -> dict[str, Any]:
    """The program, its commit if it runs from a checkout, and the packages that compute."""

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    named = {package: of(package) for package in ("npser", "numpy", "numba", "numba-cuda", "scipy", "soundfile")}
    return {"python": platform.python_version(), **named, "commit": _commit()}


def _commit() -> str | None:
    """The commit of the checkout that this file lies in, "-dirty" if it was changed since; None outside of one."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    try:
        commit, status = (
            subprocess.run(["git", "-C", here, *args], capture_output=True, text=True, timeout=10, check=True).stdout
            for args in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("-dirty" if status.strip() else "")


def machine() -> str:
    """The processor's name, as well as it can be told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"
