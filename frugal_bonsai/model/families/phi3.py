"""Phi-3 and Phi-4-mini: q, k and v in one projection, gate and up in another."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import Condition, Part, Peak

_FACTORS = "its config checks the number of rotary factors against the number of heads"

PHI3 = replace(
    LLAMA,
    model_type="phi3",
    models="Phi-3, Phi-4-mini",
    attention_parts=(
        Part(tensor="self_attn.qkv_proj.weight", width="query"),
        Part(tensor="self_attn.qkv_proj.weight", width="head", after=("query",)),
        Part(tensor="self_attn.qkv_proj.weight", width="head", after=("query", "head")),
        Part(tensor="self_attn.o_proj.weight", axis=1, width="query"),
    ),
    ffn_parts=(
        Part(tensor="mlp.gate_up_proj.weight"),
        Part(tensor="mlp.gate_up_proj.weight", after=("one",)),
        Part(tensor="mlp.down_proj.weight", axis=1),
    ),
    heads_divide_hidden=False,
    bias_keys={},
    whole_attention=(
        Condition(key="rope_scaling.type", value="longrope", reason=_FACTORS),
        Condition(key="rope_scaling.rope_type", value="longrope", reason=_FACTORS),
        Condition(key="rope_parameters.rope_type", value="longrope", reason=_FACTORS),
    ),
    sized_by={"config.num_attention_heads": "query", "num_key_value_heads": "kv"},
    peaks=(Peak(hidden=2, ffn=4), Peak(hidden=1, attention=4, key=3)),
    masks=1,
)
