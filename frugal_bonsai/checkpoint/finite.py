"""Refuse tensors of a checkpoint that hold NaN or infinity.

In: an open checkpoint and names of its tensors. Out: the tensor or nothing, or an error that names
file, tensor and number of bad values. Holds the tensor that is read; when nothing is returned, only
a few megabytes of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_CHUNK_ELEMENTS = 2**20  # elements that are checked together


def read_finite(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Read one whole tensor, as ``Checkpoint.read`` does, and check its values.

    Raises:
        CheckpointError: a failing read, or a value is NaN or infinite.
    """
    tensor = checkpoint.read(name)
    _refuse(checkpoint.tensors[name], _count_bad(tensor))
    return tensor


def require_finite(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Check the values of tensors without holding a whole one, such as a large embedding.

    Raises:
        CheckpointError: a failing read, or a value is NaN or infinite.
    """
    for name in names:
        entry = checkpoint.tensors[name]
        if not entry.shape:
            read_finite(checkpoint, name)
            continue
        step = max(1, _CHUNK_ELEMENTS // max(1, math.prod(entry.stored_shape[1:])))
        bad, rows = 0, entry.stored_shape[0]
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            bad += _count_bad(checkpoint.read_rows(name, start, stop))
        _refuse(entry, bad)


def _count_bad(tensor: torch.Tensor) -> int:
    """Count the values that are NaN or infinite, one chunk at a time."""
    if not tensor.dtype.is_floating_point:
        return 0
    bad, flat = 0, tensor.view(-1)
    for begin in range(0, len(flat), _CHUNK_ELEMENTS):
        chunk = flat[begin : begin + _CHUNK_ELEMENTS]
        if chunk.element_size() == 1:  # torch has no isfinite for 8-bit floats
            chunk = chunk.float()
        bad += chunk.numel() - int(chunk.isfinite().sum())
    return bad


def _refuse(entry: TensorEntry, bad: int) -> None:
    """Raise the error of a tensor that has bad values."""
    if bad:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name!r}: {bad} of {math.prod(entry.shape)} values are "
            "NaN or infinite; such a model cannot be pruned: download it again or use another "
            "checkpoint"
        )
