"""Qwen3-Next: Qwen3.5 with many narrow experts, and one for all tokens beside them."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.expert_schema import Experts
from frugal_bonsai.model.families.mixtral import EXPERT_OUTPUT, EXPERT_PARTS
from frugal_bonsai.model.families.qwen2_moe import SHARED_PEAKS
from frugal_bonsai.model.families.qwen3_5 import QWEN3_5
from frugal_bonsai.model.families.qwen3_moe import QWEN3_MOE
from frugal_bonsai.model.family_schema import Peak

QWEN3_NEXT = replace(
    QWEN3_5,
    model_type="qwen3_next",
    models="Qwen3-Next",
    ffn_parts=EXPERT_PARTS,
    ffn_output=EXPERT_OUTPUT,
    ffn_key="moe_intermediate_size",
    experts=Experts(chosen_default=10),
    peaks=(*SHARED_PEAKS[:2], Peak(hidden=1, attention=28.6)),
    refused=QWEN3_MOE.refused,
)
