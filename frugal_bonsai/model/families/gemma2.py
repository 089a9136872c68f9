"""Gemma 2: norms before and after each sublayer, scaled embedding, soft-capped scores."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import Peak
from frugal_bonsai.model.units import ATTENTION

GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    models="Gemma 2",
    defaults={"head_dim": 256, "final_logit_softcapping": 30.0},
    bias_keys={ATTENTION: "attention_bias"},
    attention_norm="post_attention_layernorm",
    ffn_norm="post_feedforward_layernorm",
    norm_offset=1.0,
    logits_softcap_key="final_logit_softcapping",
    activation_key="hidden_activation",
    activation="gelu_pytorch_tanh",
    # Soft-capped scores need eager attention, which holds the scores.
    peaks=(
        Peak(hidden=2, ffn=3, scores=1),
        Peak(hidden=7),
        Peak(hidden=1, attention=3, key=2, scores=4),
    ),
    masks=2,
)
