"""The input of a step of the check, and the JSON lines that it writes.

A line is one JSON object. Its ``kind`` is ``machine`` (the first one), ``figure``, ``failure``,
``skipped`` or ``done``; its ``step`` names the step. A figure also names the ``table`` that it is a
row of; its other keys are the columns.
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_checks.processes import run_child

if TYPE_CHECKING:
    import torch

MACHINE, FIGURE, FAILURE, SKIPPED, DONE = "machine", "figure", "failure", "skipped", "done"
ROOT = Path(__file__).resolve().parents[2]
# Lines of a traceback or of a process's error output that a failure keeps, and letters of its text.
TAIL_LINES, MESSAGE_LETTERS = 12, 1500
Line = dict[str, Any]


class Book:
    """Appends each line to a file as soon as it is known, and prints it.

    Args:
        path: of the file; its folder is created.
        hidden: Paths of this machine, and the words that replace them.
    """

    def __init__(self, path: Path, hidden: Mapping[str, str]) -> None:
        self.path, self._hidden, self._started = path, hidden, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append and print one line; flushed, so that a cut-off run keeps it."""
        text = json.dumps({**line, "at_seconds": round(time.monotonic() - self._started, 1)})
        for path, name in self._hidden.items():
            text = text.replace(path, name)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        print(text, flush=True)


class Check:
    """One step at work.

    Args:
        step: its name.
        device: where it computes.
        dry: small shapes alone, to see that the code runs.
        work: folder that all steps of a run share.
        out: folder of the results.
        until: when the step's time is over, as ``time.time()`` counts.
        write: takes each line.
        arguments: with which this tool starts a process for a part of the step; None does all of
            it in this process.
    """

    def __init__(
        self,
        step: str,
        *,
        device: torch.device,
        dry: bool,
        work: Path,
        out: Path,
        until: float,
        write: Callable[[Line], None],
        arguments: list[str] | None,
    ) -> None:
        self.step, self.device, self.dry, self.work, self.out = step, device, dry, work, out
        self.failures = 0
        self._write, self._arguments = write, arguments
        self._until = until

    @property
    def on_gpu(self) -> bool:
        """True on a GPU and on the simulated one."""
        return self.device.type != "cpu"

    @property
    def full_device(self) -> torch.device:
        """The device; in a dry run the CPU, since the simulated one draws no random numbers."""
        import torch

        return torch.device("cpu") if self.dry else self.device

    def left_seconds(self) -> float:
        """Time that is left to this step."""
        return self._until - time.time()

    def figure(self, table: str, **values: Any) -> None:
        """Write one row of a table."""
        plain = {name: _plain(value) for name, value in values.items()}
        self._write({"step": self.step, "kind": FIGURE, "table": table, **plain})

    def skip(self, part: str, why: str) -> None:
        """Say that a part of the step was left out."""
        self._write(skipped(self.step, f"{part}: {why}"))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Turn a failure within it into a line; what follows it still runs."""
        try:
            yield
        except Exception as error:
            # Any error at all: this is what the check looks for, and the machine is at hand once.
            self.failures += 1
            kind = type(error).__name__
            self._write(failure(self.step, name, kind, str(error), _story(error)))

    def child(
        self,
        variant: str,
        environment: Mapping[str, str],
        *,
        seconds: float,
        here: Callable[[Check], None],
    ) -> None:
        """Run a variant of the step in a separate process; its lines count as the step's.

        Args:
            variant: what the step's function is told.
            environment: added to the process's.
            seconds: after which the process is killed.
            here: is called instead where the step does everything in this process.
        """
        if self._arguments is None:
            with self.part(variant):
                here(self)
            return
        seconds = min(seconds, self.left_seconds())
        words = [*self._arguments, "--variant", variant, "--until", f"{time.time() + seconds:.1f}"]
        log = self.work / f"{self.step}-{variant}.log"
        ended = run_child(words, seconds=seconds, log=log, write=self._write, add=environment)
        if ended.error is not None:
            last = log_tail(log)
            self._write(failure(self.step, variant, ended.error, "; ".join(last[-1:]), last))
        if ended.error is not None or ended.failed:
            self.failures += 1


def failure(step: str, part: str, error: str, message: str, last_lines: list[str]) -> Line:
    """The line of a failure."""
    said = {"error": error, "message": message[:MESSAGE_LETTERS], "last_lines": last_lines}
    return {"step": step, "kind": FAILURE, "part": part, **said}


def skipped(step: str, why: str) -> Line:
    """The line of a step, or of a part of one, that was left out."""
    return {"step": step, "kind": SKIPPED, "why": why}


def own_frames(frames: Iterable[traceback.FrameSummary]) -> list[str]:
    """Those of this repository: file, line, function."""
    found = []
    for frame in frames:
        path = Path(frame.filename)
        if any(
            path.is_relative_to(ROOT / folder) for folder in ("frugal_bonsai", "tools", "tests")
        ):
            found.append(f"{path.relative_to(ROOT)}:{frame.lineno} {frame.name}")
    return found


def _story(error: BaseException) -> list[str]:
    """Return the place and the text of an error, then those of its causes."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        frames = traceback.extract_tb(cause.__traceback__)
        lines += own_frames(f for f in frames if f.filename != __file__)[-TAIL_LINES:]
        lines.append("".join(traceback.format_exception_only(cause)).strip()[:MESSAGE_LETTERS])
        cause = cause.__cause__ or cause.__context__
    return lines


def log_tail(log: Path) -> list[str]:
    """The last lines that a process wrote to its log."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return [line for line in text.splitlines() if line.strip()][-TAIL_LINES:]


def _plain(value: Any) -> Any:
    """A value as JSON has it; infinities and NaN become text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def read_lines(path: Path) -> list[Line]:
    """The lines of a file; a last one that was cut off is left out."""
    lines: list[Line] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            print(f"{path}:{number}: is not JSON, left out", file=sys.stderr)
    return lines
