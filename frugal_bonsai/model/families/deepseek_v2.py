"""DeepSeek-V2 and V2-Lite: DeepSeek-V3 with a router without biases."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.deepseek_v3 import DEEPSEEK_V3, SHARED_EXPERTS

DEEPSEEK_V2 = replace(
    DEEPSEEK_V3,
    model_type="deepseek_v2",
    models="DeepSeek-V2",
    exact=(),
    defaults={},
    experts=replace(SHARED_EXPERTS, router_bias=None, least=1),
    further_layers_key=None,
)
