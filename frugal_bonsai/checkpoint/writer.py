"""Write safetensors files tensor by tensor.

In: names, dtypes and shapes of all tensors, then the tensors one at a time in any order. Out: one
file, or shards with an index. Files get their final names only when everything is written. Data go
straight to their final offsets, so the writer holds the bytes of one tensor and no open file. It
converts no dtypes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from frugal_bonsai.checkpoint.commit import (
    output_errors,
    partial_name,
    sync_directory,
    write_json,
)
from frugal_bonsai.checkpoint.file_layout import (
    TensorParts,
    TensorSpec,
    build_header,
    plan_shards,
    shard_name,
    spec_bytes,
)
from frugal_bonsai.checkpoint.files import copy_range, data_bytes, write_at
from frugal_bonsai.checkpoint.folder import INDEX_FILE
from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.dtypes import dtype_name

if TYPE_CHECKING:
    import torch

PT_METADATA: Mapping[str, str] = {"format": "pt"}  # transformers refuses files without it


@dataclass(eq=False)
class _Shard:
    """A file that is being written.

    Attributes:
        path: its final name.
        temporary: its name until ``finish``.
        names: names of its tensors.
        incomplete: number of its tensors, or parts of them, that are not written completely.
        renamed: it has its final name.
    """

    path: Path
    temporary: Path
    names: tuple[str, ...]
    incomplete: int = 0
    renamed: bool = False


@dataclass(eq=False)
class _Target:
    """The place of one tensor in its shard, and the progress of writing it."""

    shard: _Shard
    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int
    written_bytes: int = 0
    complete: bool = False  # an empty tensor is complete only after it has been written


class ShardedWriter:
    """Write announced tensors, each once.

    The writer is a context manager. Leaving the block without ``finish`` removes all files.

    Args:
        folder: an existing directory, best one from ``staged_directory``.
        tensors: (name, safetensors dtype, shape) of every tensor, in the order of the files.
        max_shard_bytes: largest number of tensor bytes in one file; a larger tensor gets a file to
            itself.
        metadata: text keys and values for the files' headers.
        parts: tensors of which each part is written as if it were a tensor, under its own name.

    Attributes:
        total_bytes: bytes of all tensors.
        files: final paths of the files.

    Raises:
        OutputError: a file cannot be created.
        ValueError: a name is given twice, the format lacks a dtype, or ``max_shard_bytes`` is not
            positive.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[TensorSpec],
        *,
        max_shard_bytes: int,
        metadata: Mapping[str, str] = PT_METADATA,
        parts: TensorParts | None = None,
    ) -> None:
        self.folder = Path(folder)
        plan = plan_shards(tensors, max_shard_bytes)
        names = [name for name, _, _ in tensors]
        if len(set(names)) != len(names):
            raise ValueError(
                f"tensor names given twice: {sorted({n for n in names if names.count(n) > 1})}"
            )
        self.total_bytes = sum(spec_bytes(spec) for spec in tensors)
        self._shards: list[_Shard] = []
        self._targets: dict[str, _Target] = {}
        self._parts: TensorParts = parts or {}
        self._closed = False
        try:
            for number, specs in enumerate(plan, start=1):
                self._start_shard(shard_name(number, len(plan)), specs, metadata)
        except BaseException:
            self.abort()
            raise

    @property
    def files(self) -> list[Path]:
        """Final paths of the files."""
        return [shard.path for shard in self._shards]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one whole tensor from any device. A contiguous CPU tensor is not copied.

        Raises:
            OutputError: the disk is full or refuses.
            ValueError: the tensor was not announced, is written already, or has another dtype or
                shape; or the writer is closed.
        """
        target = self._incomplete(name)
        if target.written_bytes:
            raise ValueError(f"tensor {name!r} was written in part")
        if dtype_name(tensor.dtype) != target.dtype or tuple(tensor.shape) != target.shape:
            raise ValueError(
                f"tensor {name!r}: got {dtype_name(tensor.dtype)} {tuple(tensor.shape)}, "
                f"announced {target.dtype} {target.shape}"
            )
        self._write(target, tensor)

    def append(self, name: str, rows: torch.Tensor) -> None:
        """Write the next rows of one tensor.

        Args:
            name: the tensor. Other tensors may be written between its rows.
            rows: ``[rows, ...]``, from any device.

        Raises:
            OutputError: the disk is full or refuses.
            ValueError: the tensor was not announced or is complete, the rows have another dtype or
                shape or are too many; or the writer is closed.
        """
        target = self._incomplete(name)
        left_bytes = target.size_bytes - target.written_bytes
        if (
            dtype_name(rows.dtype) != target.dtype
            or tuple(rows.shape[1:]) != target.shape[1:]
            or rows.numel() * rows.element_size() > left_bytes
        ):
            raise ValueError(
                f"tensor {name!r}: got rows {dtype_name(rows.dtype)} {tuple(rows.shape)}, "
                f"announced {target.dtype} {target.shape}, of which {left_bytes} bytes are missing"
            )
        self._write(target, rows)

    def copy(self, name: str, entry: TensorEntry) -> bool:
        """Have the system copy one tensor from a file, past this process's memory.

        Args:
            name: the tensor here.
            entry: its place in the other file; it must have the announced number of bytes.

        Returns:
            False if the system cannot copy between these files, or the bytes in the other file are
            quantised. Nothing is written then; use :meth:`write`.

        Raises:
            OutputError: the disk is full or refuses.
            ValueError: the tensor was not announced, is written already, or has another size; or
                the writer is closed.
        """
        target = self._incomplete(name)
        if target.written_bytes or entry.size_bytes != target.size_bytes:
            raise ValueError(
                f"tensor {name!r}: {entry.size_bytes} bytes for {target.size_bytes}, of which "
                f"{target.written_bytes} are written"
            )
        if entry.gguf_kind is not None:
            return False
        shard = target.shard
        with (
            output_errors(shard.path, entry.size_bytes),
            FileIO(str(shard.temporary), "r+b") as file,
        ):
            if not copy_range(entry.file, entry.start, file, target.start, entry.size_bytes):
                return False
            self._advance(target, entry.size_bytes, file)
        return True

    def finish(self) -> None:
        """Give the files their final names and write the index.

        Raises:
            OutputError: the disk is full or refuses.
            ValueError: an announced tensor was not written, or the writer is closed.
        """
        if self._closed:
            raise ValueError("writer is closed")
        missing = sorted(name for name, target in self._targets.items() if not target.complete)
        if missing:
            raise ValueError(f"tensors never written: {missing}")
        for shard in self._shards:
            with output_errors(shard.path):
                shard.temporary.replace(shard.path)
                shard.renamed = True
        if len(self._shards) > 1:
            weight_map = {name: shard.path.name for shard in self._shards for name in shard.names}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self.folder / INDEX_FILE, index)
        with output_errors(self.folder):
            sync_directory(self.folder)
        self._closed = True

    def abort(self) -> None:
        """Remove all files, unless the writer has finished. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for shard in self._shards:
            with suppress(OSError):
                (shard.path if shard.renamed else shard.temporary).unlink(missing_ok=True)

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _start_shard(
        self, name: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str]
    ) -> None:
        """Create one temporary file with its header."""
        path = self.folder / name
        header, ranges = build_header(specs, metadata)
        shard = _Shard(path=path, temporary=partial_name(path), names=tuple(ranges))
        self._shards.append(shard)
        with output_errors(path), FileIO(str(shard.temporary), "xb") as file:
            write_at(file, memoryview(header), 0)
        by_name = {spec[0]: spec for spec in specs}
        for tensor, (start, end) in ranges.items():
            _, dtype, whole = by_name[tensor]
            for part, shape in self._parts.get(tensor, [(tensor, whole)]):
                size_bytes = spec_bytes((part, dtype, shape))
                self._targets[part] = _Target(shard, dtype, shape, start, size_bytes)
                start, shard.incomplete = start + size_bytes, shard.incomplete + 1
            if start != end:
                raise ValueError(f"tensor {tensor!r}: its parts do not fill it")

    def _incomplete(self, name: str) -> _Target:
        """Return the place of a tensor that is not written completely."""
        if self._closed:
            raise ValueError("writer is closed")
        target = self._targets.get(name)
        if target is None:
            raise ValueError(f"tensor {name!r} was not announced")
        if target.complete:
            raise ValueError(f"tensor {name!r} was already written")
        return target

    def _write(self, target: _Target, tensor: torch.Tensor) -> None:
        """Write a tensor's bytes behind those that are written."""
        shard = target.shard
        data = data_bytes(tensor)
        with (
            output_errors(shard.path, len(data)),
            FileIO(str(shard.temporary), "r+b") as file,
        ):
            write_at(file, data, target.start + target.written_bytes)
            self._advance(target, len(data), file)

    def _advance(self, target: _Target, size_bytes: int, file: FileIO) -> None:
        """Count written bytes, and bring a complete file to the disk."""
        target.written_bytes += size_bytes
        if target.written_bytes == target.size_bytes:
            target.complete = True
            target.shard.incomplete -= 1
            if not target.shard.incomplete:
                os.fsync(file.fileno())
