"""Qwen3.5, text: linear attention in three of four layers, gated attention in the others."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.qwen3 import QWEN3
from frugal_bonsai.model.family_schema import Mixer, Peak, always

QWEN3_5 = replace(
    QWEN3,
    model_type="qwen3_5_text",
    models="Qwen3.5, text",
    # Its layers for further tokens, which transformers does not read.
    unread=(*QWEN3.unread, "mtp."),
    attention_parts=(),
    other_mixers=(Mixer(output="linear_attn.out_proj"),),
    bias_keys={},
    defaults={"head_dim": 256},
    norm_offset=1.0,
    # The linear attention of transformers in torch's own operations.
    peaks=(Peak(hidden=1, attention=26.6),),
    whole_attention=(
        always("its queries hold the gates of its output, and most layers have linear attention"),
    ),
)
