"""DeepSeek-V2-Lite: DeepSeek-V3 with a router without groups and biases."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.deepseek_v3 import DEEPSEEK_V3, SHARED_EXPERTS
from frugal_bonsai.model.family_schema import Condition

DEEPSEEK_V2 = replace(
    DEEPSEEK_V3,
    model_type="deepseek_v2",
    models="DeepSeek-V2-Lite",
    exact=(),
    experts=replace(SHARED_EXPERTS, router_bias=None, least=1),
    further_layers_key=None,
    refused=(
        Condition(
            key="topk_method",
            other_than="greedy",
            default="greedy",
            reason=DEEPSEEK_V3.refused[0].reason,
        ),
    ),
)
