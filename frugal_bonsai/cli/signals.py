"""What ends a command from outside: Ctrl-C, a scheduler's SIGTERM, a terminal that closes.

All three raise ``KeyboardInterrupt`` once, so that a command cleans up and keeps what it can resume
from. A second Ctrl-C while it cleans up does nothing; a third one ends the process at once. Imports
no torch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

CTRL_C = 128 + signal.SIGINT


class Terminated(KeyboardInterrupt):
    """The process was asked to end by another signal than Ctrl-C.

    Attributes:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let signals stop the block; signals that are ignored (``nohup``) stay so."""
    # Only the main thread may set handlers. torchrun ends its ranks by SIGTERM, which a rank that
    # waits for the others in compiled code could not answer.
    if threading.current_thread() is not threading.main_thread() or "RANK" in os.environ:
        yield
        return
    before: dict[int, Any] = {}
    asked: dict[str, Any] = {"SIGINT": signal.default_int_handler}
    asked |= dict.fromkeys(("SIGTERM", "SIGHUP"), signal.SIG_DFL)
    for name, expected in asked.items():
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is expected:
            before[number] = signal.signal(number, _stop(before))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(numbers: dict[int, Any]) -> Callable[[int, FrameType | None], None]:
    """Return a handler that stops the block once, whichever of the signals comes."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, _wait)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    return stop


def _wait(number: int, frame: FrameType | None) -> None:
    """Answer a second signal: the command is cleaning up."""
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("frugal-bonsai: cleaning up; Ctrl-C once more ends at once", file=sys.stderr)


def exit_code(error: BaseException) -> int:
    """Return the exit code of a command that a signal stopped: 128 and the signal's number."""
    while error is not None:
        if isinstance(error, Terminated):
            return 128 + error.number
        error = error.__cause__  # type: ignore[assignment]  # click raises its own class
    return CTRL_C
