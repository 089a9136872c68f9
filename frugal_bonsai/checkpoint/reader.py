"""Read a checkpoint: one tensor, or some rows of one, at a time.

In: a folder with ``config.json`` and safetensors weights, single or sharded. Out: tensors in the
source's dtype; dtypes are not converted. Opening reads headers only. Files are read at offsets
(pread) into memory that the caller owns and are not mapped, so memory does not grow with the files.
Holds one descriptor per file. Several threads may read at the same time.

Shape suffixes: K looked-up rows, U distinct rows among them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from frugal_bonsai.checkpoint.files import ReadFile, tensor_bytes
from frugal_bonsai.checkpoint.folder import CONFIG_FILE, find_tensors, read_config
from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.checkpoint.page_cache import fits_page_cache, free_memory_bytes
from frugal_bonsai.dtypes import DTYPE_BYTES, torch_dtype
from frugal_bonsai.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class Checkpoint:
    """The config and the tensors of one folder, read-only.

    Attributes:
        folder: the folder.
        config: ``config.json``.
        tensors: the entry of every tensor, in the order of the files and of their data. Keys are
            the names in the files until :meth:`rename_tensors` replaces them.
        carried: tensors of parts that are copied but not computed with, by their names in the
            files.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], tensors: dict[str, TensorEntry]
    ) -> None:
        self.folder = folder
        self.config = config
        self.tensors = tensors
        self.carried: Mapping[str, TensorEntry] = {}
        self._files: dict[Path, ReadFile] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._drop_behind = not fits_page_cache(self.weight_bytes, free_memory_bytes())

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the config and every header of a checkpoint folder.

        Raises:
            CheckpointError: a file is missing or damaged. The text names file and tensor.
        """
        folder = Path(folder)
        return cls(folder, read_config(folder), find_tensors(folder))

    @property
    def config_file(self) -> Path:
        """The file that holds the config, for error texts."""
        return self.folder / CONFIG_FILE

    @property
    def companions(self) -> Path:
        """The folder of the tokenizer, the generation settings and the card."""
        return self.folder

    def rename_tensors(self, tensors: dict[str, TensorEntry]) -> None:
        """Replace the names under which tensors are read, and their orientation.

        Args:
            tensors: name to read by -> entry, which has the name in the file.
        """
        self.tensors = tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        return {name: entry.shape for name, entry in self.tensors.items()}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors in the files, carried ones included."""
        entries = (*self.tensors.values(), *self.carried.values())
        return sum(entry.size_bytes for entry in entries)

    def entry(self, name: str) -> TensorEntry:
        """Return the entry of a tensor, also of a carried one.

        Raises:
            CheckpointError: no such tensor.
        """
        entry = self.tensors.get(name) or self.carried.get(name)
        if entry is None:
            raise CheckpointError(
                f"{self.folder}: has no tensor {name!r} (it has {len(self.tensors)}, the first is "
                f"{next(iter(self.tensors), None)!r}); does config.json belong to these weights?"
            )
        return entry

    def read(self, name: str) -> torch.Tensor:
        """Read one whole tensor into new memory, in the source's dtype.

        Raises:
            CheckpointError: no such tensor or a failing read.
        """
        import torch

        size_bytes = self.entry(name).size_bytes
        return self.read_into(name, torch.empty(size_bytes, dtype=torch.uint8))

    def read_into(self, name: str, buffer_uint8: torch.Tensor) -> torch.Tensor:
        """Read one whole tensor into a buffer.

        Allocates no memory, except for a second copy of a transposed tensor.

        Args:
            name: the tensor.
            buffer_uint8: contiguous one-dimensional uint8 CPU tensor, at least as large as the
                tensor.

        Returns:
            A view of the buffer's first bytes with the tensor's dtype and shape.

        Raises:
            CheckpointError: no such tensor or a failing read.
            ValueError: the buffer has another dtype, device or layout, or is too small.
        """
        entry = self.entry(name)
        view = _buffer_view(entry, buffer_uint8)
        stored = view.new_empty(len(view)) if entry.transposed else view
        file = self._file(entry.file)
        file.advise_sequential(entry.start, entry.size_bytes)
        file.read_into(tensor_bytes(stored), entry.start, f"tensor {name!r}")
        tensor = view.view(torch_dtype(entry.dtype)).view(entry.shape)
        if entry.transposed:
            tensor.copy_(stored.view(tensor.dtype).view(entry.stored_shape).T)
        return tensor

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read rows ``start`` to ``stop`` (excluded) of dimension 0 into new memory.

        Rows are those in the file. For a transposed tensor they are the columns of its shape.

        Raises:
            CheckpointError: no such tensor or a failing read.
            IndexError: the tensor does not have these rows.
        """
        import torch

        entry = self.entry(name)
        rows = torch.empty((stop - start) * _row_bytes(entry), dtype=torch.uint8)
        self.read_rows_into(name, start, stop, rows)
        return rows.view(torch_dtype(entry.dtype)).view(stop - start, *entry.stored_shape[1:])

    def read_rows_into(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> None:
        """Read rows ``start`` to ``stop`` (excluded) into the first bytes of a uint8 CPU buffer.

        Raises:
            CheckpointError: no such tensor or a failing read.
            IndexError: the tensor does not have these rows.
        """
        entry = self.entry(name)
        row_bytes = _row_bytes(entry)
        rows = entry.stored_shape[0]
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} of {name!r}, which has {rows}")
        self._file(entry.file).read_into(
            tensor_bytes(buffer[: (stop - start) * row_bytes]),
            entry.start + start * row_bytes,
            f"tensor {name!r}",
        )

    def announce(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Hint that rows of a tensor (all by default) are about to be read."""
        entry = self.entry(name)
        if not entry.shape:
            return
        row_bytes = _row_bytes(entry)
        stop = entry.stored_shape[0] if stop is None else stop
        first = entry.start + start * row_bytes
        self._file(entry.file).advise_soon(first, (stop - start) * row_bytes)

    def gather_rows(self, name: str, rows_K: torch.Tensor) -> torch.Tensor:
        """Read rows of dimension 0 by index, such as the embeddings of tokens.

        Each distinct row is read once, and neighbouring rows in one read. Holds the distinct rows
        and the result.

        Args:
            name: the tensor.
            rows_K: int64 [K] on the CPU, in any order; rows may repeat.

        Returns:
            [K, ...] in the source's dtype.

        Raises:
            CheckpointError: no such tensor or a failing read.
            IndexError: the tensor does not have one of the rows.
        """
        import torch

        entry = self.entry(name)
        row_bytes = _row_bytes(entry)
        rows_U, where_K = torch.unique(rows_K, sorted=True, return_inverse=True)
        if len(rows_U) and not 0 <= int(rows_U[0]) <= int(rows_U[-1]) < entry.shape[0]:
            raise IndexError(
                f"rows {int(rows_U[0])} to {int(rows_U[-1])} of {name!r}, which has "
                f"{entry.shape[0]}"
            )
        distinct = torch.empty(len(rows_U) * row_bytes, dtype=torch.uint8)
        view, file = tensor_bytes(distinct), self._file(entry.file)
        for first, count, place in _runs(rows_U.tolist()):
            file.read_into(
                view[place * row_bytes : (place + count) * row_bytes],
                entry.start + first * row_bytes,
                f"tensor {name!r}",
            )
        values_U = distinct.view(torch_dtype(entry.dtype)).view(len(rows_U), *entry.shape[1:])
        return values_U[where_K]

    def close(self) -> None:
        """Close the files. Reading afterwards is an error. Safe to call twice."""
        with self._lock:
            self._closed = True
            for file in self._files.values():
                file.close()
            self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _file(self, path: Path) -> ReadFile:
        """Return a file, opened at its first use."""
        with self._lock:
            if self._closed:
                raise ValueError(f"checkpoint {self.folder} is closed")
            if path not in self._files:
                self._files[path] = self._open_file(path, drop_behind=self._drop_behind)
            return self._files[path]

    def _open_file(self, path: Path, *, drop_behind: bool) -> ReadFile:
        """Open a file for reading."""
        return ReadFile(path, drop_behind=drop_behind)


