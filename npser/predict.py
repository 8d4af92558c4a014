"""python -m npser.predict: recordings -> an emotion and its probability for each.

A recording's probabilities are the mean over its windows (the vote by the sum), as in cross-validation. Several
networks of one kind can decide together: a window's probabilities are the mean of theirs then.
"""

import argparse
import csv
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from npser.cli import Parser, answer_interruption, computing, count, run, set_threads, whole
from npser.errors import RunFailed, UserError, printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from npser.models import Model

BAR = 20  # columns of a bar that stands for 100 %


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


# --- how it is shown ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """A window of a recording, or all of it: where it lies, in seconds, and its probabilities (K,)."""

    start: float
    end: float
    p: "NDArray[np.float64]"


class Writer(Protocol):
    """A form of output."""

    def window(self, name: str, segment: Segment) -> None: ...

    def recording(self, name: str, segment: Segment) -> None: ...


@dataclass
class JSONLines:
    labels: Sequence[str]
    timeline: bool
    out: TextIO

    def _print(self, name: str, p: "NDArray[np.float64]", **where: float) -> None:
        probabilities = {label: round(float(value), 6) for label, value in zip(self.labels, p, strict=True)}
        content = {"file": name, **where, "label": self.labels[int(p.argmax())], "probabilities": probabilities}
        as_it_is = (getattr(self.out, "encoding", None) or "utf-8").lower() in ("utf-8", "utf8")
        print(json.dumps(content, ensure_ascii=not as_it_is), file=self.out, flush=True)

    def window(self, name: str, segment: Segment) -> None:
        self._print(name, segment.p, start=round(segment.start, 3), end=round(segment.end, 3))

    def recording(self, name: str, segment: Segment) -> None:
        if not self.timeline:
            self._print(name, segment.p)


class CSV:
    def __init__(self, labels: Sequence[str], timeline: bool, out: TextIO) -> None:
        self.labels, self.timeline, self.out = labels, timeline, out
        self.writer = csv.writer(out, lineterminator="\n")
        where = ["start", "end"] if timeline else []
        self.writer.writerow(["file", *where, "label", *(f"p_{label}" for label in labels)])

    def _print(self, name: str, p: "NDArray[np.float64]", *where: str) -> None:
        self.writer.writerow([name, *where, self.labels[int(p.argmax())], *(f"{value:.6f}" for value in p)])
        self.out.flush()

    def window(self, name: str, segment: Segment) -> None:
        self._print(name, segment.p, f"{segment.start:.3f}", f"{segment.end:.3f}")

    def recording(self, name: str, segment: Segment) -> None:
        if not self.timeline:
            self._print(name, segment.p)


@dataclass
class Table:
    """For people: the emotion, its probability as a number and a bar, and the two next."""

    labels: Sequence[str]
    timeline: bool
    out: TextIO
    width: int  # columns of the names

    def __post_init__(self) -> None:
        self.full, self.empty = "█", "░"
        try:
            (self.full + self.empty).encode(self.out.encoding or "ascii")
        except UnicodeEncodeError:
            self.full, self.empty = "#", "-"
        self.label_width = max(map(len, self.labels))
        self.heading = ""

    def _verdict(self, p: "NDArray[np.float64]") -> str:
        best, *others = sorted(range(len(p)), key=lambda k: (-p[k], k))
        filled = round(BAR * float(p[best]))
        bar = self.full * filled + self.empty * (BAR - filled)
        rest = ", ".join(f"{self.labels[k]} {100 * p[k]:.0f} %" for k in others[:2])
        return f"{self.labels[best]:{self.label_width}}  {100 * p[best]:3.0f} %  {bar}  {rest}"

    def window(self, name: str, segment: Segment) -> None:
        if name != self.heading:
            print(printable(name), file=self.out)
            self.heading = name
        print(f"  {clock(segment.start)} - {clock(segment.end)}  {self._verdict(segment.p)}", file=self.out, flush=True)

    def recording(self, name: str, segment: Segment) -> None:
        if self.timeline:
            span = f"all of it, {clock(segment.end)}"
            print(f"  {span:{2 * len(clock(0)) + 3}}  {self._verdict(segment.p)}", file=self.out, flush=True)
            self.heading = ""
        else:
            shown = printable(name)
            shown = shown if len(shown) <= self.width else "..." + shown[3 - self.width :]
            print(f"{shown:{self.width}}  {self._verdict(segment.p)}", file=self.out, flush=True)


def clock(seconds: float) -> str:
    """h:mm:ss.s."""
    tenths = round(10 * seconds)
    return f"{tenths // 36000}:{tenths // 600 % 60:02d}:{tenths // 10 % 60:02d}.{tenths % 10}"


class Live:
    """How far the recording at work is, on standard error, where that is a terminal and the recording long."""

    def __init__(self, name: str) -> None:
        self.name, self.stream = printable(name)[-40:], sys.stderr
        self.drawn, self.started = 0.0, time.monotonic()
        self.on = self.stream.isatty()

    def read(self, done: float) -> None:
        """So many seconds of it are looked through, before the first is scored."""
        self._draw(f"reading, {clock(done)}")

    def scored(self, done: float, total: float) -> None:
        speed = done / max(time.monotonic() - self.started, 1e-9)
        self._draw(f"{clock(done)} of {clock(total)}  {speed:.0f} times real time")

    def _draw(self, text: str) -> None:
        now = time.monotonic()
        if self.on and now - self.started > 1 and now - self.drawn > 0.2:
            self.drawn = now
            self.stream.write(f"\r\x1b[K{self.name}  {text}")
            self.stream.flush()

    def clear(self) -> None:
        if self.on and self.drawn:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


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
    from npser.models import load_model
    from npser.progress import duration
    from npser.scoring import require_readable

    paths = [options.model, *options.others]
    models = [load_model(path, options.backend) for path in paths]
    model = models[0]
    for number, (path, other) in enumerate(zip(paths, models, strict=True)):
        if path.resolve() in [earlier.resolve() for earlier in paths[:number]]:
            raise UserError(f"--with {path}: this model is there already")
        try:
            require_readable(other)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if (other.arch, other.labels) != (model.arch, model.labels):
            raise UserError(
                f"--with {path}: {other.arch} for {', '.join(other.labels)}, but {options.model} is {model.arch} for "
                f"{', '.join(model.labels)}: only models of one kind decide together"
            )
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
