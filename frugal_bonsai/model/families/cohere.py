"""Cohere, Command R: attention and FFN in parallel, logits that are scaled."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import Condition, Peak
from frugal_bonsai.model.units import ATTENTION

COHERE = replace(
    LLAMA,
    model_type="cohere",
    models="Cohere, Command R",
    head_dim_key=None,
    heads_divide_hidden=False,
    bias_keys={ATTENTION: "attention_bias"},
    unquantised=("_norm.weight",),  # of each head
    defaults={"logit_scale": 0.0625},
    logits_scale_key="logit_scale",
    # Heads are rotated in fp32.
    peaks=(
        Peak(hidden=2, ffn=3),
        Peak(hidden=1, attention=9, key=4),
        Peak(hidden=1, attention=5, key=10),
    ),
    whole_attention=(
        Condition(key="use_qk_norm", value=True, reason="each head has a norm of its own"),
    ),
)
