"""DeepSeek-V3, Kimi K2, Moonlight: latent attention, experts beside a shared one, dense first."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.expert_schema import Experts
from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.families.mixtral import EXPERT_OUTPUT, EXPERT_PARTS, EXPERT_PEAKS
from frugal_bonsai.model.family_schema import Peak, always

# Whole experts go, their channels stay.
SHARED_EXPERTS = Experts(
    router_bias="mlp.gate.e_score_correction_bias",
    count_keys=("n_routed_experts", "num_local_experts"),
    whole_channels="because the width of the shared expert is a multiple of theirs",
    dense_key="intermediate_size",
    least=2,
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
    defaults={"n_group": 8, "topk_group": 4},
    further_layers_key="num_nextn_predict_layers",
    peaks=(*EXPERT_PEAKS[:2], Peak(hidden=1, attention=9.25)),
    whole_attention=(always("its keys and values come from one latent vector for all heads"),),
)
