"""A run in one compressed file: config.json and all finished folds, small enough to ship, read like a run folder.

    python -m npser.report bench/results/runs/cnn-emodb-s0.json.xz

JSON, compressed with xz: {"config": {...}, "folds": [{...}, ...]}. Probabilities are kept to seven digits, and nothing
else is left out, so that every figure of a report can be computed from it again.
"""

import json
import lzma
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from npser.errors import UserError
from npser.files import write_atomically
from npser.foldresult import FoldResult
from npser.recipes import completed
from npser.runfolder import RunFolder, config_fault

SUFFIX = ".json.xz"
_LARGEST = 1 << 26  # bytes that a file may unpack to


@dataclass(frozen=True)
class PackedRun:
    """A packed run, read: the part of `npser.runfolder.RunFolder` that reports need."""

    path: Path
    config: Mapping[str, Any]
    folds: tuple[FoldResult, ...]

    def load_folds(self) -> list[FoldResult]:
        """All finished folds, sorted by repeat and fold."""
        return list(self.folds)


Run = RunFolder | PackedRun


def open_run(path: Path | str) -> Run:
    """The run in a folder or in a packed file; UserError when it is neither or is damaged."""
    path = Path(path)
    return unpack(path) if os.path.isfile(path) else RunFolder.open(path)  # which answers for impossible names, too


def pack(config: Mapping[str, Any], results: Sequence[FoldResult], path: Path) -> None:
    """Write the file. UserError for a run that is too large for one, ValueError where shortened probabilities would
    change a decision."""
    folds = [json.loads(as_packed(r).to_json()) for r in sorted(results, key=lambda r: (r.repeat, r.fold))]
    text = json.dumps({"config": dict(config), "folds": folds}, separators=(",", ":"), allow_nan=False)
    content = text.encode("utf-8", "surrogateescape")
    if len(content) > _LARGEST:
        raise UserError(f"{path}: the run is too large for one file ({len(content)} bytes of JSON, at most {_LARGEST})")
    write_atomically(path, lzma.compress(content, preset=9))


def as_packed(result: FoldResult) -> FoldResult:
    """The fold with probabilities of seven digits; its constructor refuses one that contradicts its matrices."""
    utterances = tuple(
        replace(u, probabilities=tuple(float(f"{p:.7g}") for p in u.probabilities)) for u in result.utterances
    )
    return replace(result, utterances=utterances)


def unpack(path: Path) -> PackedRun:
    """Read a file that `pack` wrote; UserError, naming the file, when it is none."""
    try:
        with lzma.open(path) as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ValueError(f"it holds more than {_LARGEST} bytes")
        content = json.loads(text.decode("utf-8", "surrogateescape"))
        config, folds = content["config"], content["folds"]
        if fault := config_fault(config) if isinstance(config, dict) else "it holds no configuration":
            raise ValueError(fault)
        results = tuple(FoldResult.from_json(json.dumps(fold), path) for fold in folds)
        if any(list(result.labels) != config["labels"] for result in results):
            raise ValueError("its folds have other labels than its configuration")
    except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not a packed run that can be read ({' '.join(str(error).split())[:200]})") from error
    return PackedRun(path, completed(config), tuple(sorted(results, key=lambda r: (r.repeat, r.fold))))
