"""DeepSeek-V3, Kimi K2, Moonlight: latent attention, experts beside a shared one, dense first."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.expert_schema import Experts
from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.families.mixtral import EXPERT_OUTPUT, EXPERT_PARTS, EXPERT_PEAKS
from frugal_bonsai.model.family_schema import Condition, Peak, always

# Whole experts go, their channels stay.
SHARED_EXPERTS = Experts(
    router_bias="mlp.gate.e_score_correction_bias",
    count_keys=("n_routed_experts", "num_local_experts"),
    whole_channels="because the width of the shared expert is a multiple of theirs",
    dense_key="intermediate_size",
    least=2,
)
GROUPED_ROUTER = (
    Condition(
        key="n_group",
        other_than=1,
        default=8,
        reason="its router chooses among groups of equally many experts",
    ),
)

DEEPSEEK_V3 = replace(
    LLAMA,
    model_type="deepseek_v3",
    models="DeepSeek-V3",
    exact=(".e_score_correction_bias",),
    attention_parts=(),
    ffn_parts=EXPERT_PARTS,
    ffn_output=EXPERT_OUTPUT,
    ffn_key="moe_intermediate_size",
    head_dim_key=None,
    heads_divide_hidden=False,
    bias_keys={},
    experts=SHARED_EXPERTS,
    further_layers_key="num_nextn_predict_layers",
    peaks=(*EXPERT_PEAKS[:2], Peak(hidden=1, attention=9.25)),
    refused=GROUPED_ROUTER,
    whole_attention=(always("its keys and values come from one latent vector for all heads"),),
)
