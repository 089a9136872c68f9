"""Open files that several threads read at offsets, straight into memory that the caller owns.

In: a path, offsets, writable memory. Out: the bytes, in place. Never mmap: memory mapped from a
file counts as this process's memory, so a sweep through a checkpoint would grow with the file.
Holds one descriptor per file and nothing else.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_bonsai.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# Other file systems, or one that has no such call: not failures of the disk.
_CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_PAGE_BYTES = 4096
# Measured: half of it takes a quarter longer, and twice as much several times as long where source
# and target begin at different places of a page.
_COPY_BYTES = 2**16
# One call of preadv reads at most 2**31 - 4096 bytes on Linux, macOS refuses more than 2**31 - 1.
MAX_READ_BYTES = 2**30

# One call reads no more ahead than the disk's own read-ahead, which is often little more.
_SOON_BYTES = 2**20

# What the platform lacks is None: Windows has none of them, macOS preadv alone.
_PREADV: Callable[[int, list[memoryview], int], int] | None = getattr(os, "preadv", None)
_COPY: Callable[..., int] | None = getattr(os, "copy_file_range", None)
_FADVISE: Callable[[int, int, int, int], None] | None = getattr(os, "posix_fadvise", None)


class ReadFile:
    """One file, opened once for positioned reads.

    Attributes:
        drop_behind: what has been read leaves the page cache.

    Args:
        path: of the file.
        drop_behind: see above; nothing where the system cannot be told.

    Raises:
        CheckpointError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, drop_behind: bool = False) -> None:
        self.path, self.drop_behind = path, drop_behind
        try:
            self._file = FileIO(str(path), "rb")
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be opened ({error.strerror or error}); check that it exists and "
                "its permissions"
            ) from error
        self._lock = threading.Lock()

    def advise_sequential(self, start: int, size_bytes: int) -> None:
        """Tell the system that a long run is about to be read; nothing where it cannot be told."""
        self._advise(start, size_bytes, "POSIX_FADV_SEQUENTIAL")

    def advise_soon(self, start: int, size_bytes: int) -> None:
        """Have the system read ahead in the background; nothing where it cannot be told."""
        for at in range(start, start + size_bytes, _SOON_BYTES):
            size = min(_SOON_BYTES, start + size_bytes - at)
            self._advise(at, size, "POSIX_FADV_WILLNEED")

    def _advise(self, start: int, size_bytes: int, advice: str) -> None:
        if _FADVISE is not None:
            with suppress(OSError):  # advice alone: a file system without it still reads
                _FADVISE(self._file.fileno(), start, size_bytes, getattr(os, advice))

    def read_into(self, view: memoryview, start: int, what: str) -> None:
        """Fill ``view`` (bytes, writable) from byte ``start`` on.

        Args:
            view: where the bytes go.
            start: offset in the file.
            what: what is read, for the error text (``tensor 'x'``).

        Raises:
            CheckpointError: the file ends early or the disk fails.
        """
        done = 0
        try:
            while done < len(view):
                part = view[done : done + MAX_READ_BYTES]
                count = self._read_some(part, start + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: {what}: cannot be read at byte {start + done} "
                f"({error.strerror or error}); check the disk"
            ) from error
        if self.drop_behind:
            self._advise(start, done, "POSIX_FADV_DONTNEED")
        if done < len(view):
            raise CheckpointError(
                f"{self.path}: {what}: the file ends at byte {start + done}, {len(view) - done} of "
                f"{len(view)} bytes are missing; was it changed meanwhile? download it again"
            )

    def _read_some(self, part: memoryview, start: int) -> int:
        """One read, of at least one byte except at the end of the file."""
        if _PREADV is not None:
            return _PREADV(self._file.fileno(), [part], start)
        with self._lock:  # Windows: position and read are two calls
            self._file.seek(start)
            return self._file.readinto(part) or 0

    def close(self) -> None:
        """Give the descriptor back; safe to call twice."""
        self._file.close()


def copy_range(source: Path, start: int, target: FileIO, to: int, size_bytes: int) -> bool:
    """Copy a range of one file into another.

    Inside the system, past this process's memory, where the range begins at the same place of a
    page in both files; else every page would be put together from two, which takes half as long
    again as a small buffer that stays in the processor's cache.

    Args:
        source: file to read.
        start: its first byte.
        target: open for writing.
        to: first byte in the target.
        size_bytes: how many.

    Returns:
        False where the system cannot do it for these files; the range is then to be copied in
        another way. A file that is too short is False too: who reads it will say so.

    Raises:
        OSError: the disk is full or refuses to write.
    """
    if _COPY is None:
        return False
    copy = _copy_inside if (start - to) % _PAGE_BYTES == 0 else _copy_through_buffer
    try:
        with FileIO(str(source), "rb") as file:
            return copy(file, start, target, to, size_bytes)
    except OSError as error:
        if error.errno in _CANNOT_COPY:
            return False
        raise


def _copy_inside(source: FileIO, start: int, target: FileIO, to: int, size_bytes: int) -> bool:
    assert _COPY is not None
    done = 0
    while done < size_bytes:
        arguments = (size_bytes - done, start + done, to + done)
        count = _COPY(source.fileno(), target.fileno(), *arguments)
        if count == 0:
            return False
        done += count
    return True


def _copy_through_buffer(
    source: FileIO, start: int, target: FileIO, to: int, size_bytes: int
) -> bool:
    buffer = memoryview(bytearray(min(_COPY_BYTES, size_bytes)))
    source.seek(start)
    target.seek(to)
    done = 0
    while done < size_bytes:
        # Up to where a page of the target ends, whole pages from there on.
        piece = min(_COPY_BYTES - (to + done) % _COPY_BYTES, size_bytes - done)
        count = source.readinto(buffer[:piece])
        if not count:
            return False
        written = 0
        while written < count:
            written += target.write(buffer[written:count])
        done += count
    return True


def tensor_bytes(tensor_uint8: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous one-dimensional uint8 CPU tensor. Writing changes it."""
    array: Any = tensor_uint8.numpy()  # mypy does not know that arrays are buffers on Python 3.10
    return memoryview(array)


def data_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes. Tensors that are not contiguous or not on the CPU are copied."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().view(-1)
    return tensor_bytes(flat.view(torch.uint8))
