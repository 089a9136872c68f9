"""GPT-2: weights stored as [input, output], q, k and v in one projection, learned positions."""

from __future__ import annotations

from frugal_bonsai.model.family_schema import Condition, Family, Part, Peak

GPT2 = Family(
    model_type="gpt2",
    models="GPT-2",
    layer_prefix="transformer.h.{layer}.",
    embedding="transformer.wte.weight",
    final_norm="transformer.ln_f.",
    head="lm_head.weight",
    transposed=(
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    ),
    unread=(".attn.bias", ".attn.masked_bias"),
    base_module="transformer",
    layers_module="h",
    embedding_module="wte",
    norm_module="ln_f",
    attention_parts=(
        Part(tensor="attn.c_attn.weight", width="query"),
        Part(tensor="attn.c_attn.weight", width="head", after=("query",)),
        Part(tensor="attn.c_attn.weight", width="head", after=("query", "head")),
        Part(tensor="attn.c_attn.bias", width="query"),
        Part(tensor="attn.c_attn.bias", width="head", after=("query",)),
        Part(tensor="attn.c_attn.bias", width="head", after=("query", "head")),
        Part(tensor="attn.c_proj.weight", axis=1, width="query"),
    ),
    attention_output="attn.c_proj",
    ffn_parts=(
        Part(tensor="mlp.c_fc.weight"),
        Part(tensor="mlp.c_fc.bias"),
        Part(tensor="mlp.c_proj.weight", axis=1),
    ),
    ffn_output="mlp.c_proj",
    hidden_key="n_embd",
    layers_key="n_layer",
    ffn_key="n_inner",
    ffn_times_hidden=4,
    heads_key="n_head",
    kv_heads_key="n_head",
    positions_key="n_positions",
    head_dim_key=None,
    sized_by={"split_size": "columns"},
    activation_key="activation_function",
    activation="gelu_new",
    peaks=(Peak(hidden=3, ffn=2), Peak(hidden=2, attention=4)),
    refused=(Condition(key="add_cross_attention", value=True, reason="it reads a second input"),),
)
