"""Give the tensors of a GGUF file the names, shapes and order of rows of transformers.

In: headers and config. Out: one :class:`GgufView` per tensor of the model. The reverse of
:mod:`frugal_bonsai.export.tensors`. Reads no tensor data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from frugal_bonsai.checkpoint.gguf_file import GgufView
from frugal_bonsai.checkpoint.gguf_header import GgufHeader, GgufTensor
from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.dtypes import DTYPE_BYTES
from frugal_bonsai.errors import CheckpointError, UnsupportedModelError
from frugal_bonsai.export.architecture import ARCHITECTURES
from frugal_bonsai.from_gguf.rope import FACTOR_TENSORS
from frugal_bonsai.model.families import FAMILIES
from frugal_bonsai.model.family_schema import Family

if TYPE_CHECKING:
    import numpy

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_FFN = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_LLAMA = _NORMS | _ATTENTION | _FFN
_GEMMA = _LLAMA | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = "mlp.experts.{expert}."
_MIXTURE = (_LLAMA | {"ffn_gate_inp": "mlp.gate"}) | {
    f"{role}_exps": name.replace("mlp.", _EXPERTS) for role, name in _FFN.items()
}
_FUSED = {
    "attn_norm": "input_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
# model_type -> llama.cpp's name of a tensor in a layer -> the module in the layer. The names of all
# others are those of Llama.
_ROLES = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": _GEMMA,
    "exaone4": _GEMMA,
    "seed_oss": _LLAMA | {"post_attention_norm": "post_attention_layernorm"},
    "starcoder2": _LLAMA | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    "glm": _LLAMA | {"ffn_up": "mlp.gate_up_proj"},
    "glm4": _LLAMA
    | {
        "ffn_up": "mlp.gate_up_proj",
        "post_attention_norm": "post_self_attn_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
    },
    "hunyuan_v1_dense": _LLAMA
    | {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
    "phi3": _LLAMA | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "gpt2": {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    "gpt_neox": _FUSED
    | {
        "attn_qkv": "attention.query_key_value",
        "attn_output": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
    },
    "falcon": _FUSED
    | {"attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense"},
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), _MIXTURE),
}
# A pruned qwen2 may be written as a llama, whose rows are in another order.
_INTERLEAVED = {own.name for own in ARCHITECTURES.values() if own.interleaved}
_POSITIONS = {"gpt2": "transformer.wpe.weight"}


@dataclass(frozen=True, kw_only=True)
class _Model:
    """Facts about the model that tensors depend on.

    Attributes:
        family: Table of names.
        config: The config.
        dtype: Dtype in which tensors are read.
        interleaved: The rows of q and k are in llama.cpp's order.
    """

    family: Family
    config: Mapping[str, Any]
    dtype: str
    interleaved: bool


def choose_dtype(tensors: Mapping[str, GgufTensor]) -> str:
    """Return the safetensors dtype in which a file's weights are read.

    bf16 if any matrix is quantised: fp16 has three more bits, but the activations of some models
    (Gemma 3) overflow in it. Otherwise the dtype that holds most values of the matrices.
    """
    values: dict[str, int] = {}
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            values[tensor.kind] = values.get(tensor.kind, 0) + math.prod(tensor.shape)
    if not values or values.keys() - {"F32", "F16", "BF16"}:
        return "BF16"
    return max(values, key=lambda kind: values[kind])


def list_views(
    headers: Sequence[GgufHeader], config: Mapping[str, Any], dtype: str
) -> list[GgufView]:
    """Return the tensors of the model.

    Args:
        headers: headers of the file, or of all parts of a split one.
        config: the model's config.
        dtype: safetensors name of the dtype in which they are read.

    Raises:
        UnsupportedModelError: a tensor has no place in the model, or a number format that the
            ``gguf`` package cannot dequantise.
        CheckpointError: a tensor has a shape that its name contradicts.
    """
    model = _Model(
        family=FAMILIES[config["model_type"]],
        config=config,
        dtype=dtype,
        interleaved=headers[0].metadata["general.architecture"] in _INTERLEAVED,
    )
    views: list[GgufView] = []
    for header in headers:
        position = 0
        for tensor in header.tensors.values():
            if tensor.name in FACTOR_TENSORS:
                continue
            _require_readable(header, tensor)
            for view in _views(header, tensor, model):
                size = math.prod(view.entry.shape) * DTYPE_BYTES[dtype]
                entry = replace(view.entry, start=position, end=position + size)
                views.append(replace(view, entry=entry))
                position += size
    return views


def _views(header: GgufHeader, tensor: GgufTensor, model: _Model) -> Iterator[GgufView]:
    """Yield the tensors of the model that one tensor of the file holds, without their offsets."""
    name, traits = _name(header, tensor, model), ARCHITECTURES[model.config["model_type"]]
    shape = tensor.shape
    entry = TensorEntry(
        name=name,
        dtype=model.dtype,
        shape=shape,
        file=header.path,
        start=0,
        end=0,
        gguf_kind=tensor.kind,
    )
    if "{expert}" in name:
        if len(shape) != 3:
            raise _wrong_shape(header, tensor, "expected [experts, rows, columns]")
        for expert in range(shape[0]):
            named = replace(entry, name=name.format(expert=expert), shape=shape[1:])
            yield GgufView(entry=named, source=tensor, first_row=expert * shape[1])
        return
    if len(shape) > 2:
        raise _wrong_shape(header, tensor, "expected at most two dimensions")
    if len(shape) == 2 and name.endswith(model.family.transposed):
        yield GgufView(entry=replace(entry, shape=shape[::-1]), source=tensor, columns_first=True)
        return
    yield GgufView(
        entry=entry,
        source=tensor,
        order_R=_order(header, tensor, model),
        minus=traits.norm_offset if name.endswith("norm.weight") else 0.0,
    )


def _name(header: GgufHeader, tensor: GgufTensor, model: _Model) -> str:
    """Return transformers' name of a tensor, as files have it."""
    family, model_type = model.family, model.config["model_type"]
    role, _, kind = tensor.name.rpartition(".")
    outer = {
        "token_embd.weight": family.embedding,
        "output.weight": family.stored_as.get(family.head, family.head),
        "position_embd.weight": _POSITIONS.get(model_type),
    }
    if role == "output_norm":
        return family.final_norm + kind
    if tensor.name in outer and outer[tensor.name] is not None:
        return str(outer[tensor.name])
    parts, roles = role.split("."), _ROLES.get(model_type, _LLAMA)
    if model.config.get("num_ln_in_parallel_attn") == 2:
        roles = roles | {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}
    if len(parts) != 3 or parts[0] != "blk" or not parts[1].isdigit() or parts[2] not in roles:
        raise UnsupportedModelError(
            f"{header.path}: tensor {tensor.name!r} has no place in transformers' {model_type}; "
            "this variant is not read from GGUF files: use the original checkpoint"
        )
    prefix = family.layer_prefix.format(layer=int(parts[1]))
    return family.file_name(f"{prefix}{roles[parts[2]]}.{kind}")


