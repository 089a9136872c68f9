"""GLM-4 of 2025 (0414): GLM with further norms after the sublayers."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.glm import GLM
from frugal_bonsai.model.family_schema import Peak

GLM4 = replace(
    GLM,
    model_type="glm4",
    models="GLM-4 (0414)",
    attention_norm="post_self_attn_layernorm",
    ffn_norm="post_mlp_layernorm",
    peaks=(*GLM.peaks, Peak(hidden=6)),
)
