"""Read, convert and write the values of one GGUF tensor.

In: a :class:`GgufTensor`, which names its sources. Out: bytes in the tensor's number format, in
llama.cpp's order of rows. Holds a block of rows, in fp32 and converted; before it a whole source
where the order of rows changes, or where the file has the transposed tensor.

Shape suffixes: E parts that become one tensor, O output rows, I input columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch

from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import CheckpointError

# Values that are converted at a time: 16 MiB in fp32.
_BLOCK_VALUES = 2**22
# Largest magnitude that a number format holds. Blocks of 32 values have a scale, and in q4_1 and
# q5_1 a minimum, in f16.
_F16_LARGEST = 65504.0
_LARGEST = {
    "F16": _F16_LARGEST,
    "BF16": 3.3895e38,
    "Q8_0": 127 * _F16_LARGEST,
    "Q5_0": 16 * _F16_LARGEST,
    "Q4_0": 8 * _F16_LARGEST,
    "Q5_1": _F16_LARGEST,
    "Q4_1": _F16_LARGEST,
}


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
    kind: gguf.GGMLQuantizationType
    rows: slice | None = None
    reorder: Callable[[torch.Tensor], torch.Tensor] | None = None
    factor: float = 1.0
    offset: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(gguf.quant_shape_to_byte_shape(self.shape, self.kind))

    def tofile(self, file: BinaryIO) -> None:
        """Read, convert and write one source after the other.

        Raises:
            CheckpointError: A tensor cannot be read, or the number format cannot hold a value.
        """
        for source in self.sources:
            for block in _row_blocks(self, source):
                _convert(self, block, source).tofile(file)


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
    heads = values.view(groups, -1, head_dim, *values.shape[1:])
    queries, keys, rest = heads[:, :-2], heads[:, -2:-1], heads[:, -1:]
    return torch.cat([part.reshape(-1, *values.shape[1:]) for part in (queries, keys, rest)])


def _row_blocks(tensor: GgufTensor, source: str) -> Iterator[torch.Tensor]:
    """Yield the rows of a source in llama.cpp's order, a block at a time, in the source's dtype."""
    entry = tensor.checkpoint.tensors[source]
    first, last, _ = (tensor.rows or slice(None)).indices(entry.shape[0])
    step = max(1, _BLOCK_VALUES // max(1, math.prod(entry.shape[1:])))
    if tensor.reorder is None and not entry.transposed:
        for start in range(first, last, step):
            yield tensor.checkpoint.read_rows(source, start, min(start + step, last))
        return
    values = tensor.checkpoint.read(source)[first:last]
    if tensor.reorder is not None:
        values = tensor.reorder(values)
    for start in range(0, len(values), step):
        yield values[start : start + step]


def _convert(tensor: GgufTensor, block: torch.Tensor, source: str) -> np.ndarray[Any, Any]:
    """Return a block of rows in the tensor's number format."""
    values = block.float()
    if tensor.offset or tensor.factor != 1.0:
        values = (values + tensor.offset) * tensor.factor
    rows = values.numpy()
    file = tensor.checkpoint.tensors[source].file
    if not np.isfinite(rows).all():
        raise CheckpointError(f"{file}: tensor {source!r} holds NaN or infinity")
    largest = _LARGEST.get(tensor.kind.name, math.inf)
    if np.abs(rows).max(initial=0) > largest:
        raise CheckpointError(
            f"{file}: tensor {source!r} has values beyond {largest:g}, too large for "
            f"{tensor.kind.name.lower()}; take --dtype bf16 or f32"
        )
    # Blocks of denormal numbers divide by zero. Their scale is zero in f16, and so are they.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        converted: np.ndarray[Any, Any] = gguf.quantize(rows, tensor.kind)
    return converted
