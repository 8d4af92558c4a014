"""What a person sees while a run is at work: a live line on a terminal, plain lines in a pipe or log.

Everything here goes to standard error; results go to standard output.
"""

import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

from npser.cli import answer_interruption
from npser.foldresult import EpochResult

ESTIMATE_AFTER = 3  # updates timed before the length of the run is estimated
PAUSE = 20  # an update that takes so many times the mean contains a pause of the program: Ctrl-Z, a debugger


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass
class Progress:
    """Counts the training steps of a whole run and says how it goes.

    total: the steps of the whole run. Time left is computed from the time per step since this program started: steps
    that an earlier start did count as done, not as fast.
    """

    total: int
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    measured: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.live = self.stream.isatty()
        self._last_drawn = 0.0
        self._announced = False

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.live:
            self.stream.write("\r\x1b[K")
        print(text, file=self.stream, flush=True)

    def warn(self, text: str) -> None:
        """A line that stays, about what went wrong."""
        self.say(text)

    def begin_fold(self, title: str, steps: int) -> None:
        """title names the fold in all its lines; steps: how many it has."""
        self.title, self._fold_end, self._fold_measured = title, self.done + steps, 0

    def skip(self, steps: int) -> None:
        """These steps of the fold were done by an earlier start."""
        self.done += steps

    def end_fold(self) -> None:
        """The fold ends here, whatever steps it has left."""
        self.done = self._fold_end

    def step(
        self, seconds: float, windows: int, loss: float, accuracy: float, epoch: int, epochs: int, updates: int = 1
    ) -> None:
        """One update (or several) done, in so many seconds; loss and accuracy are the epoch's so far."""
        answer_interruption()
        self.done += updates
        first = self._fold_measured == 0
        self._fold_measured += updates
        if not first:  # the first step of a fold warms caches, or compiles: it says nothing of the others
            most = PAUSE * updates * self.seconds / self.measured if self.measured >= ESTIMATE_AFTER else seconds
            self.measured += updates
            self.seconds += min(seconds, most)
        if not self._announced and self.measured >= ESTIMATE_AFTER:
            self._announced = True
            rate = f"{1000 * self.seconds / self.measured:.0f} ms an update, measured on {self.measured} of them"
            self.say(f"about {duration(self._left(self.total - self.done))} for all of it ({rate})")
        now = self.clock()
        if self.live and now - self._last_drawn > 0.2:
            self._last_drawn = now
            line = self._line(epoch, epochs, windows / max(seconds, 1e-9), loss, accuracy)
            self.stream.write("\r\x1b[K" + line)
            self.stream.flush()

    def epoch_done(self, result: EpochResult, epochs: int, windows: int) -> None:
        """An epoch of so many windows is over: a line that stays."""
        speed = windows / max(result.seconds, 1e-9)
        self.say(self._line(result.epoch, epochs, speed, result.loss, result.accuracy))

    def _left(self, steps: int) -> float:
        """Seconds that so many steps will take, by those that were measured."""
        return steps * self.seconds / self.measured

    def _line(self, epoch: int, epochs: int, speed: float, loss: float, accuracy: float) -> str:
        said = (
            f"{self.title}  epoch {epoch}/{epochs}  loss {loss:.4f}  training accuracy {100 * accuracy:5.1f} %  "
            f"{speed:5.0f} windows/s"
        )
        if not self.measured:
            return said
        fold, run = self._left(self._fold_end - self.done), self._left(self.total - self.done)
        return f"{said}  left: fold {duration(fold)}, run {duration(run)}"


class Silent(Progress):
    """In a worker, whose parent says how the run goes: only what went wrong is said."""

    def __init__(self) -> None:
        super().__init__(0, io.StringIO())

    def warn(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
