"""OLMoE: norms over all heads of q and of k, many experts as FFNs, eight per token."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.expert_schema import Experts
from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.families.mixtral import EXPERT_OUTPUT, EXPERT_PARTS, EXPERT_PEAKS
from frugal_bonsai.model.families.olmo2 import OLMO2
from frugal_bonsai.model.units import ATTENTION

OLMOE = replace(
    LLAMA,
    model_type="olmoe",
    models="OLMoE",
    heads_divide_hidden=False,
    bias_keys={ATTENTION: "attention_bias"},
    ffn_parts=EXPERT_PARTS,
    ffn_output=EXPERT_OUTPUT,
    experts=Experts(),
    peaks=EXPERT_PEAKS,
    whole_attention=OLMO2.whole_attention,
)
