"""Weights on their way into a GGUF file: llama.cpp's order of rows, number formats.

In: a :class:`Checkpoint` and a :class:`GgufTensor`. Out: its values, one source at a time. Holds
one tensor of the source and what it becomes: of a layer's experts one.

Shape suffixes: O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.export.tensors import GgufTensor

if TYPE_CHECKING:
    import numpy
    import torch

_CHUNK_VALUES = 2**22


class Values:
    """A tensor's values, read as they are written; ``gguf`` asks its own lazy ones no more.

    Args:
        checkpoint: what is read.
        tensor: what is made of it.
    """

    def __init__(self, checkpoint: Checkpoint, tensor: GgufTensor) -> None:
        self._checkpoint, self._tensor = checkpoint, tensor

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self._tensor.size_bytes

    def tofile(self, file: BinaryIO) -> None:
        """Read, convert and write one source after the other.

        Raises:
            CheckpointError: a failing read, or values that the format cannot hold.
        """
        for part in read_parts(self._checkpoint, self._tensor):
            part.tofile(file)


def read_parts(checkpoint: Checkpoint, tensor: GgufTensor) -> Iterator[numpy.ndarray[Any, Any]]:
    """One tensor as it stands in the file, source by source.

    Raises:
        CheckpointError: a failing read, or values that the format cannot hold.
    """
    for source in tensor.sources:
        values = checkpoint.read(source)
        if tensor.rows is not None:
            values = values[tensor.rows]
        if tensor.groups:
            values = by_kind(values, tensor.groups, tensor.head_dim)
        if tensor.heads:
            values = interleave(values, tensor.heads)
        yield _convert(tensor, source, values, str(checkpoint.tensors[source].file))


def interleave(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Put dimension i of each head's second half behind dimension i of its first.

    Args:
        values: ``[O, I]`` or ``[O]``, the rows of ``heads`` heads.
        heads: their number.
    """
    halves = values.view(heads, 2, -1, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def by_kind(values: torch.Tensor, groups: int, head_dim: int) -> torch.Tensor:
    """Put all queries first, then all keys, then all values.

    Args:
        values: ``[O, I]`` or ``[O]``, KV groups one after the other: each the rows of its query
            heads, of its key and of its value.
        groups: their number.
        head_dim: rows of a head.
    """
    import torch

    heads = values.view(groups, -1, head_dim, *values.shape[1:])
    queries, keys, rest = heads[:, :-2], heads[:, -2:-1], heads[:, -1:]
    return torch.cat([part.reshape(-1, *values.shape[1:]) for part in (queries, keys, rest)])


def _convert(
    tensor: GgufTensor, source: str, values: torch.Tensor, file: str
) -> numpy.ndarray[Any, Any]:
    """Offset, factor and number format some rows at a time: fp32 is never held whole for f16."""
    import gguf
    import numpy as np

    kinds: dict[str, np.dtype[Any]] = {
        "f16": np.dtype("<f2"),
        "f32": np.dtype("<f4"),
        "q8_0": np.dtype(np.uint8),
    }
    extents = tensor.stored_shape[-values.dim() :]
    out: numpy.ndarray[Any, Any] = np.empty(extents, dtype=kinds[tensor.dtype])
    rows = len(values)
    step = max(1, _CHUNK_VALUES * rows // max(1, values.numel()))
    for start in range(0, rows, step):
        rows_OI = values[start : start + step].float()
        if tensor.offset or tensor.factor != 1.0:
            rows_OI = (rows_OI + tensor.offset) * tensor.factor
        chunk = rows_OI.numpy()
        if not np.isfinite(chunk).all():
            raise CheckpointError(f"{file}: tensor {source!r} holds NaN or infinity")
        part = out[start : start + step]
        if tensor.dtype == "q8_0":
            part[...] = gguf.quants.quantize(chunk, gguf.GGMLQuantizationType.Q8_0)
            continue
        with np.errstate(over="ignore"):
            part[...] = chunk
        if not np.isfinite(part).all():
            raise CheckpointError(
                f"{file}: tensor {source!r} has values beyond 65504, too large for f16; "
                "take --dtype f32 or q8_0"
            )
    return out
