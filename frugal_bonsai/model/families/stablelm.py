"""StableLM: LayerNorms, rotary embeddings on a part of each head, optional parallel residual."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import Condition, Peak

STABLELM = replace(
    LLAMA,
    model_type="stablelm",
    models="StableLM",
    head_dim_key=None,
    heads_divide_hidden=False,
    bias_keys={},
    # Rotary embeddings apply to a quarter of each head.
    peaks=(Peak(hidden=4, ffn=3), Peak(hidden=1, attention=4.25, key=3.25)),
    sized_by={"num_heads": "query", "num_key_value_heads": "kv"},
    whole_attention=(
        Condition(
            key="qk_layernorm",
            value=True,
            reason="qk_layernorm gives each head separate tensors",
        ),
    ),
)
