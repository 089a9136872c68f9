"""K-EXAONE: GLM-4.5's experts, sliding windows, a norm over each query and key head."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.deepseek_v3 import SHARED_EXPERTS
from frugal_bonsai.model.families.glm4_moe import GLM4_MOE

EXAONE_MOE = replace(
    GLM4_MOE,
    model_type="exaone_moe",
    models="K-EXAONE",
    stored_parts={"mlp.gate.e_score_correction_bias": "mlp.e_score_correction_bias"},
    experts=replace(SHARED_EXPERTS, count_keys=("num_experts",)),
    defaults={},
    masks=1,
)
