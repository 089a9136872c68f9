"""GPT-Neo: sliding-window attention in every other layer; scores in fp32 without scaling."""

from __future__ import annotations

from frugal_bonsai.model.family_schema import Family, Part, Peak

GPT_NEO = Family(
    model_type="gpt_neo",
    models="GPT-Neo",
    layer_prefix="transformer.h.{layer}.",
    embedding="transformer.wte.weight",
    final_norm="transformer.ln_f.",
    head="lm_head.weight",
    unread=(".attn.attention.bias", ".attn.attention.masked_bias"),
    base_module="transformer",
    layers_module="h",
    embedding_module="wte",
    norm_module="ln_f",
    returns_tuple=True,
    attention_parts=(
        Part(tensor="attn.attention.q_proj.weight", width="query"),
        Part(tensor="attn.attention.k_proj.weight", width="head"),
        Part(tensor="attn.attention.v_proj.weight", width="head"),
        Part(tensor="attn.attention.out_proj.weight", axis=1, width="query"),
    ),
    attention_output="attn.attention.out_proj",
    ffn_parts=(
        Part(tensor="mlp.c_fc.weight"),
        Part(tensor="mlp.c_fc.bias"),
        Part(tensor="mlp.c_proj.weight", axis=1),
    ),
    ffn_output="mlp.c_proj",
    layers_key="num_layers",
    ffn_times_hidden=4,
    heads_key="num_heads",
    kv_heads_key="num_heads",
    head_dim_key=None,
    sized_by={"num_heads": "query"},
    activation_key="activation_function",
    activation="gelu_new",
    peaks=(Peak(hidden=3, ffn=2, scores=1), Peak(hidden=2, attention=6, scores=4)),
    masks=1,
)
