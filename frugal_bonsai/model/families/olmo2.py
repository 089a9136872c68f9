"""OLMo 2: norms after the sublayers instead of before them, and over all heads of q and of k."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import Peak, always

OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    models="OLMo 2",
    heads_divide_hidden=False,
    bias_keys={},
    attention_norm="post_attention_layernorm",
    ffn_norm="post_feedforward_layernorm",
    peaks=(
        Peak(hidden=1, ffn=3),
        Peak(hidden=7),
        Peak(attention=7, key=2),
        Peak(attention=3, key=8),
    ),
    whole_attention=(always("its q_norm and k_norm run over all heads at once"),),
)
