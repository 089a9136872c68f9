"""StableLM: LayerNorms, rotary embeddings on part of a head, optionally a parallel residual."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import Condition, Peak

STABLELM = replace(
    LLAMA,
    model_type="stablelm",
    head_dim_key=None,
    heads_divide_hidden=False,
    bias_keys={},
    # A quarter of each head rotates.
    peaks=(Peak(hidden=4, ffn=3), Peak(hidden=1, attention=4.25, key=3.25)),
    sized_by={"num_heads": "query", "num_key_value_heads": "kv"},
    whole_attention=(
        Condition(
            key="qk_layernorm",
            value=True,
            reason="qk_layernorm gives every head tensors of its own",
        ),
    ),
)
