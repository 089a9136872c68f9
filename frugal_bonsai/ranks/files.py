"""Files of rank 0's host for hosts that do not see its folders.

In: a folder on rank 0. Out: its files in a folder of each receiver. At most :data:`WINDOW` parts of
4 MiB are under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.commit import output_errors
from frugal_bonsai.ranks.group import PART_BYTES, Group

WINDOW = 8


def list_files(folder: Path) -> list[dict[str, Any]]:
    """Return name and bytes of each file of a folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return [{"name": path.name, "bytes": path.stat().st_size} for path in files]


def send_files(
    group: Group, task: str, folder: Path, files: Sequence[dict[str, Any]], receivers: int
) -> None:
    """Send files of a folder to all receivers; return when they have them.

    Args:
        group: The ranks.
        task: Key of the task that announces the files.
        folder: The folder.
        files: What :func:`list_files` returned.
        receivers: Number of ranks that call :func:`receive_files`.

    Raises:
        RankError: A rank failed.
    """
    sent = 0
    for entry in files:
        with (folder / entry["name"]).open("rb") as file:
            while part := file.read(PART_BYTES):
                group.put(f"{task}/part/{sent}", part)
                sent += 1
                _settle(group, task, sent - WINDOW, receivers)
    for part_number in range(max(0, sent - WINDOW + 1), sent):
        _settle(group, task, part_number, receivers)


def _settle(group: Group, task: str, number: int, receivers: int) -> None:
    """Wait until all receivers have a part, and remove it from the store."""
    if number < 0:
        return
    group.wait_count(f"{task}/got/{number}", receivers)
    group.forget(f"{task}/got/{number}")
    group.remove(f"{task}/part/{number}")


def receive_files(group: Group, task: str, folder: Path, files: Sequence[dict[str, Any]]) -> None:
    """Write the files that rank 0 sends into a folder.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
        RankError: A rank failed.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for entry in files:
        path = folder / entry["name"]
        with output_errors(path, entry["bytes"]), path.open("wb") as file:
            for _ in range(0, entry["bytes"], PART_BYTES):
                file.write(group.get(f"{task}/part/{number}"))
                group.count(f"{task}/got/{number}")
                number += 1