def _buffer_view(entry: TensorEntry, buffer_uint8: torch.Tensor) -> torch.Tensor:
    """Return the first bytes of a buffer, as many as the tensor has."""
    import torch

    if (
        buffer_uint8.dtype != torch.uint8
        or buffer_uint8.device.type != "cpu"
        or buffer_uint8.dim() != 1
        or not buffer_uint8.is_contiguous()
    ):
        raise ValueError("buffer must be a contiguous one-dimensional uint8 tensor on the CPU")
    if buffer_uint8.numel() < entry.size_bytes:
        raise ValueError(
            f"buffer has {buffer_uint8.numel()} bytes, tensor {entry.name!r} {entry.size_bytes}"
        )
    if buffer_uint8.storage_offset() % DTYPE_BYTES[entry.dtype]:
        raise ValueError(f"buffer is not aligned for {entry.dtype}")
    return buffer_uint8[: entry.size_bytes]


def _row_bytes(entry: TensorEntry) -> int:
    """Return the bytes of one row of dimension 0 in the file."""
    if not entry.shape:
        raise IndexError(f"tensor {entry.name!r} is a scalar and has no rows")
    return math.prod(entry.stored_shape[1:]) * DTYPE_BYTES[entry.dtype]


def _runs(rows: list[int]) -> list[tuple[int, int, int]]:
    """Join ascending rows to runs: (first row, number of rows, index of the first in ``rows``)."""
    runs: list[tuple[int, int, int]] = []
    for place, row in enumerate(rows):
        if runs and row == runs[-1][0] + runs[-1][1]:
            first, count, begin = runs[-1]
            runs[-1] = (first, count + 1, begin)
        else:
            runs.append((row, 1, place))
    return runs
