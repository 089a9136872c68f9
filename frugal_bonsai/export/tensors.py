"""List the tensors of a GGUF file.

In: a :class:`Checkpoint`, its spec and :class:`Shape`. Out: for each tensor of the file its name,
shape and number format, its sources in the checkpoint, and how their values change. Names, number
formats and their sizes are the ``gguf`` package's. Reads no weights.

Shape suffixes: E parts that become one tensor, O output rows, I input columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import gguf
import torch

from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import UnsupportedModelError
from frugal_bonsai.export.gguf_tensor import GgufTensor, by_kind, interleave
from frugal_bonsai.export.shape import Shape
from frugal_bonsai.model.family import ModelSpec

# What the gguf package can quantise to, without the ternary formats.
DTYPES = ("f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_BY_NAME = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
# Matrices that llama.cpp wants in f32, as it wants all vectors.
_EXACT = ("ffn_gate_inp", "position_embd", "attn_q_norm", "attn_k_norm")


def list_tensors(
    checkpoint: Checkpoint, spec: ModelSpec, shape: Shape, dtype: str
) -> list[GgufTensor]:
    """Return every tensor of the file, layer after layer.

    Vectors stay f32, as llama.cpp wants. A matrix whose rows are no multiple of the blocks of 32
    becomes f16, as in llama.cpp. Embedding and head have the format of all matrices: in q8_0 they
    cost more bytes than the next larger format of all, and give less (measured: docs/results/).

    Raises:
        UnsupportedModelError: The GGUF architecture has no name for a tensor.
    """
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    architecture = _BY_NAME[shape.architecture]
    names = gguf.get_tensor_name_map(architecture, spec.layers)
    tensors: dict[str, GgufTensor] = {}
    for source in sorted(checkpoint.tensors, key=_in_numeric_order):
        if source.endswith("rotary_emb.inv_freq") or (spec.tied and source == spec.family.head):
            continue
        entry, whole = checkpoint.tensors[source], _whole_name(source)
        for piece, rows in _pieces(whole, entry, spec, shape):
            stored = (piece, spec.family.file_name(piece))
            name = _gguf_name(names, stored, source, entry, shape)
            if name in tensors and whole != source:
                tensors[name] = _with_part(tensors[name], source)
                continue
            if name in tensors:
                raise UnsupportedModelError(
                    f"{entry.file}: tensors {tensors[name].sources[0]!r} and {source!r} have one "
                    f"place in llama.cpp's architecture {shape.architecture!r}, {name}"
                )
            extents = entry.shape if rows is None else (rows.stop - rows.start, *entry.shape[1:])
            if whole != source:
                extents = (1, *extents)
            tensors[name] = GgufTensor(
                name=name,
                checkpoint=checkpoint,
                sources=(source,),
                shape=extents,
                kind=kind,
                rows=rows,
            )
    if shape.traits.output and spec.tied:
        tensors["output.weight"] = replace(tensors["token_embd.weight"], name="output.weight")
    return [_finish(tensor, spec, shape) for tensor in tensors.values()]


def _in_numeric_order(name: str) -> list[int | str]:
    """Return a sort key by which expert 10 follows expert 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _whole_name(source: str) -> str:
    """Return the name of the tensor that holds all experts, or the norms of all heads.

    llama.cpp stacks these; the ``gguf`` package knows the name without the number.
    """
    source = re.sub(r"\.norms\.\d+\.", ".", source)
    return re.sub(r"\.\w+\.experts\.\d+\.", ".mlp.experts.", source)


def _with_part(tensor: GgufTensor, source: str) -> GgufTensor:
    """Return the stack of an expert's, or a head's, tensors with one more."""
    parts, *extents = tensor.shape
    return replace(tensor, sources=(*tensor.sources, source), shape=(parts + 1, *extents))


def _pieces(
    name: str, entry: TensorEntry, spec: ModelSpec, shape: Shape
) -> Iterator[tuple[str, slice | None]]:
    """Yield the names and rows of a fused tensor's pieces; or the tensor itself."""
    module, _, kind = name.rpartition(".")
    prefix, _, last = module.rpartition(".")
    if last not in shape.traits.fused:
        yield name, None
        return
    layer = next(at for at in range(spec.layers) if name.startswith(spec.prefix(at)))
    keys = shape.kv_heads[layer] * spec.head_dim
    sizes = {"q_proj": shape.heads[layer] * spec.head_dim, "k_proj": keys, "v_proj": keys}
    start = 0
    for piece in shape.traits.fused[last]:
        stop = start + sizes.get(piece, shape.channels[layer])
        yield f"{prefix}.{piece}.{kind}", slice(start, stop)
        start = stop
    assert start == entry.shape[0]


def _gguf_name(
    names: gguf.TensorNameMap,
    pieces: tuple[str, ...],
    source: str,
    entry: TensorEntry,
    shape: Shape,
) -> str:
    """Return the first name that the architecture has for a tensor's names."""
    found = (names.get_name(piece, try_suffixes=(".weight", ".bias")) for piece in pieces)
    name: str | None = next(filter(None, found), None)
    if name is None:
        raise UnsupportedModelError(
            f"{entry.file}: tensor {source!r} has no place in llama.cpp's architecture "
            f"{shape.architecture!r}"
        )
    if (
        name.startswith("blk.")
        and name.endswith(".bias")
        and _role(name) not in shape.traits.biases
    ):
        raise UnsupportedModelError(
            f"{entry.file}: the model has {source}, and llama.cpp's architecture "
            f"{shape.traits.name!r} has no such bias"
        )
    return name


def _role(name: str) -> str:
    """Return ``attn_q`` of ``blk.3.attn_q.weight``."""
    return name.split(".")[-2]


def _finish(tensor: GgufTensor, spec: ModelSpec, shape: Shape) -> GgufTensor:
    """Return the tensor with its number format, and with the changes of its values."""
    role, traits, kind = _role(tensor.name), shape.traits, tensor.kind
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if len(tensor.shape) == 1 or role in _EXACT:
        kind = gguf.GGMLQuantizationType.F32
    elif tensor.shape[-1] % block:
        kind = gguf.GGMLQuantizationType.F16
    reorder: Callable[[torch.Tensor], torch.Tensor] | None = None
    if role in ("attn_q", "attn_k") and traits.interleaved:
        layer = int(tensor.name.split(".")[1])
        heads = shape.heads if role == "attn_q" else shape.kv_heads
        reorder = partial(interleave, heads=heads[layer])
    # Some families lay out a fused q, k, v by KV group.
    if role == "attn_qkv" and any(part.width == "group" for part in spec.family.attention_parts):
        reorder = partial(by_kind, groups=spec.kv_heads, head_dim=spec.head_dim)
    return replace(
        tensor,
        kind=kind,
        reorder=reorder,
        factor=shape.query_factor if role == traits.query_tensor else 1.0,
        offset=traits.norm_offset if tensor.name.endswith("norm.weight") else 0.0,
    )
