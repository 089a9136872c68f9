"""One safetensors file without a config: tensors that this program saves for its own use.

In: tensors by name, or the path of a file. Out: the file, or a reader of its tensors. Unlike
:class:`ShardedWriter`, :func:`write_tensors` takes all tensors at once; it holds one of them a
second time when it must convert or move it. The header has a checksum of each tensor and of
itself under the key ``checksums``; whoever reads a whole tensor compares it. Files of earlier
versions have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from frugal_bonsai.checkpoint.checksum import DIGITS, TRY_AGAIN, checksum
from frugal_bonsai.checkpoint.commit import replaced_file
from frugal_bonsai.checkpoint.file_layout import build_header
from frugal_bonsai.checkpoint.files import data_bytes, tensor_bytes
from frugal_bonsai.checkpoint.header import TensorEntry, read_header
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.dtypes import dtype_name
from frugal_bonsai.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_CHECKSUMS = "checksums"


def open_tensors(path: Path) -> Checkpoint:
    """Open one safetensors file for reading. The checkpoint's config is empty.

    Whole tensors are compared with their checksums.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    entries, _ = read_header(path)
    return _TensorFile(path, entries, read_checksums(path))


class _TensorFile(Checkpoint):
    """One file whose whole tensors are compared with their checksums."""

    def __init__(
        self, path: Path, tensors: dict[str, TensorEntry], checksums: Mapping[str, str]
    ) -> None:
        super().__init__(path.parent, {}, tensors)
        self._checksums = checksums

    def read_into(self, name: str, buffer_uint8: torch.Tensor) -> torch.Tensor:
        tensor = super().read_into(name, buffer_uint8)
        if name in self._checksums:
            entry = self.tensors[name]
            data = tensor_bytes(buffer_uint8[: entry.size_bytes])
            require_checksum(entry.file, name, data, self._checksums[name])
        return tensor


def read_checksums(path: Path) -> dict[str, str]:
    """Return the checksums of a file's tensors by name; empty if it has none.

    Raises:
        CheckpointError: the header differs from its own checksum.
    """
    entries, metadata = read_header(path)
    found = metadata.get(_CHECKSUMS)
    if found is None:
        return {}
    with path.open("rb") as file:
        header = file.read(min((e.start for e in entries.values()), default=path.stat().st_size))
    values = [found[at : at + DIGITS] for at in range(0, len(found), DIGITS)]
    if len(values) != len(entries) + 1 or _header_checksum(header, found) != values[0]:
        raise CheckpointError(f"{path}: its header differs from its checksum; {TRY_AGAIN}")
    return dict(zip(entries, values[1:], strict=True))


def require_checksum(path: Path, name: str, data: memoryview, expected: str) -> None:
    """Raise unless a tensor's bytes are those that were written.

    Raises:
        CheckpointError: they differ.
    """
    if checksum(data) != expected:
        raise CheckpointError(
            f"{path}: tensor {name!r} differs from its checksum: its bytes are not those that were "
            f"written; {TRY_AGAIN}, and delete the file or start again"
        )


def _header_checksum(header: bytes, checksums: str) -> str:
    """Return the checksum of a header in which the checksums are zeros."""
    return checksum(header.replace(checksums.encode(), b"0" * len(checksums), 1))


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Read one tensor of a safetensors file.

    Raises:
        CheckpointError: the file is missing or damaged, or has no such tensor.
    """
    with open_tensors(path) as file:
        return file.read(name)


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write one safetensors file atomically. An existing file is replaced.

    Args:
        path: the file.
        tensors: tensors by name, on any device.
        metadata: text keys and values for the header.
        dtypes: dtypes to which tensors are converted, one tensor at a time.

    Raises:
        OutputError: the file cannot be written.
        ValueError: the format lacks a dtype.
    """
    dtypes = {name: t.dtype for name, t in tensors.items()} | dict(dtypes or {})
    specs = [(name, dtype_name(dtypes[name]), tuple(t.shape)) for name, t in tensors.items()]
    empty = "0" * DIGITS * (len(tensors) + 1)
    header, ranges = build_header(specs, {**(metadata or {}), _CHECKSUMS: empty})
    size_bytes = max((end for _, end in ranges.values()), default=len(header))
    with replaced_file(path, size_bytes) as file:
        file.write(header)
        found = [checksum(header)]
        for name in ranges:  # in the order of the data
            data = data_bytes(tensors[name].to(dtypes[name]))
            file.write(data)
            found.append(checksum(data))
        file.seek(header.index(empty.encode()))
        file.write("".join(found).encode())
