"""Youtu-LLM: Llama with DeepSeek-V3's attention."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.deepseek_v3 import DEEPSEEK_V3
from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import Peak

YOUTU = replace(
    LLAMA,
    model_type="youtu",
    models="Youtu-LLM",
    attention_parts=(),
    head_dim_key=None,
    heads_divide_hidden=False,
    bias_keys={},
    peaks=(Peak(hidden=2, ffn=3), *DEEPSEEK_V3.peaks[2:]),
    whole_attention=DEEPSEEK_V3.whole_attention,
)
