"""LFM2 with experts (8B-A1B): the first layers have an ordinary FFN."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.expert_schema import STACKS, Experts, Stack
from frugal_bonsai.model.families.lfm2 import LFM2
from frugal_bonsai.model.families.mixtral import EXPERT_OUTPUT, EXPERT_PARTS, EXPERT_PEAKS

_STORED = {".gate_proj.": ".w1.", ".down_proj.": ".w2.", ".up_proj.": ".w3."}


def _inside(name: str) -> str:
    return name.replace("mlp", "feed_forward", 1)


LFM2_MOE = replace(
    LFM2,
    model_type="lfm2_moe",
    models="LFM2 MoE",
    exact=(".expert_bias",),
    ffn_parts=tuple(replace(part, tensor=_inside(part.tensor)) for part in EXPERT_PARTS),
    ffn_output=_inside(EXPERT_OUTPUT),
    ffn_key="moe_intermediate_size",
    experts=Experts(
        module="feed_forward.experts",
        router="feed_forward.gate.weight",
        router_bias="feed_forward.expert_bias",
        chosen_default=4,
        stored_parts=_STORED,
        count_keys=("num_experts",),
        stacks=tuple(
            Stack(tensor=_inside(stack.tensor), parts=tuple(map(_inside, stack.parts)))
            for stack in STACKS
        ),
        dense_key="intermediate_size",
    ),
    stated={},
    peaks=(*EXPERT_PEAKS[:2], *LFM2.peaks),
)
