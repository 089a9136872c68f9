"""Progress on standard error: a live display on a terminal, plain lines elsewhere.

In: the calls of a :class:`~frugal_bonsai.progress.Progress`. Out: the texts of the
:class:`Tracker`, printed. The live display has a thread of rich that refreshes it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from frugal_bonsai.progress import Progress
from frugal_bonsai.report.tracker import Clock, Tracker
from frugal_bonsai.report.words import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Seconds between two plain lines inside one sweep.
_PLAIN_SECONDS = 5.0
_REFRESHES_PER_SECOND = 4


class PlainProgress:
    """Prints a line for each round and each finished sweep, and every few seconds of a long sweep.

    Args:
        stream: Stream that is written to.
        clock: Seconds that never go backwards.
        seconds: Seconds between two lines inside a sweep; 0 prints every layer visit.
    """

    def __init__(
        self, stream: TextIO, *, clock: Clock = time.monotonic, seconds: float = _PLAIN_SECONDS
    ) -> None:
        self._tracker = Tracker(clock)
        self._stream, self._clock, self._seconds = stream, clock, seconds
        self._said_at = clock()

    def caps(self, host_bytes: int, gpu_bytes: int | None) -> None:
        """Show memory against these caps."""
        self._tracker.caps(host_bytes, gpu_bytes)

    def round(self, number: int, rounds: int, sparsity: float) -> None:
        """Print that a round begins."""
        tracker = self._tracker
        tracker.round(number, rounds, sparsity)
        self._say(tracker.round_text(), tracker.run_left_text(), tracker.memory_text())

    def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
        """Begin a sweep."""
        self._tracker.sweep(name, steps, tokens_per_step)
        self._said_at = self._clock()

    def step(self, detail: str = "") -> None:
        """Print the progress of the sweep, every few seconds and at its end."""
        tracker = self._tracker
        tracker.step(detail)
        if tracker.finished or self._clock() - self._said_at >= self._seconds:
            left = "" if tracker.finished else tracker.run_left_text()
            text = f"  {tracker.sweep_name()}: {tracker.sweep_text()}"
            self._say(text, left, tracker.memory_text())

    def note(self, text: str) -> None:
        """Print a note."""
        for line in text.split("\n"):
            self._say(line)

    def _say(self, *parts: str) -> None:
        self._said_at = self._clock()
        text = ", ".join(part for part in parts if part)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        print(printable(text, encoding), file=self._stream, flush=True)


class LiveProgress:
    """Shows three lines below the notes, and removes them at the end.

    Args:
        stream: A terminal.
        clock: Seconds that never go backwards.
    """

    def __init__(self, stream: TextIO, *, clock: Clock = time.monotonic) -> None:
        from rich.live import Live

        self._tracker, self._console = Tracker(clock), _console(stream)
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=_REFRESHES_PER_SECOND,
            transient=True,
            # Output of others goes above the display, unless it goes to a pipe.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )

    def __enter__(self) -> LiveProgress:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def caps(self, host_bytes: int, gpu_bytes: int | None) -> None:
        """Show memory against these caps."""
        self._tracker.caps(host_bytes, gpu_bytes)

    def round(self, number: int, rounds: int, sparsity: float) -> None:
        """Show that a round begins."""
        self._tracker.round(number, rounds, sparsity)

    def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
        """Show that a sweep begins."""
        self._tracker.sweep(name, steps, tokens_per_step)

    def step(self, detail: str = "") -> None:
        """Show the progress of the sweep."""
        self._tracker.step(detail)

    def note(self, text: str) -> None:
        """Print a note above the display."""
        from rich.text import Text

        for line in text.split("\n"):
            self._console.print(Text(printable(line, self._console.encoding)))

    def _render(self) -> RenderableType:
        """Return the three lines; called by rich's thread."""
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
        """Return a line of a name (truncated if needed), a bar and figures."""
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
def make_progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """Show progress: live if the stream is a terminal that can move its cursor, else plain lines.

    Args:
        stream: Stream that is written to. None takes standard error.
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty() or _console(stream).is_dumb_terminal:
        yield PlainProgress(stream)
        return
    with LiveProgress(stream) as live:
        yield live
