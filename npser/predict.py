"""python -m npser.predict: recordings -> an emotion and its probability for each.

A recording's probabilities are the mean over its windows (the vote by the sum), as in cross-validation. Several
networks of one kind can decide together: a window's probabilities are the mean of theirs then.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npser.cli import Parser, answer_interruption, computing, count, run, set_threads, whole
from npser.errors import RunFailed, UserError, printable
from npser.verdicts import CSV, JSONLines, Live, Segment, Table, Writer

if TYPE_CHECKING:
    from npser.models import Model


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m npser.predict",
        description="Tell the emotion of recordings with a trained network: for each file the most probable emotion, "
        "its probability and the runners-up. Any sample rate (but below 16 kHz the high frequencies are missing that a "
        "model has learned from), number of channels and length; wav, flac, ogg, mp3 and whatever else libsndfile "
        "reads.",
        epilog="A file that cannot be used gets one line on standard error, the others are labelled, and the exit "
        "status is 2. Examples, the first of which makes a model:\n"
        "  python -m npser.train --arch lstm --data emodb --cv none --save model.npz\n"
        "  python -m npser.predict model.npz call.mp3\n"
        "  python -m npser.predict model.npz recordings/ --csv > labels.csv\n"
        "  ffmpeg -i film.mkv -f wav - | python -m npser.predict model.npz - --timeline",
    )
    p.add_argument("model", metavar="MODEL.npz", type=Path, help="a model that npser.train saved")
    p.add_argument(
        "inputs",
        metavar="FILE_OR_FOLDER",
        nargs="+",
        help="audio files; folders, searched recursively for audio; - for standard input",
    )
    p.add_argument(
        "--with",
        dest="others",
        action="append",
        default=[],
        type=Path,
        metavar="MODEL.npz",
        help="another model of the same kind, of another --seed for one, to decide together with: their probabilities "
        "are averaged over the windows of MODEL.npz. May be repeated",
    )
    what = p.add_argument_group("what is printed")
    form = what.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="one JSON object a line: file, label, probabilities {emotion: p}"
    )
    form.add_argument("--csv", action="store_true", help="columns file, label, p_<emotion> ... in the model's order")
    what.add_argument(
        "--timeline",
        action="store_true",
        help="the emotion over time: a line for each window, with its start and end in seconds, instead of one for "
        "the file (a table ends with the file's line all the same)",
    )
    what.add_argument(
        "--verbose", action="store_true", help="tell on standard error what the model is and how fast it was"
    )
    how = p.add_argument_group("how it is computed")
    how.add_argument(
        "--segment-hop",
        type=whole(1),
        metavar="N",
        help="frames (8 ms) from one window to the next (default: as in the first model's training)",
    )
    how.add_argument(
        "--backend",
        default="cpu",
        choices=("cpu", "reference", "cuda"),
        help="what computes; see npser.train (default: cpu)",
    )
    how.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "tf32"),
        help="of large matrix products with --backend cuda; see npser.train (default: float32)",
    )
    how.add_argument("--threads", type=whole(1), metavar="N", help="processor cores to use (default: all)")
    return p


# --- what is to be scored ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """A recording by the name that it is reported under, and the file to read."""

    name: str
    path: str


def find_inputs(arguments: Sequence[str], spool: Path) -> Iterator[Input | UserError]:
    """The recordings that the arguments name, folders in sorted order; an error in the place of what is not there.

    Standard input is written to `spool`, because a recording is read twice.
    """
    from npser.corpus import audio_names

    for argument in arguments:
        if argument == "-":
            if sys.stdin is None:
                yield UserError("-: there is no standard input: it is closed")
                continue
            try:
                with spool.open("wb") as file:
                    shutil.copyfileobj(sys.stdin.buffer, file)
            except OSError as error:
                raise RunFailed(f"-: standard input cannot be kept in {spool.parent} ({error.strerror})") from error
            yield Input("-", str(spool))
        elif os.path.isdir(argument):
            try:
                names = sorted(audio_names(Path(argument)))
            except UserError as error:
                yield error
                continue
            if not names:
                yield UserError(f"{argument}: no audio file in this folder")
            yield from (Input(os.path.join(argument, name), os.path.join(argument, name)) for name in names)
        elif not argument:
            yield UserError("an empty argument: name an audio file or a folder")
        else:
            yield Input(argument, argument)


# --- the command -------------------------------------------------------------------------------------------------


def segments(
    models: "Sequence[Model]", source: Input, hop: int, live: Live | None = None
) -> Iterator[tuple[float, Segment]]:
    """The windows of a recording, in order, each with the recording's length in seconds; live shows how far it is.

    models: one, or several of the same architecture, whose probabilities are averaged.
    """
    import numpy as np

    import kernels
    from npser.audio import SAMPLE_RATE, open_recording
    from npser.features import FRAME, HOP, transforming
    from npser.scoring import frame_blocks, score

    try:
        recording = open_recording(source.path, live.read if live else None)
        blocks = frame_blocks(kernels.rung(transforming(models[0].backend)), recording.samples())
        number = 0
        for piece in score(models, blocks, hop):
            if not np.isfinite(piece).all():
                raise UserError(f"{source.path}: a model's probabilities are not finite: a parameter is too large")
            for p in piece:
                start = number * hop * HOP
                end = start + (models[0].input_frames - 1) * HOP + FRAME
                yield recording.seconds, Segment(start / SAMPLE_RATE, min(end, recording.length) / SAMPLE_RATE, p)
                number += 1
    except UserError as error:
        raise UserError(str(error).replace(source.path, source.name)) from error


def label_all(
    models: "Sequence[Model]", inputs: Iterable[Input | UserError], hop: int, writer: Writer, timeline: bool
) -> "Tally":
    """Score every recording and write what comes out; bad ones get a line on standard error."""
    tally = Tally()
    for source in inputs:
        live = Live(source.name if isinstance(source, Input) else "")
        total: Any = 0.0
        windows, seconds = 0, 0.0
        try:
            if isinstance(source, UserError):
                raise source
            for seconds, segment in segments(models, source, hop, live):
                answer_interruption()
                total, windows = total + segment.p, windows + 1
                if timeline:
                    live.clear()
                    writer.window(source.name, segment)
                live.scored(segment.end, seconds)
            live.clear()
            writer.recording(source.name, Segment(0.0, seconds, total / windows))
        except UserError as error:
            live.clear()
            print(f"npser.predict: {error}", file=sys.stderr)
            tally.refused += 1
            continue
        tally.seconds, tally.windows, tally.labelled = (
            tally.seconds + seconds,
            tally.windows + windows,
            tally.labelled + 1,
        )
    return tally


@dataclass
class Tally:
    """What was done."""

    seconds: float = 0.0  # of audio
    windows: int = 0
    labelled: int = 0
    refused: int = 0


def describe(model: "Model", path: Path, hop: int, threads: int) -> str:
    from npser.modelfile import score_of

    corpus = model.training.get("corpus", "an unknown corpus")
    return (
        f"{path}: {model.arch} trained on {corpus}, {score_of(model.cross_validation)}; labels "
        f"{', '.join(model.labels)}; windows of {model.input_frames} frames, {hop} apart; backend {model.backend}, "
        f"{count(threads, 'threads')}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status, raises UserError."""
    options = parser().parse_args(arguments)
    if options.inputs.count("-") > 1:
        raise UserError("-: standard input can be read only once")
    threads = set_threads(options.threads, options.backend)
    with computing(options.backend, options.precision):
        return _predict(options, threads)


