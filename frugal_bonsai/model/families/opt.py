"""OPT: positions count from 2, the FFN is not one module, biases in all projections."""

from __future__ import annotations

from frugal_bonsai.model.family_schema import Condition, Family, Part, Peak

OPT = Family(
    model_type="opt",
    models="OPT",
    layer_prefix="model.decoder.layers.{layer}.",
    embedding="model.decoder.embed_tokens.weight",
    final_norm="model.decoder.final_layer_norm.",
    head="lm_head.weight",
    base_module="model.decoder",
    layers_module="layers",
    embedding_module="embed_tokens",
    norm_module="final_layer_norm",
    attention_parts=(
        Part(tensor="self_attn.q_proj.weight", width="query"),
        Part(tensor="self_attn.q_proj.bias", width="query", required=False),
        Part(tensor="self_attn.k_proj.weight", width="head"),
        Part(tensor="self_attn.k_proj.bias", width="head", required=False),
        Part(tensor="self_attn.v_proj.weight", width="head"),
        Part(tensor="self_attn.v_proj.bias", width="head", required=False),
        Part(tensor="self_attn.out_proj.weight", axis=1, width="query"),
    ),
    attention_output="self_attn.out_proj",
    ffn_parts=(
        Part(tensor="fc1.weight"),
        Part(tensor="fc1.bias", required=False),
        Part(tensor="fc2.weight", axis=1),
    ),
    ffn_output="fc2",
    ffn_activation="activation_fn",
    ffn_key="ffn_dim",
    kv_heads_key="num_attention_heads",
    head_dim_key=None,
    sized_by={"num_heads": "query"},
    activation_key="activation_function",
    activation="relu",
    peaks=(Peak(hidden=1, ffn=2), Peak(hidden=2, attention=4)),
    refused=(
        Condition(
            key="word_embed_proj_dim",
            differs_from="hidden_size",
            reason="its embedding is narrower than its layers (project_in, project_out)",
        ),
        Condition(
            key="do_layer_norm_before",
            value=False,
            default=True,
            reason="its norms are in the residual stream, after the sublayers",
        ),
        Condition(
            key="_remove_final_layer_norm", value=True, reason="it has no norm before the head"
        ),
    ),
)
