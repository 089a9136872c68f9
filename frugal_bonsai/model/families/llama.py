"""Llama 1 to 3.x: separate q, k, v projections (MHA or GQA) and a gated FFN."""

from __future__ import annotations

from frugal_bonsai.model.family_schema import Family, Part
from frugal_bonsai.model.units import ATTENTION, FFN

LLAMA = Family(
    model_type="llama",
    models="Llama 1 to 3.x",
    layer_prefix="model.layers.{layer}.",
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.",
    head="lm_head.weight",
    base_module="model",
    layers_module="layers",
    embedding_module="embed_tokens",
    norm_module="norm",
    attention_parts=(
        Part(tensor="self_attn.q_proj.weight", axis=0, width="query"),
        Part(tensor="self_attn.q_proj.bias", axis=0, width="query", required=False),
        Part(tensor="self_attn.k_proj.weight", axis=0, width="head"),
        Part(tensor="self_attn.k_proj.bias", axis=0, width="head", required=False),
        Part(tensor="self_attn.v_proj.weight", axis=0, width="head"),
        Part(tensor="self_attn.v_proj.bias", axis=0, width="head", required=False),
        Part(tensor="self_attn.o_proj.weight", axis=1, width="query"),
    ),
    attention_output="self_attn.o_proj",
    ffn_parts=(
        Part(tensor="mlp.gate_proj.weight", axis=0),
        Part(tensor="mlp.gate_proj.bias", axis=0, required=False),
        Part(tensor="mlp.up_proj.weight", axis=0),
        Part(tensor="mlp.up_proj.bias", axis=0, required=False),
        Part(tensor="mlp.down_proj.weight", axis=1),
    ),
    ffn_output="mlp.down_proj",
    bias_keys={ATTENTION: "attention_bias", FFN: "mlp_bias"},
    heads_divide_hidden=True,
)
