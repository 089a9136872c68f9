"""``runs``: what ran in a folder, how far it came, and the line that resumes it.

In: a folder. Out: one description for each run directory and each output below it. Reads small
files. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from frugal_bonsai.errors import WRONG_VALUES, OptionError
from frugal_bonsai.report.card_parts import parent_name
from frugal_bonsai.run.arguments import command_line
from frugal_bonsai.run.events import read_events
from frugal_bonsai.run.provenance import ADAPT_REPORT_FILE, REPORT_FILE, last_command, read_report
from frugal_bonsai.run.run_folder import (
    EVENTS_FILE,
    LOCK_FILE,
    holds_files,
    is_locked,
    is_run_folder,
    output_of,
)

RUNNING, INTERRUPTED, FINISHED = "running", "interrupted", "finished"
# Levels of folders that are looked at.
_DEPTH = 4


def list_runs(folder: str | Path = ".") -> list[dict[str, Any]]:
    """Describe the runs in a folder and the folders below it.

    Args:
        folder: The folder.

    Returns:
        For each run: ``out`` (its output, relative to the folder), ``state`` (``running``,
        ``interrupted`` or ``finished``), ``command``, ``model``, ``progress`` (a text), ``began``
        (UTC, or None), and ``resume``: the line that continues an interrupted run, or None.

    Raises:
        OptionError: There is no such folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise OptionError(f"{folder}: no such folder; give the folder that holds your outputs")
    found = [run for place in _folders(folder) if (run := _describe(place, folder)) is not None]
    return sorted(found, key=lambda run: (run["began"] or "", run["out"]))


def _folders(folder: Path) -> Iterator[Path]:
    """Yield a folder and those below it, but not what is in an output or a run directory."""
    for place, names, files in os.walk(folder):
        path = Path(place)
        yield path
        deep = len(path.relative_to(folder).parts) >= _DEPTH
        if deep or is_run_folder(path) or {REPORT_FILE, ADAPT_REPORT_FILE} & set(files):
            names.clear()
        names[:] = sorted(name for name in names if not name.startswith("."))


def _describe(place: Path, folder: Path) -> dict[str, Any] | None:
    """Describe a run directory or an output; None for any other folder."""
    if is_run_folder(place):
        return describe_run(place, folder)
    for name, command in ((ADAPT_REPORT_FILE, "adapt"), (REPORT_FILE, "prune")):
        report = read_report(place / name)
        if {"model", "before", "after"} <= report.keys():
            return {
                **_common(place, folder, read_events(place)),
                "state": FINISHED,
                "command": last_command(report) or command,
                "model": parent_name(str(report["model"])),
                "progress": _figures(command, report),
                "resume": None,
            }
    return None


def describe_run(place: Path, folder: Path) -> dict[str, Any] | None:
    """Describe a run directory as :func:`list_runs` does; None if there is nothing to resume."""
    events = read_events(place)
    running = (place / LOCK_FILE).exists() and is_locked(place)
    if not running and not holds_files(place):
        return None  # killed before there was anything to resume
    starts = [event for event in events if event["event"] == "start"]
    start = starts[0] if starts else {}  # a later one may have failed for its options
    arguments, out = start.get("arguments"), output_of(place)
    resume = None
    if not running and isinstance(arguments, list):
        words = [word for word in arguments if word != "--resume"]
        resume = command_line([*words, "--resume"], out.parent)
    return {
        **_common(out, folder, events),
        "state": RUNNING if running else INTERRUPTED,
        "command": start.get("command", "?"),
        "model": start.get("model", "?"),
        "progress": _last(events) or f"no {EVENTS_FILE}: of an older version",
        "resume": resume,
    }


def _common(out: Path, folder: Path, events: list[dict[str, Any]]) -> dict[str, Any]:
    start = next((event for event in events if event["event"] == "start"), {})
    return {"out": Path(os.path.relpath(out, folder)).as_posix(), "began": start.get("at")}


def _figures(command: str, report: Mapping[str, Any]) -> str:
    try:
        before, after = report["before"].get("perplexity"), report["after"].get("perplexity")
        text = "adapted" if command == "adapt" else f"{report.get('sparsity', 0):.0%} removed"
    except WRONG_VALUES:
        return "its report is damaged"
    if isinstance(before, float) and isinstance(after, float):
        text += f", perplexity {before:.2f} to {after:.2f}"
    return text


def _last(events: list[dict[str, Any]]) -> str:
    """Return the round and the sweep that a run was in."""
    parts = []
    rounds = [event for event in events if event["event"] == "round"]
    if rounds:
        last = rounds[-1]
        parts.append(f"round {last['number']} of {last['rounds']}")
    sweeps = [event for event in events if event["event"] == "sweep"]
    if sweeps:
        parts.append(str(sweeps[-1]["name"]))
    return ", ".join(parts)
