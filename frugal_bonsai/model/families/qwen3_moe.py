"""Qwen3-MoE: Qwen3 with many narrow experts as FFNs, eight per token."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.expert_schema import Experts
from frugal_bonsai.model.families.mixtral import EXPERT_OUTPUT, EXPERT_PARTS, EXPERT_PEAKS
from frugal_bonsai.model.families.qwen3 import QWEN3
from frugal_bonsai.model.family_schema import Condition, Peak

QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    models="Qwen3-MoE",
    defaults={},
    ffn_parts=EXPERT_PARTS,
    ffn_output=EXPERT_OUTPUT,
    ffn_key="moe_intermediate_size",
    experts=Experts(),
    peaks=(*EXPERT_PEAKS, Peak(hidden=1, attention=5)),
    refused=(
        Condition(
            key="mlp_only_layers",
            other_than=[],
            reason="some of its layers have experts and others an FFN of another width",
        ),
        Condition(
            key="decoder_sparse_step",
            other_than=1,
            reason="some of its layers have experts and others an FFN of another width",
        ),
    ),
)
