"""Read and write files at offsets, from several threads and into memory that the caller owns.

In: a path, offsets, writable memory. Out: the bytes, in place. Files are not mapped: mapped pages
count as this process's memory, so the memory of a sweep would grow with the checkpoint. Holds one
descriptor per file.
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

# Errors of copy_file_range that mean "not between these files" and not "the disk fails".
_CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_PAGE_BYTES = 4096
# Buffer of a copy whose source and target start at different offsets within a page. Measured: half
# the size takes 25% longer, twice the size several times as long.
_COPY_BYTES = 2**16
# One call of preadv reads at most 2**31 - 4096 bytes on Linux; macOS refuses more than 2**31 - 1.
MAX_READ_BYTES = 2**30
_WRITE_CHUNK_BYTES = 2**30  # one call of write moves less than 2 GiB on Linux

# One WILLNEED call reads ahead at most the disk's read-ahead size, which is often little more.
_SOON_BYTES = 2**20

# None where the platform lacks the call: Windows has none of them, macOS only preadv.
_PREADV: Callable[[int, list[memoryview], int], int] | None = getattr(os, "preadv", None)
_COPY: Callable[..., int] | None = getattr(os, "copy_file_range", None)
_FADVISE: Callable[[int, int, int, int], None] | None = getattr(os, "posix_fadvise", None)


class ReadFile:
    """One file, opened once for positioned reads.

    Attributes:
        path: the file.
        drop_behind: pages leave the system's page cache after they have been read.

    Args:
        path: the file.
        drop_behind: see above; ignored on platforms without ``posix_fadvise``.

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
                "that you may read it"
            ) from error
        self._lock = threading.Lock()

    def advise_sequential(self, start: int, size_bytes: int) -> None:
        """Hint that a long range is about to be read in order."""
        self._advise(start, size_bytes, "POSIX_FADV_SEQUENTIAL")

    def advise_soon(self, start: int, size_bytes: int) -> None:
        """Hint that a range is about to be read, so that the system reads it ahead."""
        for at in range(start, start + size_bytes, _SOON_BYTES):
            size = min(_SOON_BYTES, start + size_bytes - at)
            self._advise(at, size, "POSIX_FADV_WILLNEED")

    def _advise(self, start: int, size_bytes: int, advice: str) -> None:
        """Pass a hint to the system; a no-op on platforms without ``posix_fadvise``."""
        if _FADVISE is not None:
            with suppress(OSError):  # only a hint: the read works without it
                _FADVISE(self._file.fileno(), start, size_bytes, getattr(os, advice))

    def read_into(self, view: memoryview, start: int, what: str) -> None:
        """Fill ``view`` with the bytes from ``start`` on.

        Args:
            view: writable bytes.
            start: offset in the file.
            what: name of the content for the error text (``tensor 'x'``).

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
            end = min(start + done, os.fstat(self._file.fileno()).st_size)
            raise CheckpointError(
                f"{self.path}: {what}: the file ends at byte {end}, {len(view) - done} of "
                f"{len(view)} bytes are missing; was the file changed? download it again"
            )

    def _read_some(self, part: memoryview, start: int) -> int:
        """Read at least one byte, or none at the end of the file; return the number."""
        if _PREADV is not None:
            return _PREADV(self._file.fileno(), [part], start)
        with self._lock:  # without preadv, seek and read are two calls
            self._file.seek(start)
            return self._file.readinto(part) or 0

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        self._file.close()


def copy_range(source: Path, start: int, target: FileIO, to: int, size_bytes: int) -> bool:
    """Copy a range of one file into another.

    If the range starts at the same offset within a page in both files, the system copies it past
    this process's memory. Otherwise the system would assemble every page from two, which takes 50%
    longer than the small buffer that is used instead.

    Args:
        source: file to read.
        start: first byte in the source.
        target: file that is open for writing.
        to: first byte in the target.
        size_bytes: number of bytes.

    Returns:
        False if the system cannot copy between these files, or if the source is too short. The
        caller then copies in another way, which reports a short file.

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
    """Copy with ``copy_file_range``; see :func:`copy_range`."""
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
    """Copy with reads and writes; see :func:`copy_range`."""
    buffer = memoryview(bytearray(min(_COPY_BYTES, size_bytes)))
    source.seek(start)
    target.seek(to)
    done = 0
    while done < size_bytes:
        # Align the writes to the target's pages.
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


def write_at(file: FileIO, data: memoryview, start: int) -> None:
    """Write all of ``data`` at an offset. One call of write may take only a part of it."""
    file.seek(start)
    done = 0
    while done < len(data):
        done += file.write(data[done : done + _WRITE_CHUNK_BYTES])
