"""Weights on their way into a GGUF file: llama.cpp's names, order of rows, number formats.

In: a :class:`Checkpoint`, its spec and :class:`Shape`. Out: for each tensor its name, shape and
format, and, one at a time, its bytes. Holds one tensor of the source and what it becomes.

Shape suffixes: O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import CheckpointError, UnsupportedModelError
from frugal_bonsai.export.architecture import Shape
from frugal_bonsai.model.family import ModelSpec

if TYPE_CHECKING:
    import numpy
    import torch

DTYPES = ("f16", "f32", "q8_0")
_QUANTISED_ROW = 32  # values that share a scale in q8_0: rows are multiples of this
_CHUNK_VALUES = 2**22


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        name: llama.cpp's.
        source: the checkpoint's.
        shape: as in the checkpoint, outermost first.
        dtype: ``f16``, ``f32`` or ``q8_0``.
        heads: heads whose rows are put in llama.cpp's order; 0 leaves the order.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    heads: int

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in bytes for q8_0 (34 for 32 values), else in values."""
        if self.dtype != "q8_0":
            return self.shape
        return (*self.shape[:-1], self.shape[-1] // _QUANTISED_ROW * (_QUANTISED_ROW + 2))

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        size = {"f16": 2, "f32": 4, "q8_0": 1}[self.dtype]
        for extent in self.stored_shape:
            size *= extent
        return size


def list_tensors(
    checkpoint: Checkpoint, spec: ModelSpec, shape: Shape, dtype: str
) -> list[GgufTensor]:
    """Every tensor of the file, in the checkpoint's order.

    Vectors stay f32: llama.cpp wants that. A matrix whose rows are no multiple of 32 cannot be
    quantised and becomes f16, as in llama.cpp's own conversion.

    Raises:
        UnsupportedModelError: a tensor that the GGUF architecture has no name for.
    """
    import gguf

    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[shape.architecture], spec.layers)
    tensors = []
    for source, entry in checkpoint.tensors.items():
        if source.endswith("rotary_emb.inv_freq") or (spec.tied and source == spec.family.head):
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModelError(
                f"{entry.file}: tensor {source!r} has no place in llama.cpp's architecture "
                f"{shape.architecture!r}"
            )
        number = dtype
        if len(entry.shape) == 1:
            number = "f32"
        elif dtype == "q8_0" and entry.shape[-1] % _QUANTISED_ROW:
            number = "f16"
        heads = _heads(name, shape) if shape.interleaved else 0
        tensors.append(
            GgufTensor(name=name, source=source, shape=entry.shape, dtype=number, heads=heads)
        )
    return tensors


def _heads(name: str, shape: Shape) -> int:
    """Heads in the rows of a query or key projection; 0 for other tensors."""
    parts = name.split(".")
    counts = {"attn_q": shape.heads, "attn_k": shape.kv_heads}
    return counts[parts[2]][int(parts[1])] if parts[0] == "blk" and parts[2] in counts else 0


def read_tensor(checkpoint: Checkpoint, tensor: GgufTensor) -> numpy.ndarray[Any, Any]:
    """One tensor as it stands in the file.

    Raises:
        CheckpointError: a failing read, or values that the format cannot hold.
    """
    values = checkpoint.read(tensor.source)
    if tensor.heads:
        values = interleave(values, tensor.heads)
    return _convert(tensor, values, str(checkpoint.tensors[tensor.source].file))


def interleave(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Put dimension i of each head's second half behind dimension i of its first.

    Args:
        values: ``[O, I]`` or ``[O]``, the rows of ``heads`` heads.
        heads: their number.
    """
    halves = values.view(heads, 2, -1, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def _convert(tensor: GgufTensor, values: torch.Tensor, file: str) -> numpy.ndarray[Any, Any]:
    """Change the number format some rows at a time, so that fp32 is never held whole for f16."""
    import gguf
    import numpy as np

    kinds: dict[str, np.dtype[Any]] = {
        "f16": np.dtype("<f2"),
        "f32": np.dtype("<f4"),
        "q8_0": np.dtype(np.uint8),
    }
    out: numpy.ndarray[Any, Any] = np.empty(tensor.stored_shape, dtype=kinds[tensor.dtype])
    rows = len(values)
    step = max(1, _CHUNK_VALUES * rows // max(1, values.numel()))
    for start in range(0, rows, step):
        chunk = values[start : start + step].float().numpy()
        if not np.isfinite(chunk).all():
            raise CheckpointError(f"{file}: tensor {tensor.source!r} holds NaN or infinity")
        part = out[start : start + step]
        if tensor.dtype == "q8_0":
            part[...] = gguf.quants.quantize(chunk, gguf.GGMLQuantizationType.Q8_0)
            continue
        with np.errstate(over="ignore"):
            part[...] = chunk
        if not np.isfinite(part).all():
            raise CheckpointError(
                f"{file}: tensor {tensor.source!r} has values beyond 65504, too large for f16; "
                "take --dtype f32 or q8_0"
            )
    return out


def formats(tensors: Sequence[GgufTensor]) -> dict[str, int]:
    """How many tensors are stored in each number format."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + 1
    return counts
