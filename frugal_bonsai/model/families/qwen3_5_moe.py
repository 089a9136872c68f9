"""Qwen3.5-MoE, text: Qwen3-Next with the linear attention of Qwen3.5."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.expert_schema import Experts
from frugal_bonsai.model.families.qwen2_moe import SHARED_PEAKS
from frugal_bonsai.model.families.qwen3_5 import QWEN3_5
from frugal_bonsai.model.families.qwen3_next import QWEN3_NEXT

QWEN3_5_MOE = replace(
    QWEN3_NEXT,
    model_type="qwen3_5_moe_text",
    models="Qwen3.5-MoE, text",
    experts=Experts(chosen_default=8),
    peaks=(*SHARED_PEAKS[:2], *QWEN3_5.peaks),
)
