"""Rates of a disk: cold and warm sequential reads, and writes, of a temporary file.

In: a folder, a size. Out: :class:`DiskRates`. Reads as the working store does: positioned reads of
8 MiB. The file is removed whatever happens. Holds one buffer of 8 MiB.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

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
        cold: Reads from the disk itself.
        warm: Reads from the page cache.
        write: Writes, fsync included.
        note: How they were measured.
    """

    cold: float
    warm: float
    write: float
    note: str


def measure_disk(folder: Path, size_bytes: int) -> DiskRates:
    """Write a file into a folder and read it cold and warm.

    Args:
        folder: On the disk to measure.
        size_bytes: Size of the file; it takes at most a quarter of the free space.

    Raises:
        OutputError: The folder cannot be written, or has no room for a file worth measuring.
    """
    with output_errors(folder):
        free = shutil.disk_usage(folder).free
    size = min(size_bytes, free // 4)
    size -= size % _BLOCK_BYTES
    if size < min(_LEAST_BYTES, size_bytes):
        raise OutputError(
            f"{folder}: {format_bytes(free)} are free, too little to measure the disk; free some "
            f"space or name another folder with --dir"
        )
    with (
        output_errors(folder),
        tempfile.TemporaryDirectory(prefix=".frugal-bonsai-profile-", dir=folder) as inside,
    ):
        path = Path(inside) / "blocks"
        write = _write(path, size)
        cold = _read(path, size) if _forget(path) else None
        warm = max(_read(path, size) for _ in range(_RUNS))
    note = f"a file of {format_bytes(size)}"
    if cold is not None:
        note += ", fsync, dropped from the page cache before the cold read"
        return DiskRates(cold=cold, warm=warm, write=write, note=note)
    note += (
        "; this system cannot drop a file from the page cache (no posix_fadvise), so the cold rate "
        "is the write rate"
    )
    return DiskRates(cold=min(write, warm), warm=warm, write=write, note=note)


def _write(path: Path, size: int) -> float:
    block = os.urandom(_BLOCK_BYTES)  # no file system can compress it
    with path.open("wb", buffering=0) as file:
        started = time.perf_counter()
        for _ in range(size // _BLOCK_BYTES):
            file.write(block)
        os.fsync(file.fileno())
        return size / (time.perf_counter() - started)


def _forget(path: Path) -> bool:
    """Drop a file from the page cache; return False where the system has no call for it."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return False
    with path.open("rb", buffering=0) as file:
        advise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _read(path: Path, size: int) -> float:
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
