"""From a corpus to the frames of all its utterances: read, transformed in parallel, and kept for the next start.

The cache lies in the user's cache folder, under a name that hashes whatever the frames depend on: the settings of
`npser.features`, the versions of the packages that compute, and the size and time of every audio file (for the built-in
corpus: the synthesiser itself). Nothing has to be deleted by hand when one of them changes.
"""

import contextlib
import hashlib
import json
import os
import secrets
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy
from numpy.typing import NDArray

import kernels
from npser import features, synthetic
from npser.audio import SAMPLE_RATE
from npser.corpus import Corpus, user_cache


def read_frames(corpus: Corpus, backend: str, threads: int = 1) -> list[NDArray[np.float32]]:
    """The log magnitudes (frames, 128) of every utterance, in the corpus' order.

    Raises UserError, naming the file, for a recording that cannot be used.
    """
    backend = features.transforming(backend)
    cache = user_cache() / f"frames-{_fingerprint(corpus, backend)}.npz"
    if (frames := _load(cache)) is not None:
        return frames
    k = kernels.rung(backend)
    with ThreadPoolExecutor(threads) as pool:
        work = pool.map(lambda utterance: features.log_magnitude(k, corpus.read(utterance)), corpus.utterances)
        frames = list(_shown(work, len(corpus.utterances)))
    _keep(cache, frames)
    return frames


def _fingerprint(corpus: Corpus, backend: str) -> str:
    inputs: list[object] = [features.FRAME, features.HOP, features.BINS, features.FLOOR, SAMPLE_RATE]
    inputs += [backend, np.__version__, scipy.__version__]
    if corpus.name == "demo":
        inputs.append(hashlib.sha256(Path(synthetic.__file__).read_bytes()).hexdigest())
        inputs.append([u.name for u in corpus.utterances])
    else:
        for utterance in corpus.utterances:
            status = os.stat(utterance.path)
            inputs.append([utterance.path, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]


def _shown(work: Iterator[NDArray[np.float32]], total: int) -> Iterator[NDArray[np.float32]]:
    """The results of `work`, counted on a live line where standard error is a terminal."""
    live = sys.stderr.isatty()
    for n, frames in enumerate(work, 1):
        if live and n % 10 == 0:
            print(f"\r\x1b[Kreading {n} of {total} recordings", end="", file=sys.stderr, flush=True)
        yield frames
    if live:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _load(cache: Path) -> list[NDArray[np.float32]] | None:
    """The frames kept there, or None where there are none that can be read."""
    try:
        with np.load(cache, allow_pickle=False) as file:
            return np.split(file["frames"], file["ends"][:-1])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _keep(cache: Path, frames: list[NDArray[np.float32]]) -> None:
    """Write the cache, whole or not at all. Where it cannot be written there is none: the next start reads again."""
    temporary = cache.with_name(f".{cache.name}.{secrets.token_hex(4)}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            np.savez(file, frames=np.concatenate(frames), ends=np.cumsum([len(f) for f in frames]))
        os.replace(temporary, cache)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
