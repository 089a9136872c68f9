"""GLM-4.5, 4.6 and Air: GLM's attention, the experts of DeepSeek-V3."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.deepseek_v3 import DEEPSEEK_V3
from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.families.mixtral import EXPERT_PEAKS
from frugal_bonsai.model.family_schema import Peak

GLM4_MOE = replace(
    DEEPSEEK_V3,
    model_type="glm4_moe",
    models="GLM-4.5",
    attention_parts=LLAMA.attention_parts,
    head_dim_key="head_dim",
    defaults={"num_key_value_heads": 8},
    peaks=(*EXPERT_PEAKS, Peak(hidden=1, attention=5)),
    whole_attention=(),
)
