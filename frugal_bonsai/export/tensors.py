"""Which tensors a GGUF file has: llama.cpp's names, what each is made from, number formats.

In: a :class:`Checkpoint`, its spec and :class:`Shape`. Out: for each tensor its name, shape,
format and what is done to its values on the way (:mod:`frugal_bonsai.export.values`). Names are
the ``gguf`` package's. Reads no weights.

Shape suffixes: E parts that become one tensor, O output rows, I input columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import UnsupportedModelError
from frugal_bonsai.export.shape import Shape
from frugal_bonsai.model.family import ModelSpec

if TYPE_CHECKING:
    from gguf import TensorNameMap

DTYPES = ("f16", "f32", "q8_0")
QUANTISED_ROW = 32  # values that share a scale in q8_0: rows are multiples of this
# Matrices that llama.cpp wants in f32, as it does all vectors.
_EXACT = ("ffn_gate_inp", "position_embd", "attn_q_norm", "attn_k_norm")
# Tensors that llama.cpp holds in one for all experts, or for the norms of all heads.
_PART = re.compile(r"\.(experts|norms)\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        name: llama.cpp's.
        sources: the checkpoint's; where there are several, ``[E, ...]`` is made of them.
        shape: outermost first.
        dtype: ``f16``, ``f32`` or ``q8_0``.
        rows: the part of the source's rows that is taken; None takes all.
        heads: heads whose rows are put in llama.cpp's order; 0 leaves the order.
        groups: KV groups whose rows lie one group after the other (queries, key, value) and are put
            kind after kind; 0 leaves the order.
        head_dim: rows of a head.
        factor: what values are multiplied by.
        offset: what is added to them, before that.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    rows: slice | None = None
    heads: int = 0
    groups: int = 0
    head_dim: int = 0
    factor: float = 1.0
    offset: float = 0.0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in bytes for q8_0 (34 for 32 values), else in values."""
        if self.dtype != "q8_0":
            return self.shape
        return (*self.shape[:-1], self.shape[-1] // QUANTISED_ROW * (QUANTISED_ROW + 2))

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
    tensors: dict[str, GgufTensor] = {}
    parts: dict[str, dict[int, str]] = {}
    for source, entry in checkpoint.tensors.items():
        if source.endswith("rotary_emb.inv_freq") or (spec.tied and source == spec.family.head):
            continue
        own, part = _whole_name(source)
        for piece, rows in _pieces(own, entry, spec, shape):
            name = _gguf_name(names, piece, source, entry, shape)
            extents = entry.shape if rows is None else (rows.stop - rows.start, *entry.shape[1:])
            tensor = GgufTensor(name=name, sources=(source,), shape=extents, dtype=dtype, rows=rows)
            if part is not None:
                parts.setdefault(name, {})[part] = source
            elif name in tensors:
                raise UnsupportedModelError(
                    f"{entry.file}: tensors {tensors[name].sources[0]!r} and {source!r} have one "
                    f"place in llama.cpp's architecture {shape.architecture!r}, {name}"
                )
            tensors.setdefault(name, tensor)
    for name, sources in parts.items():
        ordered = tuple(sources[part] for part in sorted(sources))
        tensors[name] = replace(
            tensors[name], sources=ordered, shape=(len(ordered), *tensors[name].shape)
        )
    if shape.traits.output and spec.tied:
        tensors["output.weight"] = replace(tensors["token_embd.weight"], name="output.weight")
    return [_finish(tensor, spec, shape) for tensor in tensors.values()]


def _whole_name(source: str) -> tuple[str, int | None]:
    """What a part's name would be if all parts were in one tensor, and the part's number."""
    found = _PART.search(source)
    if found is None:
        return source, None
    middle = ".experts." if found[1] == "experts" else "."
    return source[: found.start()] + middle + source[found.end() :], int(found[2])


def _pieces(
    name: str, entry: TensorEntry, spec: ModelSpec, shape: Shape
) -> Iterator[tuple[str, slice | None]]:
    """The names and rows of what a fused tensor is taken apart into; or the tensor itself."""
    module, _, kind = name.rpartition(".")
    prefix, _, last = module.rpartition(".")
    if last not in shape.fused:
        yield name, None
        return
    layer = next(at for at in range(spec.layers) if name.startswith(spec.prefix(at)))
    keys = shape.kv_heads[layer] * spec.head_dim
    sizes = {"q_proj": shape.heads[layer] * spec.head_dim, "k_proj": keys, "v_proj": keys}
    start = 0
    for piece in shape.fused[last]:
        stop = start + sizes.get(piece, shape.channels[layer])
        yield f"{prefix}.{piece}.{kind}", slice(start, stop)
        start = stop
    assert start == entry.shape[0]


def _gguf_name(
    names: TensorNameMap, piece: str, source: str, entry: TensorEntry, shape: Shape
) -> str:
    name: str | None = names.get_name(piece, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise UnsupportedModelError(
            f"{entry.file}: tensor {source!r} has no place in llama.cpp's architecture "
            f"{shape.architecture!r}"
        )
    tensor = _kind(name)
    if name.startswith("blk.") and name.endswith(".bias") and tensor not in shape.traits.biases:
        raise UnsupportedModelError(
            f"{entry.file}: the model has {source}, and llama.cpp's architecture "
            f"{shape.traits.name!r} has no such bias"
        )
    return name


def _kind(name: str) -> str:
    """``attn_q`` of ``blk.3.attn_q.weight``."""
    return name.split(".")[-2]


def _finish(tensor: GgufTensor, spec: ModelSpec, shape: Shape) -> GgufTensor:
    """Its number format, and what is done to its values."""
    kind, traits = _kind(tensor.name), shape.traits
    number = tensor.dtype
    if len(tensor.shape) == 1 or kind in _EXACT:
        number = "f32"
    elif number == "q8_0" and tensor.shape[-1] % QUANTISED_ROW:
        number = "f16"
    heads = groups = 0
    if kind in ("attn_q", "attn_k") and traits.interleaved:
        layer = int(tensor.name.split(".")[1])
        heads = (shape.heads if kind == "attn_q" else shape.kv_heads)[layer]
    if kind == "attn_qkv" and _lies_by_group(spec):
        groups = spec.kv_heads
    return replace(
        tensor,
        dtype=number,
        heads=heads,
        groups=groups,
        head_dim=spec.head_dim,
        factor=shape.query_factor if kind == traits.query_tensor else 1.0,
        offset=traits.norm_offset if kind.endswith("norm") else 0.0,
    )


def _lies_by_group(spec: ModelSpec) -> bool:
    """Whether a fused tensor of q, k and v has one KV group behind the other."""
    return any(part.width == "group" for part in spec.family.attention_parts)


def formats(tensors: Sequence[GgufTensor]) -> dict[str, int]:
    """How many tensors are stored in each number format."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + 1
    return counts
