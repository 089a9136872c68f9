"""Read, convert and write the values of one GGUF tensor.

In: a :class:`GgufTensor`, which names its sources. Out: bytes in the tensor's number format, in
llama.cpp's order of rows. Holds one tensor of the checkpoint and a few million converted values.

Shape suffixes: E parts that become one tensor, O output rows, I input columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import CheckpointError

if TYPE_CHECKING:
    import numpy
    import torch
    from gguf import GGMLQuantizationType

_CHUNK_VALUES = 2**22


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor of the file, whose values are read while they are written.

    Stands in for an array in ``gguf.GGUFWriter.write_tensor_data``, which uses ``nbytes`` and
    ``tofile`` only.

    Attributes:
        name: llama.cpp's name.
        checkpoint: Holds the sources.
        sources: Names of the checkpoint's tensors. Experts, and norms of heads, are stacked to
            ``[E, ...]``.
        shape: In values, outermost extent first.
        kind: Number format.
        rows: The rows of the source that are taken; None takes all.
        reorder: Puts the rows in llama.cpp's order; None leaves the order.
        factor: Multiplies the values, after ``offset``.
        offset: Is added to the values.
    """

    name: str
    checkpoint: Checkpoint
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    rows: slice | None = None
    reorder: Callable[[torch.Tensor], torch.Tensor] | None = None
    factor: float = 1.0
    offset: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        import gguf

        return math.prod(gguf.quant_shape_to_byte_shape(self.shape, self.kind))

    def tofile(self, file: BinaryIO) -> None:
        """Read, convert and write one source after the other.

        Raises:
            CheckpointError: A tensor cannot be read, or the number format cannot hold a value.
        """
        for source in self.sources:
            values = self.checkpoint.read(source)
            if self.rows is not None:
                values = values[self.rows]
            if self.reorder is not None:
                values = self.reorder(values)
            for chunk in _convert(self, values, source):
                chunk.tofile(file)


def interleave(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Put dimension i of each head's second half behind dimension i of its first.

    Args:
        values: ``[O, I]`` or ``[O]``, the rows of ``heads`` heads.
        heads: Number of heads.
    """
    halves = values.view(heads, 2, -1, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def by_kind(values: torch.Tensor, groups: int, head_dim: int) -> torch.Tensor:
    """Put all queries first, then all keys, then all values.

    Args:
        values: ``[O, I]`` or ``[O]``, one KV group after the other: the rows of its query heads, of
            its key and of its value.
        groups: Number of KV groups.
        head_dim: Rows of a head.
    """
    import torch

    heads = values.view(groups, -1, head_dim, *values.shape[1:])
    queries, keys, rest = heads[:, :-2], heads[:, -2:-1], heads[:, -1:]
    return torch.cat([part.reshape(-1, *values.shape[1:]) for part in (queries, keys, rest)])


def _convert(
    tensor: GgufTensor, values: torch.Tensor, source: str
) -> Iterator[numpy.ndarray[Any, Any]]:
    """Yield the values in the tensor's number format, some rows at a time."""
    import gguf
    import numpy as np

    file = tensor.checkpoint.tensors[source].file
    step = max(1, _CHUNK_VALUES * len(values) // max(1, values.numel()))
    for start in range(0, len(values), step):
        rows_OI = values[start : start + step].float()
        if tensor.offset or tensor.factor != 1.0:
            rows_OI = (rows_OI + tensor.offset) * tensor.factor
        rows = rows_OI.numpy()
        if not np.isfinite(rows).all():
            raise CheckpointError(f"{file}: tensor {source!r} holds NaN or infinity")
        with np.errstate(over="ignore"):
            chunk = gguf.quantize(rows, tensor.kind)
        if not np.isfinite(chunk).all():
            raise CheckpointError(
                f"{file}: tensor {source!r} has values beyond 65504, too large for f16; "
                "take --dtype bf16, f32 or q8_0"
            )
        yield chunk
