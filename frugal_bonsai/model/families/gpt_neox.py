"""GPT-NeoX and Pythia: q, k and v interleaved per head, parallel residual, FFN without a gate."""

from __future__ import annotations

from frugal_bonsai.model.family_schema import Family, Part, Peak

GPT_NEOX = Family(
    model_type="gpt_neox",
    models="GPT-NeoX, Pythia",
    layer_prefix="gpt_neox.layers.{layer}.",
    embedding="gpt_neox.embed_in.weight",
    final_norm="gpt_neox.final_layer_norm.",
    head="lm_head.weight",
    stored_as={"lm_head.weight": "embed_out.weight"},
    unread=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    base_module="gpt_neox",
    layers_module="layers",
    embedding_module="embed_in",
    norm_module="final_layer_norm",
    attention_parts=(
        Part(tensor="attention.query_key_value.weight", width="group"),
        Part(tensor="attention.query_key_value.bias", width="group", required=False),
        Part(tensor="attention.dense.weight", axis=1, width="query"),
    ),
    attention_output="attention.dense",
    ffn_parts=(
        Part(tensor="mlp.dense_h_to_4h.weight"),
        Part(tensor="mlp.dense_h_to_4h.bias"),
        Part(tensor="mlp.dense_4h_to_h.weight", axis=1),
    ),
    ffn_output="mlp.dense_4h_to_h",
    kv_heads_key="num_attention_heads",
    head_dim_key=None,
    activation="gelu",
    peaks=(Peak(hidden=2, ffn=2), Peak(hidden=2, attention=6)),
)
