"""Where compiled kernels are kept between two runs."""

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from kernels import Unavailable


def cache_folder(sources: Iterable[Path], more: str = "") -> Path:
    """A folder per state of the source files, and of whatever `more` names, below the user's cache folder.

    NUMBA_CACHE_DIR says otherwise. The name hashes all sources that kernels are made of, so that a changed one never
    leaves a stale kernel behind. A read-only home falls back to the temporary folder.
    """
    state = hashlib.sha256(b"".join(source.read_bytes() for source in sources) + more.encode()).hexdigest()[:16]
    roots = [
        os.environ.get("NUMBA_CACHE_DIR"),
        os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "npser"),
        os.path.join(tempfile.gettempdir(), f"npser-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"),
    ]
    for root in filter(None, roots):
        if root.startswith("~"):  # nobody's home
            continue
        folder = Path(root).absolute() / f"kernels-{state}"
        try:
            if root == roots[-1] and not _ours(Path(root)):
                continue
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise Unavailable("no folder to keep compiled kernels in: set NUMBA_CACHE_DIR to a writable folder")


def _ours(folder: Path) -> bool:
    """Make a folder among those of other users, or see whether it is ours alone: compiled code is loaded from there."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    return not hasattr(os, "getuid") or (
        stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    )
