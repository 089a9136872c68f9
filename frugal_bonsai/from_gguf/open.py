"""Open a GGUF file as a checkpoint.

In: the path of a GGUF file. Out: a :class:`GgufCheckpoint`. Reads headers only; holds them.
"""

from __future__ import annotations

from pathlib import Path

from frugal_bonsai.checkpoint.gguf_header import read_gguf_header
from frugal_bonsai.checkpoint.gguf_reader import GgufCheckpoint, part_files
from frugal_bonsai.dtypes import TORCH_NAMES
from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.from_gguf.companions import write_gguf_companions
from frugal_bonsai.from_gguf.config import read_config
from frugal_bonsai.from_gguf.tensors import choose_dtype, list_views


def open_gguf(path: Path) -> GgufCheckpoint:
    """Open a GGUF file, or all parts of a split one, for reading.

    Args:
        path: the file, or any part.

    Raises:
        CheckpointError: a file is missing or damaged.
        UnsupportedModelError: the architecture, a variant of it, or a number format is not read.
    """
    headers = [read_gguf_header(part) for part in part_files(path)]
    first, tensors = headers[0], {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{header.path}: tensor {name!r} is also in another part; download it again"
                )
            tensors[name] = tensor
    dtype = choose_dtype(tensors)
    config, notes = read_config(first, tensors, TORCH_NAMES[dtype])
    return GgufCheckpoint(
        first,
        config,
        list_views(headers, config, dtype),
        lambda folder: write_gguf_companions(first, config, folder),
        notes,
    )
