"""Safetensors files, written tensor by tensor.

In: the names, dtypes and shapes of everything that will be written, then the tensors one at a time
in any order. Out: one file or shards with an index, under their final names only after ``finish``.
Holds the headers and one tensor's bytes, no open file; the data goes to its final offset at once.
Does not convert dtypes. Atomic files and directories come from ``commit.py``, offered here too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from frugal_bonsai.checkpoint.commit import (
    output_errors,
    partial_name,
    replaced_file,
    require_free_space,
    staged_directory,
    sync_directory,
    write_bytes,
    write_json,
)
from frugal_bonsai.checkpoint.files import copy_range, tensor_bytes
from frugal_bonsai.checkpoint.folder import INDEX_FILE, SINGLE_FILE
from frugal_bonsai.checkpoint.header import TensorEntry, build_header, entry_width
from frugal_bonsai.dtypes import dtype_name

if TYPE_CHECKING:
    import torch

__all__ = [
    "ShardedWriter",
    "require_free_space",
    "staged_directory",
    "write_bytes",
    "write_json",
    "write_tensors",
]

TensorSpec = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape
PT_METADATA: Mapping[str, str] = {"format": "pt"}  # transformers asks for it
_WRITE_CHUNK_BYTES = 2**30  # one write moves less than 2 GiB on Linux


@dataclass(eq=False)
class _Shard:
    """One file on its way: its names, where its tensors go, and what is still missing."""

    path: Path
    temporary: Path
    specs: dict[str, TensorSpec]
    ranges: dict[str, tuple[int, int]]
    missing: set[str]
    written_bytes: dict[str, int]
    renamed: bool = False


class ShardedWriter:
    """Writes the tensors that were announced, each once; see the module's text.

    A context manager: leaving the block without ``finish`` removes what was written.

    Args:
        folder: an existing directory; best one from ``staged_directory``.
        tensors: (name, safetensors dtype, shape) of every tensor, in the order of the files.
        max_shard_bytes: tensor bytes of one shard; a larger tensor gets a shard of its own.
        metadata: the files' free-text header part.

    Attributes:
        total_bytes: bytes of all tensors.
        files: final paths of the shards.

    Raises:
        OutputError: a file cannot be created.
        ValueError: a name twice, an unknown dtype, or no room for a single byte in a shard.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[TensorSpec],
        *,
        max_shard_bytes: int,
        metadata: Mapping[str, str] = PT_METADATA,
    ) -> None:
        self.folder = Path(folder)
        plan = plan_shards(tensors, max_shard_bytes)
        names = [name for name, _, _ in tensors]
        if len(set(names)) != len(names):
            raise ValueError(
                f"tensor names given twice: {sorted({n for n in names if names.count(n) > 1})}"
            )
        self.total_bytes = sum(_size_bytes(spec) for spec in tensors)
        self._shards: list[_Shard] = []
        self._shard_of: dict[str, _Shard] = {}
        self._closed = False
        try:
            for number, specs in enumerate(plan, start=1):
                self._start_shard(shard_name(number, len(plan)), specs, metadata)
        except BaseException:
            self.abort()
            raise

    @property
    def files(self) -> list[Path]:
        """Final paths of the shards."""
        return [shard.path for shard in self._shards]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, from any device; no copy is made of a contiguous CPU tensor.

        Raises:
            OutputError: the disk is full or refuses.
            ValueError: not announced, written before, another dtype or shape, or a closed writer.
        """
        shard = self._shard_for(name)
        if shard.written_bytes[name]:
            raise ValueError(f"tensor {name!r} was written in part")
        _, dtype, shape = shard.specs[name]
        if dtype_name(tensor.dtype) != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"tensor {name!r}: got {dtype_name(tensor.dtype)} {tuple(tensor.shape)}, "
                f"announced {dtype} {shape}"
            )
        self._write(shard, name, tensor)

    def append(self, name: str, rows: torch.Tensor) -> None:
        """Write the next rows of one tensor; it is complete with its last one.

        Args:
            name: the tensor; others may be written between its rows.
            rows: ``[rows, ...]``, as in :meth:`write`.

        Raises:
            OutputError: the disk is full or refuses.
            ValueError: not announced, complete, another dtype, rows of another shape or too many of
                them, or a closed writer.
        """
        shard = self._shard_for(name)
        _, dtype, shape = shard.specs[name]
        begin, end = shard.ranges[name]
        left = end - begin - shard.written_bytes[name]
        if (
            dtype_name(rows.dtype) != dtype
            or tuple(rows.shape[1:]) != shape[1:]
            or rows.numel() * rows.element_size() > left
        ):
            raise ValueError(
                f"tensor {name!r}: got rows {dtype_name(rows.dtype)} {tuple(rows.shape)}, "
                f"announced {dtype} {shape}, of which {left} bytes are missing"
            )
        self._write(shard, name, rows)

    def copy(self, name: str, entry: TensorEntry) -> bool:
        """Copy one tensor from a file as it stands there, past this process's memory.

        Args:
            name: the tensor here.
            entry: where its bytes lie, as many as were announced.

        Returns:
            False where the system cannot; nothing is written then, :meth:`write` it.

        Raises:
            OutputError: the disk is full or refuses.
            ValueError: not announced, written before, another size, or a closed writer.
        """
        shard = self._shard_for(name)
        begin, end = shard.ranges[name]
        if shard.written_bytes[name] or entry.size_bytes != end - begin:
            raise ValueError(
                f"tensor {name!r}: {entry.size_bytes} bytes for {end - begin}, of which "
                f"{shard.written_bytes[name]} are written"
            )
        with output_errors(shard.path), FileIO(str(shard.temporary), "r+b") as file:
            if not copy_range(entry.file, entry.start, file, begin, entry.size_bytes):
                return False
            self._count(shard, name, entry.size_bytes, file)
        return True

    def _shard_for(self, name: str) -> _Shard:
        """The shard of a tensor that is not complete."""
        if self._closed:
            raise ValueError("writer is closed")
        shard = self._shard_of.get(name)
        if shard is None:
            raise ValueError(f"tensor {name!r} was not announced")
        if name not in shard.missing:
            raise ValueError(f"tensor {name!r} was already written")
        return shard

    def _write(self, shard: _Shard, name: str, tensor: torch.Tensor) -> None:
        with output_errors(shard.path), FileIO(str(shard.temporary), "r+b") as file:
            data = _memory(tensor)
            _write_at(file, data, shard.ranges[name][0] + shard.written_bytes[name])
            self._count(shard, name, len(data), file)

    def _count(self, shard: _Shard, name: str, size_bytes: int, file: FileIO) -> None:
        """Note what has been written; a shard that has all goes to the disk."""
        begin, end = shard.ranges[name]
        shard.written_bytes[name] += size_bytes
        if begin + shard.written_bytes[name] == end:
            shard.missing.discard(name)
        if not shard.missing:
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Check that nothing is missing, give the files their names and write the index.

        Raises:
            OutputError: the disk is full or refuses.
            ValueError: tensors that were announced and not written.
        """
        missing = [name for shard in self._shards for name in sorted(shard.missing)]
        if missing or self._closed:
            raise ValueError(f"tensors never written: {missing}" if missing else "writer is closed")
        for shard in self._shards:
            with output_errors(shard.path):
                shard.temporary.replace(shard.path)
                shard.renamed = True
        if len(self._shards) > 1:
            weight_map = {name: shard.path.name for name, shard in self._shard_of.items()}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self.folder / INDEX_FILE, index)
        with output_errors(self.folder):
            sync_directory(self.folder)
        self._closed = True

    def abort(self) -> None:
        """Remove everything that is not finished; safe to call twice and after ``finish``."""
        if self._closed:
            return
        self._closed = True
        for shard in self._shards:
            with suppress(OSError):
                (shard.path if shard.renamed else shard.temporary).unlink(missing_ok=True)

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    def _start_shard(
        self, name: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str]
    ) -> None:
        """Create one temporary file with its header."""
        path = self.folder / name
        header, ranges = build_header(specs, metadata)
        shard = _Shard(
            path=path,
            temporary=partial_name(path),
            specs={spec[0]: spec for spec in specs},
            ranges=ranges,
            missing=set(ranges),
            written_bytes=dict.fromkeys(ranges, 0),
        )
        self._shards.append(shard)
        with output_errors(path), FileIO(str(shard.temporary), "xb") as file:
            _write_at(file, memoryview(header), 0)
        self._shard_of.update(dict.fromkeys(ranges, shard))


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write one safetensors file atomically; one that exists is replaced.

    Args:
        path: of the file.
        tensors: by name, on any device.
        metadata: the header's free-text part.
        dtypes: what a tensor is converted to when its turn has come, one at a time.

    Raises:
        OutputError: the file cannot be written.
        ValueError: a dtype that the format lacks.
    """
    dtypes = {name: t.dtype for name, t in tensors.items()} | dict(dtypes or {})
    specs = [(name, dtype_name(dtypes[name]), tuple(t.shape)) for name, t in tensors.items()]
    header, ranges = build_header(specs, metadata or {})
    with replaced_file(path) as file:
        file.write(header)
        for name in ranges:  # in the order of the offsets
            file.write(_memory(tensors[name].to(dtypes[name])))


def plan_shards(tensors: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Fill shards in the given order; the first tensor that does not fit begins the next one.

    Raises:
        ValueError: the limit is not positive, or a dtype that the format lacks.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    shards: list[list[TensorSpec]] = [[]]
    filled_bytes = 0
    for spec in tensors:
        size_bytes = _size_bytes(spec)
        if shards[-1] and filled_bytes + size_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(spec)
        filled_bytes += size_bytes
    return shards


def shard_name(number: int, count: int) -> str:
    """File name of shard ``number`` (from 1) of ``count``, as transformers names them."""
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _size_bytes(spec: TensorSpec) -> int:
    """Bytes of one announced tensor."""
    size_bytes = entry_width(spec[1])
    for length in spec[2]:
        size_bytes *= length
    return size_bytes


def _memory(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes; copied only from another device or out of a strided view."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().view(-1)
    return tensor_bytes(flat.view(torch.uint8))


def _write_at(file: FileIO, data: memoryview, start: int) -> None:
    """Write all of ``data`` at an offset; a raw file may take only a part of it at a time."""
    file.seek(start)
    done = 0
    while done < len(data):
        done += file.write(data[done : done + _WRITE_CHUNK_BYTES])