def _order(header: GgufHeader, tensor: GgufTensor, model: _Model) -> Any:
    """Return the row of the file for each row of the tensor; None if they are the same.

    llama.cpp puts dimension i of a head's second half behind dimension i of its first, and all
    queries of a fused tensor first, then all keys, then all values.
    """
    role, family, rows = tensor.name.split(".")[-2], model.family, tensor.shape[0]
    if role == "attn_qkv" and any(part.width == "group" for part in family.attention_parts):
        heads = model.config[family.heads_key]
        groups = model.config[family.kv_heads_key]
        if rows % (heads + 2 * groups):
            raise _wrong_shape(header, tensor, f"expected rows for {heads} + 2 * {groups} heads")
        return _by_group(rows, heads, groups)
    if role not in ("attn_q", "attn_k") or not model.interleaved:
        return None
    heads = model.config[family.heads_key if role == "attn_q" else family.kv_heads_key]
    if rows % (2 * heads):
        raise _wrong_shape(header, tensor, f"expected rows for {heads} heads")
    return _halves_first(rows, heads)


@cache
def _halves_first(rows: int, heads: int) -> numpy.ndarray[Any, Any]:
    """Return the rows of interleaved heads, the first half of each head first."""
    import numpy

    return numpy.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel()


@cache
def _by_group(rows: int, heads: int, groups: int) -> numpy.ndarray[Any, Any]:
    """Return the rows of a fused tensor: of each KV group its queries, its key and its value."""
    import numpy

    rows_HD = numpy.arange(rows).reshape(heads + 2 * groups, -1)
    queries = rows_HD[:heads].reshape(groups, -1)
    keys, values = rows_HD[heads : heads + groups], rows_HD[heads + groups :]
    return numpy.concatenate([queries, keys, values], axis=1).ravel()


def _require_readable(header: GgufHeader, tensor: GgufTensor) -> None:
    """Raise for a number format that is not dequantised, or that a vector cannot have."""
    vector = len(tensor.shape) == 1
    if _dequantises(tensor.kind) and not (vector and tensor.kind not in ("F32", "F16", "BF16")):
        return
    raise UnsupportedModelError(
        f"{header.path}: tensor {tensor.name!r} has the number format {tensor.kind}, which "
        + ("no vector can have" if vector else "the gguf package does not dequantise")
        + "; use a file of another quantisation, or the original checkpoint"
    )


@cache
def _dequantises(kind: str) -> bool:
    """Return whether the ``gguf`` package dequantises a number format."""
    import gguf
    import numpy

    number = gguf.GGMLQuantizationType[kind]
    block = numpy.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), numpy.uint8)
    try:
        gguf.quants.dequantize(block, number)
    except NotImplementedError:
        return False
    return True


def _wrong_shape(header: GgufHeader, tensor: GgufTensor, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{header.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, {expected}; "
        "download the file again or restore it from a copy"
    )
