"""Refusing NaN and infinity, a chunk at a time.

In: a tensor, or names of tensors in an open checkpoint. Out: nothing, or an error that names file
and tensor. Holds one chunk; of a tensor on disk some of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from frugal_bonsai.checkpoint.reader import Checkpoint

_CHUNK_ELEMENTS = 2**20  # looked at together


def require_finite(entry: TensorEntry, tensor: torch.Tensor) -> None:
    """Refuse a tensor that holds NaN or infinity.

    Args:
        entry: where it is from, for the error text.
        tensor: its values.

    Raises:
        CheckpointError: naming file and tensor, and how many values are bad.
    """
    _refuse(entry, _count_bad(tensor))


def require_finite_on_disk(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Refuse tensors of a checkpoint that hold NaN or infinity, such as a large embedding.

    Args:
        checkpoint: where they lie.
        names: tensors of one dimension or more.

    Raises:
        CheckpointError: as above, or a failing read.
    """
    for name in names:
        entry = checkpoint.tensors[name]
        step = max(1, _CHUNK_ELEMENTS // max(1, math.prod(entry.stored_shape[1:])))
        bad, rows = 0, entry.stored_shape[0]
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            bad += _count_bad(checkpoint.read_rows(name, start, stop))
        _refuse(entry, bad)


def _count_bad(tensor: torch.Tensor) -> int:
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
    if bad:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name!r}: {bad} of {math.prod(entry.shape)} values are "
            "NaN or infinite; such a model cannot be pruned: download it again or use another "
            "checkpoint"
        )
