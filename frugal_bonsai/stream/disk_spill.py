"""Hidden states on disk, where host memory is too short for them.

In: the windows of a micro-batch. Out: their hidden states, to the bit. The file has no name, so the
system removes it with the process, however that ends. Windows are read and written in order; the
system reads the next micro-batch ahead. Where the file does not fit into free memory, its pages
leave the page cache behind the reader and the writer.

Memory: one micro-batch, and a checksum of each window, which is compared at every reading.

Shape suffixes: B windows of a micro-batch, S tokens of a window, H hidden.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from frugal_bonsai.checkpoint.checksum import TRY_AGAIN, checksum
from frugal_bonsai.checkpoint.commit import output_errors
from frugal_bonsai.checkpoint.files import tensor_bytes
from frugal_bonsai.checkpoint.page_cache import fits_page_cache, free_memory_bytes
from frugal_bonsai.errors import OutputError


class DiskSpill:
    """Hidden states of ``windows`` windows in a file.

    Args:
        windows: number of windows.
        window: S, number of tokens of each.
        hidden: H.
        device: where micro-batches are computed; it shares the host's memory.
        dtype: compute dtype.
        folder: folder of the file.

    Raises:
        OutputError: the folder cannot be written, or its disk has too little room.
    """

    def __init__(
        self,
        windows: int,
        window: int,
        hidden: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        folder: Path,
    ) -> None:
        self._windows, self._shape = windows, (window, hidden)
        self._device, self._dtype, self._folder = device, dtype, folder
        self._each = window * hidden * dtype.itemsize
        size = windows * self._each
        with output_errors(folder / "hidden states", size):
            # Closed by the garbage collector with the last reference.
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, size)
            else:
                self._file.truncate(size)
        self._drop_behind = not fits_page_cache(size, free_memory_bytes())
        self._written = slice(0, 0)
        self._checksums: dict[int, str] = {}  # of the windows that were written

    def read(self, items: slice) -> torch.Tensor:
        """Return ``[B, S, H]`` on the device, a copy.

        Raises:
            OutputError: the disk fails, or gives other bytes than were written.
        """
        host_BSH = torch.empty(items.stop - items.start, *self._shape, dtype=self._dtype)
        view, done = tensor_bytes(host_BSH.view(torch.uint8).flatten()), 0
        with output_errors(self._folder / "hidden states"):
            self._file.seek(items.start * self._each)
            while done < len(view):
                count = self._file.readinto(view[done:])
                if not count:
                    raise OutputError(
                        f"{self._folder}: the file of hidden states ends early; check the disk"
                    )
                done += count
        for window, part in self._parts(items, view):
            if self._checksums.get(window) not in (None, checksum(part)):
                raise OutputError(
                    f"{self._folder}: hidden states of window {window} come back from the disk "
                    f"other than they were written; {TRY_AGAIN}, and continue with --resume"
                )
        self._advise(items, "POSIX_FADV_DONTNEED", needed=self._drop_behind)
        following = slice(items.stop, min(self._windows, 2 * items.stop - items.start))
        self._advise(following, "POSIX_FADV_WILLNEED")
        return host_BSH.to(self._device)

    def write(self, items: slice, hidden_BSH: torch.Tensor) -> None:
        """Store these windows' new hidden states ``[B, S, H]``.

        Raises:
            OutputError: the disk fails.
        """
        host_BSH = hidden_BSH.to(device="cpu", dtype=self._dtype).contiguous()
        view, done = tensor_bytes(host_BSH.view(torch.uint8).flatten()), 0
        with output_errors(self._folder / "hidden states"):
            self._file.seek(items.start * self._each)
            while done < len(view):
                done += self._file.write(view[done:])
        for window, part in self._parts(items, view):
            self._checksums[window] = checksum(part)
        # The first advice starts to write a range out, the second one drops it.
        for written in (self._written, items):
            self._advise(written, "POSIX_FADV_DONTNEED", needed=self._drop_behind)
        self._written = items

    def _parts(self, items: slice, view: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yield each window with its bytes."""
        for at, window in enumerate(range(items.start, items.stop)):
            yield window, view[at * self._each : (at + 1) * self._each]

    def _advise(self, items: slice, advice: str, *, needed: bool = True) -> None:
        """Pass a hint on a range to the system; a no-op where the platform has none."""
        size = (items.stop - items.start) * self._each
        if needed and size > 0 and hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                value = getattr(os, advice)
                os.posix_fadvise(self._file.fileno(), items.start * self._each, size, value)
