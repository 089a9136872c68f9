"""One safetensors file without a config: tensors that this program saves for its own use.

In: tensors by name, or the path of a file. Out: the file, or a reader of its tensors. Unlike
:class:`ShardedWriter`, :func:`write_tensors` takes all tensors at once; it holds one of them a
second time when it must convert or move it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from frugal_bonsai.checkpoint.commit import replaced_file
from frugal_bonsai.checkpoint.file_layout import build_header
from frugal_bonsai.checkpoint.files import data_bytes
from frugal_bonsai.checkpoint.header import read_header
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.dtypes import dtype_name

if TYPE_CHECKING:
    import torch


def open_tensors(path: Path) -> Checkpoint:
    """Open one safetensors file for reading. The checkpoint's config is empty.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    entries, _ = read_header(path)
    return Checkpoint(path.parent, {}, entries)


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
    header, ranges = build_header(specs, metadata or {})
    size_bytes = max((end for _, end in ranges.values()), default=len(header))
    with replaced_file(path, size_bytes) as file:
        file.write(header)
        for name in ranges:  # in the order of the data
            file.write(data_bytes(tensors[name].to(dtypes[name])))
