"""Solar Open: GLM-4.5's experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.deepseek_v3 import SHARED_EXPERTS
from frugal_bonsai.model.families.glm4_moe import GLM4_MOE

SOLAR_OPEN = replace(
    GLM4_MOE,
    model_type="solar_open",
    models="Solar Open",
    experts=replace(SHARED_EXPERTS, dense_key=None),
    peaks=GLM4_MOE.peaks[:-1],
)
