"""Falcon: q, k and v in one projection (one KV head, or groups in a row), parallel attention."""

from __future__ import annotations

from frugal_bonsai.model.family_schema import Condition, Family, Part, Peak

FALCON = Family(
    model_type="falcon",
    models="Falcon",
    layer_prefix="transformer.h.{layer}.",
    embedding="transformer.word_embeddings.weight",
    final_norm="transformer.ln_f.",
    head="lm_head.weight",
    base_module="transformer",
    layers_module="h",
    embedding_module="word_embeddings",
    norm_module="ln_f",
    returns_tuple=True,
    attention_parts=(
        Part(tensor="self_attention.query_key_value.weight", width="group"),
        Part(tensor="self_attention.query_key_value.bias", width="group", required=False),
        Part(tensor="self_attention.dense.weight", axis=1, width="query"),
    ),
    attention_output="self_attention.dense",
    ffn_parts=(
        Part(tensor="mlp.dense_h_to_4h.weight"),
        Part(tensor="mlp.dense_h_to_4h.bias", required=False),
        Part(tensor="mlp.dense_4h_to_h.weight", axis=1),
    ),
    ffn_output="mlp.dense_4h_to_h",
    ffn_key="ffn_hidden_size",
    ffn_times_hidden=4,
    kv_heads_key="num_kv_heads",
    one_kv_head=(
        Condition(key="multi_query", value=True, default=True),
        Condition(key="new_decoder_architecture", value=False, default=False),
    ),
    head_dim_key=None,
    sized_by={"num_heads": "query", "num_kv_heads": "kv"},
    activation_key="activation",
    activation="gelu",
    # Keys and values are repeated to one per query head.
    peaks=(Peak(hidden=3, ffn=2), Peak(hidden=2, attention=8, key=2)),
    masks=1,
    refused=(
        Condition(
            key="alibi", value=True, reason="its position biases depend on the index of a head"
        ),
    ),
)
