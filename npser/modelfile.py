"""The model file: an npz archive of plain arrays, without pickle, that says itself what it is.

    about                    JSON text: format, arch, settings, labels, features, corpus, training, cross_validation
    params/<name>            one parameter, float32 or float16 (`npser.models` gives names and shapes)
    scale/mean, deviation    the feature statistics of the training data, (bins,) float32

A file is looked through before anything is allocated: the shapes that its settings ask for must be the shapes that it
holds, stored uncompressed, so that a file can never ask for more memory than its own size on disk.
"""

import json
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from npser import features
from npser.cli import count
from npser.errors import UserError
from npser.features import Standardisation
from npser.files import replacing

if TYPE_CHECKING:
    from npser.models import Model

FORMAT = 2  # 1 had neither features nor corpus nor cross_validation; it is still read
STORAGE = ("float32", "float16")
_CHUNK = 1 << 20  # entries that are converted at once
DAMAGE = (  # what reading an archive can raise that is none, or not ours
    *(OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError, MemoryError),
    *(OverflowError, RecursionError, SyntaxError, tokenize.TokenError, struct.error, zipfile.BadZipFile, zlib.error),
)


def feature_settings() -> dict[str, Any]:
    """The settings of `npser.features` that a model was trained with, and that its input must have."""
    return {"frame": features.FRAME, "hop": features.HOP, "bins": features.BINS, "floor": features.FLOOR}


def write(model: "Model", path: str | os.PathLike[str], storage: str = "float32") -> None:
    """Write the file, whole or not at all; parameters as float32 or as float16, which halves it and rounds to 11 bits.

    A float64 model is written as it is. OSError, or ValueError for another storage or where float16 cannot hold a
    parameter.
    """
    if storage not in STORAGE:
        raise ValueError(f"storage {storage!r}: choose one of {', '.join(STORAGE)}")
    about = {
        "format": FORMAT,
        "arch": model.arch,
        "settings": model.settings,
        "labels": list(model.labels),
        "features": feature_settings(),
        "corpus": model.training.get("corpus"),
        "training": dict(model.training),
        "cross_validation": model.cross_validation,
    }
    arrays: dict[str, Any] = {f"params/{name}": _stored(name, value, storage) for name, value in model.params.items()}
    if model.scale is not None:
        arrays |= {"scale/mean": model.scale.mean, "scale/deviation": model.scale.deviation}
    with replacing(Path(path)) as file:
        np.savez(file, about=np.array(json.dumps(about)), **arrays)


def _stored(name: str, value: NDArray[Any], storage: str) -> NDArray[Any]:
    if storage == "float32":
        return value
    with np.errstate(over="ignore"):
        half = value.astype(np.float16)
    if np.isinf(half).any() and np.isfinite(value).all():
        raise ValueError(f"{name} holds a value of {np.abs(value).max():g}, float16 ends at 65504")
    return half


Blank = Callable[[str, str, Mapping[str, Any]], "Model"]  # architecture, backend, settings -> parameters without values


def read(path: str | os.PathLike[str], backend: str, blank: Blank) -> "Model":
    """Read a file that `write` wrote. UserError, naming the file, when it is no such file or is damaged."""
    try:
        size = os.path.getsize(path)
        if not os.path.isfile(path) and not os.path.isdir(path):  # a pipe would be waited for
            raise ValueError("not a file")
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > size:
                raise ValueError("its contents are compressed, or claim to be larger than the file")
            return _model(archive, backend, blank)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: a folder, not a model file") from error
    except DAMAGE as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
        reason = " ".join(reason.split())[:200]
        raise UserError(f"{path}: not a model file that this program can read ({reason})") from error


