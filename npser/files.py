"""Files that are written whole or not at all, and what a killed program leaves of them.

Everything is written into a temporary file beside its place, hidden and never mistaken for a result, and renamed over
it. A program that is killed in between cannot remove that file; `sweep` does, for whoever may write the same file next.
"""

import contextlib
import errno
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from npser.errors import RunFailed, UserError

_FULL_DISK = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NOT_WRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")


@contextmanager
def replacing(path: Path, to_disk: bool = True) -> Iterator[IO[bytes]]:
    """A file to write into; at the end it takes the place of `path`, and after any exception it is gone. OSError.

    to_disk: wait until the bytes are on the disk, so that a power failure, too, leaves the old file or the new one.
    """
    path = Path(os.path.realpath(path))  # a link is kept, and what it leads to replaced
    if path.exists() and not path.is_file():  # a device would be renamed over, too
        raise FileExistsError(errno.EEXIST, "what is there is not a file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            if to_disk:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # KeyboardInterrupt too
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sweep(folder: Path, pattern: re.Pattern[str], older_than: float = 0.0) -> None:
    """Remove the temporary files that a killed program left in a folder; other files are not touched.

    pattern: of the names of the files that were to be written. The caller knows that nobody else is writing one of
    them, or leaves those alone that were written to within the last `older_than` seconds.
    """
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            match = _TEMPORARY.fullmatch(entry.name)
            if match and pattern.fullmatch(match[1]):
                with contextlib.suppress(OSError):
                    if entry.is_file(follow_symlinks=False) and time.time() - entry.stat().st_mtime >= older_than:
                        os.unlink(entry.path)


def require_place(path: Path, what: str) -> None:
    """UserError, beginning with `what`, unless a file can be written there: better now than after hours."""
    place = os.path.realpath(path)  # where a link leads to
    folder, name = os.path.split(place)
    if len(os.fsencode(name)) > 200:  # with what is added to it until the file is whole
        raise UserError(f"{what}: too long a name: use at most 200 bytes")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"{what}: the folder {folder} is not there or cannot be written to")
    if os.path.exists(place) and not os.path.isfile(place):
        raise UserError(f"{what}: is there, and is no file: name another")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all (`replacing`), to the disk.

    Text is written as UTF-8; file names that are not valid UTF-8 (Python's surrogate escapes) keep their bytes.

    Raises RunFailed when the disk is full or fails, UserError when the place cannot be written to.
    """
    data = content.encode("utf-8", errors="surrogateescape") if isinstance(content, str) else content
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise explained(path, error) from error


def explained(path: Path, error: OSError) -> UserError | RunFailed:
    """An operating-system error while writing, as the project's one line."""
    reason = error.strerror or str(error)
    if error.errno in _FULL_DISK:
        return RunFailed(f"{path}: {reason}: free some space and run the same command again to resume")
    if error.errno == errno.ENOENT and not path.parent.is_dir():
        return RunFailed(f"{path}: cannot be written, its folder is gone: run the same command again")
    if error.errno in _NOT_WRITABLE:
        return UserError(f"{path}: cannot be written ({reason}): choose another place with --out")
    return RunFailed(f"{path}: cannot be written ({reason})")
