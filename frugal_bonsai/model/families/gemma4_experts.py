"""Gemma 4 with experts (26B-A4B): beside an FFN, which stays whole, each with a norm behind it."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.expert_schema import STACKS, Experts, Stack
from frugal_bonsai.model.families.gemma4 import GEMMA4
from frugal_bonsai.model.families.mixtral import EXPERT_OUTPUT, EXPERT_PARTS
from frugal_bonsai.model.family_schema import Peak


def _outside(name: str) -> str:
    return name.removeprefix("mlp.")


GEMMA4_EXPERTS = replace(
    GEMMA4,
    ffn_parts=tuple(replace(part, tensor=_outside(part.tensor)) for part in EXPERT_PARTS),
    ffn_output=_outside(EXPERT_OUTPUT),
    ffn_key="moe_intermediate_size",
    ffn_norm="post_feedforward_layernorm_2",
    experts=Experts(
        module="experts",
        router="router.proj.weight",
        router_bias="router.per_expert_scale",  # a factor
        count_keys=("num_experts",),
        chosen_key="top_k_experts",
        dense_key="intermediate_size",
        dense_beside=True,
        stacks=tuple(
            Stack(tensor=_outside(stack.tensor), parts=tuple(map(_outside, stack.parts)))
            for stack in STACKS
        ),
    ),
    # Norms hold more beside the experts.
    peaks=(Peak(hidden=7, ffn=3), Peak(hidden=8, ffn=2), *GEMMA4.peaks[1:]),
)
