"""Progress on standard error: a live display on a terminal, plain lines elsewhere.

In: the calls of a :class:`~frugal_bonsai.progress.Progress`. Out: round, sweep, layers done,
tokens/s, time left, resident memory against the cap. Holds a few numbers; the live display adds
rich's refreshing thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from frugal_bonsai.memory.meter import resident_bytes
from frugal_bonsai.progress import Progress
from frugal_bonsai.report.words import duration, printable
from frugal_bonsai.sizes import GIB

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Clock = Callable[[], float]

# Seconds between two plain lines inside one sweep.
_PLAIN_SECONDS = 5.0
# Seconds between two readings of resident memory.
_METER_SECONDS = 0.5
_REFRESHES_PER_SECOND = 4


@dataclass(frozen=True)
class _Round:
    """Where the run is; replaced whole, since the display reads from another thread."""

    number: int
    rounds: int
    sparsity: float
    began: float


@dataclass(frozen=True)
class _Sweep:
    """Where the sweep is; replaced whole, as above."""

    name: str
    steps: int
    tokens: int
    began: float
    done: int = 0
    stepped: float = 0.0
    unit: str = ""


class Tracker:
    """The figures of a run: what both displays show.

    Args:
        cap_bytes: cap on resident memory.
        clock: seconds, never backwards.
    """

    def __init__(self, cap_bytes: int, clock: Clock = time.monotonic) -> None:
        self._cap_bytes, self._clock = cap_bytes, clock
        self._memory, self._read_at = 0, -float("inf")
        self._first: _Round | None = None
        self._round: _Round | None = None
        self._sweep: _Sweep | None = None

    def round(self, number: int, rounds: int, sparsity: float) -> None:
        """A round begins."""
        self._round = _Round(number, rounds, sparsity, self._clock())
        self._first = self._first or self._round

    def sweep(self, name: str, steps: int, tokens: int) -> None:
        """A sweep begins; ``tokens`` pass each of its steps."""
        self._sweep = _Sweep(name, steps, tokens, self._clock())

    def step(self, detail: str = "") -> None:
        """A step is done; ``detail`` such as "layer 3" says what the steps are."""
        now = self._sweep
        if now is None:
            return
        unit = f" {detail.split()[0]}s" if detail.split() else now.unit
        self._sweep = _Sweep(
            now.name, now.steps, now.tokens, now.began, now.done + 1, self._clock(), unit
        )

    @property
    def finished(self) -> bool:
        """Whether the sweep is through."""
        return self._sweep is not None and self._sweep.done >= self._sweep.steps

    @property
    def round_share(self) -> float | None:
        """Share of the rounds that are done; None before the first."""
        now = self._round
        return None if now is None else (now.number - 1) / max(now.rounds, 1)

    @property
    def sweep_share(self) -> float:
        """Share of the sweep that is done."""
        now = self._sweep
        return 0.0 if now is None else min(now.done / max(now.steps, 1), 1.0)

    def round_text(self) -> str:
        """``round 3 of 10, 10.0% removed``; empty before the first."""
        now = self._round
        if now is None:
            return ""
        return f"round {now.number} of {now.rounds}, {now.sparsity:.1%} removed"

    def run_left_text(self) -> str:
        """``about 12 min of rounds left``, once a round has finished."""
        first, now = self._first, self._round
        if first is None or now is None or now.number <= first.number:
            return ""
        each = (now.began - first.began) / (now.number - first.number)
        ahead = each * (now.rounds - now.number + 1) - (self._clock() - now.began)
        return f"about {duration(ahead)} of rounds left"

    def sweep_name(self) -> str:
        """The sweep's name."""
        return "" if self._sweep is None else self._sweep.name

    def sweep_text(self) -> str:
        """``3 of 32 layers, 5,000 tokens/s, 12 s left``; at its end ``in 14 s``."""
        now = self._sweep
        if now is None:
            return ""
        parts = [f"{now.done} of {now.steps}{now.unit}"]
        spent = now.stepped - now.began
        if now.done and spent > 0 and now.tokens:
            # All tokens pass all steps: a step is one layer's share of the way.
            parts.append(f"{now.tokens * now.done / max(now.steps, 1) / spent:,.0f} tokens/s")
        if self.finished:
            parts.append(f"in {duration(spent)}")
        elif now.done:
            ahead = spent / now.done * (now.steps - now.done)
            parts.append(f"{duration(ahead - (self._clock() - now.stepped))} left")
        return ", ".join(parts)

    def memory_text(self) -> str:
        """``memory 0.53 of 2.00 GiB``."""
        now = self._clock()
        if now - self._read_at >= _METER_SECONDS:
            self._memory, self._read_at = resident_bytes(), now
        return f"memory {self._memory / GIB:.2f} of {self._cap_bytes / GIB:.2f} GiB"


