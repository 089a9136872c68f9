"""Check before any work that the disks have room for what a command writes.

In: a disk plan, and the paths of its folders, which may lie on different disks. Out: nothing, or an
error that names the path, the bytes needed and found, and what to try. Reads no file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from frugal_bonsai.checkpoint.commit import nearest_folder, output_errors
from frugal_bonsai.errors import OutputError
from frugal_bonsai.memory.disk import DiskPhase, DiskPlan
from frugal_bonsai.run.run_folder import EVENTS_FILE
from frugal_bonsai.sizes import format_bytes

Fits = Callable[[DiskPlan], bool]


def require_room(
    plan: DiskPlan,
    folders: Mapping[str, Path],
    what: str,
    *,
    held: Path | None = None,
    resumed: bool = False,
    advise: Callable[[Fits], str] = lambda fits: "",
) -> None:
    """Check the free bytes of each disk against the peak of what will lie on it.

    Args:
        plan: The predicted files.
        folders: Path of each of the plan's folders. They need not exist.
        what: What is written, for the error text.
        held: Run directory of a run that is resumed. Its files are in the plan, so they count as
            free bytes.
        resumed: The run is continued: where and what it writes cannot be chosen any more.
        advise: Returns options that make the files smaller, as text for the error, given a function
            that tells whether a plan fits; empty if none does.

    Raises:
        OutputError: A disk has too little room.
    """
    disks: dict[int, list[str]] = {}
    for name, folder in folders.items():
        with output_errors(folder):
            disks.setdefault(nearest_folder(folder.absolute()).stat().st_dev, []).append(name)
    for names in disks.values():
        folder = folders[names[0]]
        with output_errors(folder):
            free_bytes = shutil.disk_usage(nearest_folder(folder.absolute())).free
        if held is not None and held in [folders[name] for name in names]:
            free_bytes += _held_bytes(held)

        def fits(other: DiskPlan, names: list[str] = names, free_bytes: int = free_bytes) -> bool:
            return other.peak(names).total_bytes(names) <= free_bytes

        if not fits(plan):
            raise _too_small(
                plan.peak(names),
                names,
                folder,
                what,
                free_bytes,
                "" if resumed else f", or choose an --out on another disk{advise(fits)}",
            )


def _held_bytes(folder: Path) -> int:
    """Return the bytes of the files in a run directory, without its log; 0 if there is none."""
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.name != EVENTS_FILE
    )


def _too_small(
    peak: DiskPhase, names: list[str], folder: Path, what: str, free_bytes: int, advice: str
) -> OutputError:
    """Return the error of a disk that is too small for a phase."""
    needed, others = peak.total_bytes(names), " and ".join(names)
    largest = max(
        (item for item in peak.items if item.folder in names), key=lambda item: item.size_bytes
    )
    return OutputError(
        f"{folder}: {what} needs {format_bytes(needed)} on this disk ({others}; most in "
        f"{peak.name}, of which {largest.name} {format_bytes(largest.size_bytes)}), but "
        f"{format_bytes(free_bytes)} are free. Free {format_bytes(needed - free_bytes)}{advice}"
    )
