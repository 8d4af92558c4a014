"""How `npser.predict` shows what it finds: a table for people, CSV or JSON for programs, and how far it is."""

import csv
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

from npser.errors import printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BAR = 20  # columns of a bar that stands for 100 %


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
