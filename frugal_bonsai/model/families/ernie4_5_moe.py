"""ERNIE 4.5 with experts, in most models beside shared ones; the first layers are dense."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.deepseek_v3 import SHARED_EXPERTS
from frugal_bonsai.model.families.ernie4_5 import ERNIE4_5
from frugal_bonsai.model.families.mixtral import EXPERT_OUTPUT, EXPERT_PARTS
from frugal_bonsai.model.families.qwen2_moe import SHARED_PEAKS
from frugal_bonsai.model.family_schema import Condition

_BIAS = "moe_statics.e_score_correction_bias"
_FURTHER = ("block", "emb_norm", "hidden_norm", "linear_proj")
_EXPERTS = replace(
    SHARED_EXPERTS,
    router_bias=f"mlp.gate.{_BIAS}",
    count_keys=("moe_num_experts",),
    chosen_key="moe_k",
    chosen_default=6,
    least=1,
)

ERNIE4_5_MOE = replace(
    ERNIE4_5,
    model_type="ernie4_5_moe",
    models="ERNIE 4.5 MoE",
    unread=(*ERNIE4_5.unread, *(f"model.mtp_{name}." for name in _FURTHER)),
    exact=(_BIAS,),
    stored_parts={f"mlp.gate.{_BIAS}": f"mlp.{_BIAS}"},
    ffn_parts=EXPERT_PARTS,
    ffn_output=EXPERT_OUTPUT,
    ffn_key="moe_intermediate_size",
    experts=_EXPERTS,
    peaks=(*SHARED_PEAKS[:2], *ERNIE4_5.peaks[1:]),
    defaults={"num_key_value_heads": 4},
    refused=(Condition(key="use_bias", value=True, reason="its head has a bias"),),
    whole_layers=(
        Condition(
            key="moe_layer_interval",
            other_than=1,
            reason="every so many layers have experts (moe_layer_interval)",
        ),
    ),
)
# The 300B model has no shared experts.
ERNIE4_5_MOE_ROUTED = replace(
    ERNIE4_5_MOE,
    experts=replace(_EXPERTS, whole_channels=None),
)