def _model(archive: zipfile.ZipFile, backend: str, blank: Blank) -> "Model":
    """The model in the archive; any exception of DAMAGE where it is not one."""
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise ValueError("its members are compressed")
    about = json.loads(str(_array(archive, "about")))
    if about["format"] not in (1, FORMAT):
        raise ValueError(f"its format is {about['format']}, this program reads 1 to {FORMAT}")
    if about["format"] > 1 and about["features"] != feature_settings():
        raise ValueError(f"its features are {about['features']}, those of this program {feature_settings()}")
    settings, labels = about["settings"], about["labels"]
    for name in ("filters", "hidden", "bins", "classes"):
        if not isinstance(settings[name], int) or not 0 < settings[name] <= 1 << 16:
            raise ValueError(f"its setting {name} is {settings[name]}")
    if len(labels) != settings["classes"]:
        raise ValueError(f"it names {len(labels)} labels for {settings['classes']} classes")
    if len(set(labels)) != len(labels) or not all(isinstance(x, str) and x.isprintable() and x for x in labels):
        raise ValueError("its labels are not distinct printable names")
    members = {member.filename: member.file_size for member in archive.infolist()}
    for name, value in blank(about["arch"], "reference", settings).params.items():  # takes no memory
        if members[f"params/{name}.npy"] < 2 * value.size:  # float16, the least that it can be
            raise ValueError(f"{name} is smaller than its settings ask for")
    model = blank(about["arch"], backend, settings)
    for name, own in model.layers.params.items():
        value = model.arrays.asnumpy(own)  # the parameter itself, or its stand-in here while it is on a GPU
        with archive.open(f"params/{name}.npy") as file:
            _fill(name, value, file)
        model.arrays.assign(own, value)
    if "scale/mean.npy" in members:
        model.scale = _scale(archive, settings["bins"])
    model.labels, model.training = tuple(labels), dict(about["training"])
    model.cross_validation = _checked_score(about.get("cross_validation"))
    return model


def _checked_score(summary: Any) -> dict[str, Any] | None:
    if summary is None:
        return None
    if not isinstance(summary, dict) or not isinstance(summary.get("folds"), int):
        raise ValueError("its cross-validation score is none")
    if not isinstance(summary.get("uar"), float) or not math.isfinite(summary["uar"]):
        raise ValueError("its cross-validation score is not a number")
    return summary


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the head of an npy member: (shape, Fortran order, dtype)."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _fill(name: str, value: NDArray[Any], file: IO[bytes]) -> None:
    """Read a parameter into its place, a chunk at a time: no second copy of it is ever in memory."""
    shape, fortran, dtype = _header(file)
    if shape != value.shape or fortran:
        raise ValueError(f"{name} has shape {shape}, not {value.shape}")
    if dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"{name} holds {dtype}")
    flat = value.reshape(-1)
    for at in range(0, flat.size, _CHUNK):
        part = flat[at : at + _CHUNK]
        entries = np.frombuffer(file.read(part.size * dtype.itemsize), dtype)
        if entries.size != part.size:
            raise ValueError(f"{name} ends early")
        part[...] = entries
        if not np.isfinite(part).all():
            raise ValueError(f"a parameter is not finite: {name}")


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _scale(archive: zipfile.ZipFile, bins: int) -> Standardisation:
    mean, deviation = (_array(archive, f"scale/{name}").astype(np.float32) for name in ("mean", "deviation"))
    for name, value in (("mean", mean), ("deviation", deviation)):
        if value.shape != (bins,) or not np.isfinite(value).all():
            raise ValueError(f"its feature {name} is not {bins} finite numbers")
    if not (deviation > 0).all():
        raise ValueError("a feature deviation is not positive")
    return Standardisation(mean, deviation)


def score_of(summary: Mapping[str, Any] | None) -> str:
    """The measured score of a model's settings in words, for people."""
    if not summary:
        return "no cross-validation score"
    on = f"in cross-validation ({count(summary['folds'], 'folds')})"
    if summary.get("cv") == "split":
        on = "on a given test set"
    return f"UAR {100 * summary['uar']:.2f} % {on}"
