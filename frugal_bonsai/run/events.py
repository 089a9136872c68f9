"""``events.jsonl``: what a run did and when, one JSON object a line, appended as it happens.

In: the calls of a :class:`~frugal_bonsai.progress.Progress`. Out: lines in the run directory, and a
copy beside the output. docs/formats.md lists the events. They have no absolute paths. Imports no
torch. Holds a few numbers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.commit import write_bytes
from frugal_bonsai.errors import BudgetError, FrugalBonsaiError
from frugal_bonsai.memory.meter import reserved_gpu_bytes, resident_bytes
from frugal_bonsai.plain_json import parse_json
from frugal_bonsai.progress import Progress
from frugal_bonsai.report.card_parts import parent_name, without_paths
from frugal_bonsai.run.run_folder import EVENTS_FILE, holds_files
from frugal_bonsai.version import package_version

VERSION = 1
# Keys of the event ``start`` that stay in the run directory: where files lie on this machine.
_PRIVATE = ("arguments",)
_ABSENT = object()
# Event -> types of its values; other keys and events are not checked.
_FIELDS: dict[str, dict[str, Any]] = {
    "round": {"number": int, "rounds": int, "sparsity": int | float},
    "sweep": {"name": str, "steps": int, "tokens": int},
    "caps": {"host_bytes": int, "gpu_bytes": int | None},
    "memory": {"host_bytes": int, "gpu_bytes": int | None},
    "note": {"text": str},
}
_OPTIONAL: dict[str, dict[str, Any]] = {
    "start": {"at": str, "command": str, "model": str, "arguments": list, "version": str},
    "end": {"state": str},
}
# Seconds between two readings of the memory: at least this, and this share of the run so far, so
# that a run of days has a few thousand.
_LEAST_SECONDS, _SHARE = 0.2, 1 / 300


class EventLog:
    """Passes progress on, and appends it to a file.

    Args:
        path: The file. A disk that refuses a line ends the log, not the run.
        progress: Is told the same.
        clock: Seconds that never go backwards.
    """

    def __init__(
        self, path: Path, progress: Progress, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path, self._progress, self._clock = path, progress, clock
        self._began, self._read_at = clock(), -float("inf")
        self._phase = "the preparation"

    def write(self, event: str, **values: Any) -> None:
        """Append an event."""
        seconds = round(self._clock() - self._began, 3)
        line = json.dumps({"event": event, "seconds": seconds, **values}, ensure_ascii=False)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError:
            return  # the run itself needs the disk more, and says so

    def caps(self, host_bytes: int, gpu_bytes: int | None) -> None:
        """Record the caps."""
        self.write("caps", host_bytes=host_bytes, gpu_bytes=gpu_bytes)
        self._progress.caps(host_bytes, gpu_bytes)

    def round(self, number: int, rounds: int, sparsity: float) -> None:
        """Record the start of a round."""
        self.write("round", number=number, rounds=rounds, sparsity=sparsity)
        self._progress.round(number, rounds, sparsity)

    def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
        """Record the start of a sweep, and the memory."""
        self._phase = name
        self.write("sweep", name=name, steps=steps, tokens=tokens_per_step)
        self._read_memory()
        self._progress.sweep(name, steps, tokens_per_step)

    def step(self, detail: str = "") -> None:
        """Record the memory now and then."""
        now = self._clock()
        if now - self._read_at >= max(_LEAST_SECONDS, _SHARE * (now - self._began)):
            self._read_memory()
        self._progress.step(detail)

    def note(self, text: str) -> None:
        """Record a note."""
        self.write("note", text=without_paths(text))
        self._progress.note(text)

    def require_memory(self, error: BaseException) -> None:
        """Raise the user's error if an error is a lack of memory that nothing else has answered.

        Raises:
            BudgetError: it is one. The text names the phase.
        """
        if isinstance(error, FrugalBonsaiError) or not isinstance(
            error, MemoryError | RuntimeError
        ):
            return
        from frugal_bonsai.stream.micro_batch import is_out_of_memory, out_of_memory_text

        if is_out_of_memory(error):
            what = f"{self._phase}, or after it"
            raise BudgetError(out_of_memory_text(error, what)) from error

    def _read_memory(self) -> None:
        self._read_at = self._clock()
        self.write("memory", host_bytes=resident_bytes(), gpu_bytes=reserved_gpu_bytes())


@contextmanager
def recorded(
    folder: Path,
    progress: Progress,
    command: str,
    model: str,
    arguments: Sequence[Any],
    *,
    resume: bool,
) -> Iterator[EventLog]:
    """Record a run in its directory.

    The log of a run that leaves nothing to resume is removed.

    Args:
        folder: The run directory.
        progress: Is told the same.
        command: ``prune`` or ``adapt``.
        model: Name of the model, as typed.
        arguments: Result of :func:`frugal_bonsai.run.arguments.command_arguments`.
        resume: The run goes on, and so does its log.
    """
    path = folder / EVENTS_FILE
    if not resume:
        path.unlink(missing_ok=True)
    log = EventLog(path, progress)
    log.write(
        "start",
        schema=VERSION,
        version=package_version(),
        command=command,
        model=parent_name(model),
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        resumed=resume,
        arguments=list(arguments),
    )
    try:
        yield log
    except BaseException as error:
        if holds_files(folder):
            log.write("end", state="interrupted", error=type(error).__name__)
        log.require_memory(error)
        raise
    finally:
        if not holds_files(folder):
            path.unlink(missing_ok=True)


def copy_events(folder: Path, out: Path) -> None:
    """Copy the log of a run beside its output, without what belongs to this machine."""
    events = read_events(folder)
    if not events:
        return
    last = {"event": "end", "seconds": events[-1]["seconds"], "state": "finished"}
    lines = [
        json.dumps({k: v for k, v in event.items() if k not in _PRIVATE}, ensure_ascii=False)
        for event in (*events, last)
    ]
    write_bytes(out / EVENTS_FILE, "".join(f"{line}\n" for line in lines).encode())


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run directory or an output; lines that are no events are left out.

    The last line of a run that was killed can be cut short.
    """
    try:
        lines = (folder / EVENTS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            event = parse_json(line)
        except ValueError:
            continue
        if isinstance(event, dict) and _is_event({"seconds": 0.0, **event}):
            found.append({"seconds": 0.0, **event})
    return found


def _is_event(event: dict[str, Any]) -> bool:
    """Return whether the values of an event have the types that :class:`EventLog` writes."""
    kind, seconds = event.get("event"), event["seconds"]
    if not isinstance(kind, str) or not isinstance(seconds, int | float):
        return False
    if not 0 <= seconds < math.inf:
        return False
    required, optional = _FIELDS.get(kind, {}), _OPTIONAL.get(kind, {})
    return all(isinstance(event.get(key, _ABSENT), types) for key, types in required.items()) and (
        all(isinstance(event[key], types) for key, types in optional.items() if key in event)
    )
