"""EXAONE 4: norms after the sublayers instead of before them, and over each head."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import Peak

EXAONE4 = replace(
    LLAMA,
    model_type="exaone4",
    models="EXAONE 4",
    heads_divide_hidden=False,
    bias_keys={},
    defaults={"num_key_value_heads": 32},
    attention_norm="post_attention_layernorm",
    ffn_norm="post_feedforward_layernorm",
    peaks=(Peak(hidden=1, ffn=3), Peak(hidden=6), Peak(attention=5, key=2)),
    masks=1,
)
