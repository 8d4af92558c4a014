"""From a corpus to the frames of all its utterances: read, transformed in parallel, and kept for the next start.

The cache lies in the user's cache folder, under a name that hashes whatever the frames depend on: the settings of
`npser.features`, the code and the versions of the packages that compute, and the size and time of every audio file (for
the built-in corpus: the synthesiser itself). Nothing has to be deleted by hand when one of them changes: frames that
nobody has used for UNUSED days are removed when others are kept.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy.signal import resample_poly

import kernels
from npser import features, synthetic
from npser.audio import SAMPLE_RATE
from npser.corpus import Corpus, user_cache
from npser.files import replacing, sweep
from npser.modelfile import DAMAGE

UNUSED = 60  # days
_CACHE_FILE = re.compile(r"frames-[0-9a-f]{32}\.npz")


def read_versions(
    corpus: Corpus, backend: str, threads: int, speeds: Sequence[float]
) -> list[list[NDArray[np.float32]]]:
    """The frames of every utterance as it is, then at each of the other speeds."""
    return [read_frames(corpus, backend, threads, speed) for speed in (1.0, *speeds)]


def read_frames(corpus: Corpus, backend: str, threads: int = 1, speed: float = 1.0) -> list[NDArray[np.float32]]:
    """The log magnitudes (frames, 128) of every utterance, in the corpus' order.

    speed: 1.1 plays the recordings faster by a tenth, pitch and formants higher as on a tape.

    Raises UserError, naming the file, for a recording that cannot be used.
    """
    backend = features.transforming(backend)
    cache = user_cache() / f"frames-{_fingerprint(corpus, backend, speed)}.npz"
    if (frames := _load(cache, len(corpus.utterances))) is not None:
        return frames
    k = kernels.rung(backend)
    with ThreadPoolExecutor(threads) as pool:
        work = pool.map(lambda u: features.log_magnitude(k, at_speed(corpus.read(u), speed)), corpus.utterances)
        frames = list(_shown(work, len(corpus.utterances)))
    _keep(cache, frames)
    return frames


def at_speed(samples: NDArray[np.float32], speed: float) -> NDArray[np.float32]:
    """The samples, fewer of them when they are played faster, at the same sample rate."""
    if speed == 1:
        return samples
    ratio = Fraction(speed).limit_denominator(100)
    made = resample_poly(samples, ratio.denominator, ratio.numerator).astype(np.float32)
    return np.pad(made, (0, max(features.FRAME - len(made), 0)))  # one frame at least


def _fingerprint(corpus: Corpus, backend: str, speed: float) -> str:
    inputs: list[object] = [features.FRAME, features.HOP, features.BINS, features.FLOOR, SAMPLE_RATE, speed]
    inputs += [backend, np.__version__, scipy.__version__, _decoder()]
    here, kernel = Path(__file__).parent, Path(kernels.__file__).parent
    sources = [Path(__file__), here / "audio.py", here / "features.py"]
    sources += [kernel / "reference.py", kernel / "cpu" / "stft.py"]
    inputs += [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources]
    if corpus.name == "demo":
        inputs.append(hashlib.sha256(Path(synthetic.__file__).read_bytes()).hexdigest())
        inputs.append([u.name for u in corpus.utterances])
    else:
        for utterance in corpus.utterances:
            inputs.append(utterance.path)
            with contextlib.suppress(OSError):  # reading it will say what is wrong
                status = os.stat(utterance.path)
                inputs.append([status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]


def _decoder() -> str:
    """What decodes audio files."""
    try:
        import soundfile
    except ImportError:
        return "scipy"
    return f"{soundfile.__version__} {soundfile.__libsndfile_version__}"


def _shown(work: Iterator[NDArray[np.float32]], total: int) -> Iterator[NDArray[np.float32]]:
    """The results of `work`, counted on a live line where standard error is a terminal."""
    live = sys.stderr.isatty()
    for n, frames in enumerate(work, 1):
        if live and n % 10 == 0:
            print(f"\r\x1b[Kreading {n} of {total} recordings", end="", file=sys.stderr, flush=True)
        yield frames
    if live:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _load(cache: Path, utterances: int) -> list[NDArray[np.float32]] | None:
    """The frames kept there, or None where there are none that can be read."""
    try:
        with cache.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            frames, ends = file["frames"], file["ends"]
        if frames.dtype != np.float32 or frames.shape != (ends[-1], features.BINS) or ends.shape != (utterances,):
            return None
        with contextlib.suppress(OSError):
            os.utime(cache)  # it is in use
        return np.split(frames, ends[:-1])
    except (*DAMAGE, IndexError):
        return None


def _keep(cache: Path, frames: list[NDArray[np.float32]]) -> None:
    """Write the cache, whole or not at all. Where it cannot be written there is none: the next start reads again."""
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        sweep(cache.parent, _CACHE_FILE, older_than=3600)  # others may be writing theirs
        for old in list(cache.parent.iterdir()):
            with contextlib.suppress(OSError):  # another one's, or gone already
                if _CACHE_FILE.fullmatch(old.name) and time.time() - old.stat().st_mtime > UNUSED * 24 * 3600:
                    old.unlink()
        with replacing(cache, to_disk=False) as file:
            np.savez(file, frames=np.concatenate(frames), ends=np.cumsum([len(f) for f in frames]))
