"""Who is at work in a run folder: two programs must not compute the same folds in it at once.

The file `.lock` in the folder is empty, and its presence says nothing. A program at work holds locks of the operating
system on bytes of it (they need not exist), one byte for each fold; the system drops them when the program ends, by
whatever death, so that a stale lock cannot be.

    byte 0                     what all share: config.json, predictions.csv, report.md; waited for
    byte 1 + 65536 * R + F     fold F of repeat R, computed alone (--only)
    all bytes from 1 on        the whole run

So a second whole run is refused, and so is --only beside a whole run, or for a fold that another --only is computing;
different folds in one folder go together.
"""

import errno
import os
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from npser.errors import UserError

_fcntl: Any = import_module("fcntl") if os.name == "posix" else None  # elsewhere nothing is refused
_PATIENCE = 60.0  # seconds that the tables are waited for: whoever holds them writes two small files


@contextmanager
def alone(folder: Path, waiting: str) -> Iterator[None]:
    """Within, no other process holds the folder's lock; `waiting` is said where one does, and its end is waited for.

    Where the system or the file system knows no locks, nobody waits.
    """
    if _fcntl is None:
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            _fcntl.flock(opened, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                print(waiting, file=sys.stderr, flush=True)
                _fcntl.flock(opened, _fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


class Lock:
    """The locks of this process in one folder, until it is garbage or the process ends. One for a folder at a time."""

    def __init__(self, folder: Path, only: tuple[int, int] | None) -> None:
        """Lock the whole run, or the fold `only`. UserError when another program is at it; OSError."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        self._file = os.open(folder / ".lock", flags, 0o666)
        weakref.finalize(self, os.close, self._file)
        self._works = _fcntl is not None
        start, length = (1, 0) if only is None else (1 + (only[0] << 16) + only[1], 1)  # 0: to the end of all bytes
        if not self._take(start, length):
            what = "folds of this run" if only is None else f"fold {only[0]}.{only[1]} or the whole run"
            raise UserError(
                f"{folder}: another npser.train is computing {what} there: wait until it ends, or use another --out"
            )

    def _take(self, start: int, length: int) -> bool:
        """Whether the bytes are ours now."""
        if not self._works:
            return True
        try:
            _fcntl.lockf(self._file, _fcntl.LOCK_EX | _fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            self._works = False
            print(f"no locks on this file system ({error.strerror}): nothing refuses a second run", file=sys.stderr)
        return True

    @contextmanager
    def shared_files(self) -> Iterator[None]:
        """Within, nobody else writes the files that all have in common."""
        deadline = time.monotonic() + _PATIENCE
        while not self._take(0, 1) and time.monotonic() < deadline:
            time.sleep(0.02)
        try:
            yield
        finally:
            if self._works:
                _fcntl.lockf(self._file, _fcntl.LOCK_UN, 1, 0)
