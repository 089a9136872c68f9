"""GLM-4.7 Flash: DeepSeek-V3 with a list of the layers that have experts."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.deepseek_v3 import DEEPSEEK_V3

GLM4_MOE_LITE = replace(
    DEEPSEEK_V3, model_type="glm4_moe_lite", models="GLM-4.7 Flash", defaults={}
)
