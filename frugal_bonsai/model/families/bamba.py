"""Bamba: Mamba 2 in most layers, attention in the others."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.granitemoehybrid import GRANITEMOEHYBRID
from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import Part, Peak

BAMBA = replace(
    LLAMA,
    model_type="bamba",
    models="Bamba",
    final_norm="model.final_layernorm.",
    norm_module="final_layernorm",
    attention_parts=(),
    other_mixers=GRANITEMOEHYBRID.other_mixers,
    ffn_parts=(
        Part(tensor="feed_forward.gate_proj.weight"),
        Part(tensor="feed_forward.up_proj.weight"),
        Part(tensor="feed_forward.gate_proj.bias", required=False),
        Part(tensor="feed_forward.up_proj.bias", required=False),
        Part(tensor="feed_forward.down_proj.weight", axis=1),
    ),
    ffn_output="feed_forward.down_proj",
    bias_keys={},
    defaults={"num_key_value_heads": 8},
    returns_tuple=True,
    peaks=(Peak(hidden=2, ffn=3), *GRANITEMOEHYBRID.peaks[1:]),
    whole_attention=GRANITEMOEHYBRID.whole_attention,
)
