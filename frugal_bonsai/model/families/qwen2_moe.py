"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with narrow experts, and one for all tokens beside them."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.expert_schema import Experts
from frugal_bonsai.model.families.mixtral import EXPERT_OUTPUT, EXPERT_PARTS, EXPERT_PEAKS
from frugal_bonsai.model.families.qwen2 import QWEN2
from frugal_bonsai.model.families.qwen3_moe import QWEN3_MOE
from frugal_bonsai.model.family_schema import Peak

# The output of the expert for all tokens is held beside the others.
SHARED_PEAKS = (Peak(hidden=6, ffn=3), Peak(hidden=7, ffn=2), *EXPERT_PEAKS[2:])

QWEN2_MOE = replace(
    QWEN2,
    model_type="qwen2_moe",
    models="Qwen1.5-MoE, Qwen2-MoE",
    ffn_parts=EXPERT_PARTS,
    ffn_output=EXPERT_OUTPUT,
    ffn_key="moe_intermediate_size",
    experts=Experts(chosen_default=4),
    peaks=SHARED_PEAKS,
    refused=QWEN3_MOE.refused,
)
