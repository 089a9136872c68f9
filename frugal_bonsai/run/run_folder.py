"""The run directory of a command: found, and locked while the command runs.

In: the output folder. Out: the run directory beside it, and a lock of the operating system on a
file in it, which ends with the process that holds it. Imports no torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from frugal_bonsai.checkpoint.commit import output_errors, remove_partials
from frugal_bonsai.errors import StateError

LOCK_FILE, EVENTS_FILE = "lock", "events.jsonl"
_SUFFIX = ".run"


def run_folder(out: Path) -> Path:
    """Return the run directory of an output folder."""
    return out.with_name(out.name + _SUFFIX)


def is_run_folder(folder: Path) -> bool:
    """Return whether a folder has the name of a run directory."""
    return folder.name.endswith(_SUFFIX) and folder.name != _SUFFIX


def output_of(folder: Path) -> Path:
    """Return the output folder of a run directory."""
    return folder.with_name(folder.name.removesuffix(_SUFFIX))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a run directory and hold its lock; remove a partial output that a killed run left.

    At the end the directory is removed if the block has left nothing in it, with the parents that
    were created for it.

    Raises:
        StateError: Another run holds the lock.
        OutputError: The directory cannot be created.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        _acquire(lock, folder)
        remove_partials(output_of(folder))
        try:
            yield
        finally:
            if os.name != "nt":  # Windows removes no file that is open
                (folder / LOCK_FILE).unlink(missing_ok=True)
            lock.release()
            with suppress(OSError):
                if os.name == "nt":
                    (folder / LOCK_FILE).unlink(missing_ok=True)
    finally:
        with suppress(OSError):
            for path in {folder: None, **dict.fromkeys(created)}:
                path.rmdir()


def empty(folder: Path) -> None:
    """Remove everything from a run directory but its lock."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK_FILE:
            path.unlink(missing_ok=True)


def holds_files(folder: Path) -> bool:
    """Return whether a run directory holds anything but its lock and its log."""
    without = (LOCK_FILE, EVENTS_FILE)
    return folder.is_dir() and any(path.name not in without for path in folder.iterdir())


def is_locked(folder: Path) -> bool:
    """Return whether a run works in this run directory now."""
    try:
        require_unlocked(folder)
    except StateError:
        return True
    return False


def require_unlocked(folder: Path) -> None:
    """Raise if another run works in this run directory.

    Raises:
        StateError: Another run holds the lock.
    """
    if (folder / LOCK_FILE).exists():
        lock = FileLock(folder / LOCK_FILE)
        _acquire(lock, folder)
        lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    with output_errors(folder / LOCK_FILE):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StateError(
                f"{folder}: another run is working there now; wait for its end, or choose another "
                f"--out"
            ) from error
