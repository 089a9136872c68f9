"""dots.llm1: Qwen3's attention, the experts of DeepSeek-V3."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.glm4_moe import GLM4_MOE

DOTS1 = replace(
    GLM4_MOE,
    model_type="dots1",
    models="dots.llm1",
    defaults={"num_key_value_heads": 32},
    masks=1,
)
