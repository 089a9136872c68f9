"""Measuring a disk: cold and warm sequential reads, and writes, of a file of its own.

In: a folder, a size. Out: :class:`DiskRates`. Holds a read buffer of 8 MiB; the file is removed
whatever happens. Reads as the working store does: positioned reads of long runs.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from frugal_bonsai.checkpoint.commit import output_errors
from frugal_bonsai.checkpoint.files import ReadFile, tensor_bytes
from frugal_bonsai.errors import OutputError
from frugal_bonsai.sizes import MIB, format_bytes

_BLOCK_BYTES = 8 * MIB
_LEAST_BYTES = 32 * MIB
_RUNS = 3


@dataclass(frozen=True, kw_only=True)
class DiskRates:
    """Bytes a second.

    Attributes:
        cold: reads from the disk itself.
        warm: reads from the page cache.
        write: writes, fsync included.
        note: how it was measured.
    """

    cold: float
    warm: float
    write: float
    note: str


def measure_disk(folder: Path, size_bytes: int) -> DiskRates:
    """Write a file of about this size into ``folder`` and read it cold and warm.

    Takes at most a quarter of what is free there.

    Raises:
        OutputError: the folder cannot be written, or there is no room for a file worth measuring.
    """
    import shutil

    with output_errors(folder):
        free = shutil.disk_usage(folder).free
    size = min(size_bytes, free // 4)
    size -= size % _BLOCK_BYTES
    if size < min(_LEAST_BYTES, size_bytes):
        raise OutputError(
            f"{folder}: {format_bytes(free)} are free, too little to measure the disk; free some "
            f"space or name another folder with --dir"
        )
    with _temporary(folder) as path:
        write = _write(path, size)
        cold = _read(path, size) if _forget(path) else None
        warm = max(_read(path, size) for _ in range(_RUNS))
    note = (
        f"a file of {format_bytes(size)}, fsync, dropped from the page cache before the cold read"
    )
    if cold is None:
        # What can be written with fsync at a rate can be read at it.
        cold = min(write, warm)
        note = (
            f"a file of {format_bytes(size)}; this system cannot drop a file from the page cache "
            "(no posix_fadvise), so the cold rate is the write rate"
        )
    return DiskRates(cold=cold, warm=warm, write=write, note=note)


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    with output_errors(folder):
        handle, name = tempfile.mkstemp(prefix=".frugal-bonsai-profile-", dir=folder)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _write(path: Path, size: int) -> float:
    block = os.urandom(_BLOCK_BYTES)  # nothing that a file system could compress
    with output_errors(path), path.open("wb", buffering=0) as file:
        started = time.perf_counter()
        for _ in range(size // _BLOCK_BYTES):
            file.write(block)
        os.fsync(file.fileno())
        return size / (time.perf_counter() - started)


def _forget(path: Path) -> bool:
    """Drop a file from the page cache; False where the system cannot be asked to."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return False
    with output_errors(path), path.open("rb", buffering=0) as file:
        advise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _read(path: Path, size: int) -> float:
    import torch

    buffer = torch.zeros(_BLOCK_BYTES, dtype=torch.uint8)
    view, file = tensor_bytes(buffer), ReadFile(path)
    try:
        file.advise_sequential(0, size)
        started = time.perf_counter()
        for start in range(0, size, _BLOCK_BYTES):
            file.read_into(view, start, "disk rate")
        return size / (time.perf_counter() - started)
    finally:
        file.close()