def _predict(options: argparse.Namespace, threads: int) -> int:
    """The command with its options checked and its threads set."""
    from npser.progress import duration
    from npser.scoring import load_together, require_readable

    paths = [options.model, *options.others]
    models = load_together(paths, options.backend, require_readable)
    model = models[0]
    hop = options.segment_hop or _trained_hop(model, options.model)
    with ExitStack() as stack:
        spool = Path("input")  # of standard input, which is read twice
        if "-" in options.inputs:
            spool = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="npser-"))) / spool
        inputs = list(find_inputs(options.inputs, spool))
        form: Any = JSONLines if options.json else CSV if options.csv else Table
        extra = {"width": _name_width(inputs)} if form is Table else {}
        writer = form(model.labels, options.timeline, sys.stdout, **extra)
        if options.verbose:
            for path, other in zip(paths, models, strict=True):
                print(printable(describe(other, path, hop, threads)), file=sys.stderr)
        started = time.monotonic()
        tally = label_all(models, inputs, hop, writer, options.timeline)
    if options.verbose:
        taken = time.monotonic() - started
        print(
            f"{count(tally.labelled, 'recordings')}, {duration(tally.seconds)} of audio, "
            f"{count(tally.windows, 'windows')} in {duration(taken)}: "
            f"{tally.seconds / max(taken, 1e-9):.1f} times real time",
            file=sys.stderr,
        )
    return 2 if tally.refused else 0


def _name_width(inputs: Sequence[Input | UserError]) -> int:
    """Columns for the names: what the longest needs, on a terminal at most what the rest of the line leaves."""
    longest = max((len(printable(source.name)) for source in inputs if isinstance(source, Input)), default=0)
    return min(longest, max(shutil.get_terminal_size().columns - 75, 16)) if sys.stdout.isatty() else longest


def _trained_hop(model: "Model", path: Path) -> int:
    hop = model.training.get("segment_hop")
    if not isinstance(hop, int) or not 1 <= hop <= 1 << 20:
        raise UserError(f"{path}: does not say how far apart its windows lay in training: add --segment-hop N")
    return hop


if __name__ == "__main__":
    run("npser.predict", main)