class PlainProgress:
    """Plain lines: each round, each finished sweep, a line every few seconds inside a long one.

    Args:
        cap_bytes: cap on resident memory.
        stream: where to.
        clock: seconds, never backwards.
    """

    def __init__(self, cap_bytes: int, stream: TextIO, *, clock: Clock = time.monotonic) -> None:
        self._tracker, self._stream, self._clock = Tracker(cap_bytes, clock), stream, clock
        self._said_at = clock()

    def round(self, number: int, rounds: int, sparsity: float) -> None:
        """Say that a round begins."""
        tracker = self._tracker
        tracker.round(number, rounds, sparsity)
        self._say(tracker.round_text(), tracker.run_left_text(), tracker.memory_text())

    def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
        """Begin a sweep."""
        self._tracker.sweep(name, steps, tokens_per_step)
        self._said_at = self._clock()

    def step(self, detail: str = "") -> None:
        """Say how far the sweep is, now and then and at its end."""
        tracker = self._tracker
        tracker.step(detail)
        if tracker.finished or self._clock() - self._said_at >= _PLAIN_SECONDS:
            left = "" if tracker.finished else tracker.run_left_text()
            text = f"  {tracker.sweep_name()}: {tracker.sweep_text()}"
            self._say(text, left, tracker.memory_text())

    def note(self, text: str) -> None:
        """Say something."""
        for line in text.split("\n"):
            self._say(line)

    def _say(self, *parts: str) -> None:
        self._said_at = self._clock()
        text = ", ".join(part for part in parts if part)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        print(printable(text, encoding), file=self._stream, flush=True)


class LiveProgress:
    """A display of three lines below whatever has been noted; gone when it is left.

    Args:
        cap_bytes: cap on resident memory.
        stream: a terminal.
        clock: seconds, never backwards.
    """

    def __init__(self, cap_bytes: int, stream: TextIO, *, clock: Clock = time.monotonic) -> None:
        from rich.live import Live

        self._tracker, self._console = Tracker(cap_bytes, clock), _console(stream)
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=_REFRESHES_PER_SECOND,
            transient=True,
            # What others print goes above the display, but nothing is turned away from a pipe.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )

    def __enter__(self) -> LiveProgress:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def round(self, number: int, rounds: int, sparsity: float) -> None:
        """Show that a round begins."""
        self._tracker.round(number, rounds, sparsity)

    def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
        """Show that a sweep begins."""
        self._tracker.sweep(name, steps, tokens_per_step)

    def step(self, detail: str = "") -> None:
        """Show how far the sweep is."""
        self._tracker.step(detail)

    def note(self, text: str) -> None:
        """Print something above the display."""
        from rich.text import Text

        for line in text.split("\n"):
            self._console.print(Text(printable(line, self._console.encoding)))

    def _render(self) -> RenderableType:
        """The three lines; called by rich's thread."""
        from rich.console import Group

        tracker = self._tracker
        name = printable(tracker.sweep_name(), self._console.encoding) or "starting"
        lines = [self._line(name, tracker.sweep_share, tracker.sweep_text())]
        share = tracker.round_share
        if share is not None:
            lines.insert(0, self._line(tracker.round_text(), share, tracker.run_left_text()))
        lines.append(self._line(tracker.memory_text(), None, ""))
        return Group(*lines)

    def _line(self, name: str, share: float | None, figures: str) -> RenderableType:
        """A name, cut if it must be, a bar, and figures."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, 1))
        line.add_column()  # the one that gives way
        line.add_column(width=10 if self._console.width < 100 else 20)
        line.add_column(no_wrap=True, min_width=len(figures))
        bar = "" if share is None else ProgressBar(total=1.0, completed=share)
        line.add_row(Text(name, no_wrap=True, overflow="ellipsis"), bar, Text(figures))
        return line


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, force_terminal=True, highlight=False, emoji=False, markup=False)


@contextmanager
def make_progress(cap_bytes: int, *, stream: TextIO | None = None) -> Iterator[Progress]:
    """A live display if the stream is a terminal that can move its cursor, else plain lines.

    Args:
        cap_bytes: cap on resident memory, shown beside what is in use.
        stream: standard error if None.
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty() or _console(stream).is_dumb_terminal:
        yield PlainProgress(cap_bytes, stream)
        return
    with LiveProgress(cap_bytes, stream) as live:
        yield live
