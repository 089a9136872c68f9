"""Llama 4, text: experts in tensors of all experts beside one for all tokens; some layers dense."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.expert_schema import Experts, Stack
from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.families.qwen2_moe import SHARED_PEAKS
from frugal_bonsai.model.family_schema import Part, Peak

_EXPERT = "feed_forward.experts.{expert}."

LLAMA4 = replace(
    LLAMA,
    model_type="llama4_text",
    models="Llama 4, text",
    ffn_parts=(
        Part(tensor=f"{_EXPERT}gate_up_proj.weight"),
        Part(tensor=f"{_EXPERT}gate_up_proj.weight", after=("one",)),
        Part(tensor=f"{_EXPERT}down_proj.weight", axis=1),
    ),
    ffn_output=f"{_EXPERT}down_proj",
    experts=Experts(
        module="feed_forward.experts",
        router="feed_forward.router.weight",
        count_keys=("num_local_experts",),
        chosen_default=1,
        scales_inputs=True,
        stacks=tuple(
            Stack(
                tensor=f"feed_forward.experts.{name}",
                parts=(f"{_EXPERT}{name}.weight",),
                transposed=True,
            )
            for name in ("gate_up_proj", "down_proj")
        ),
        whole_channels="because the shared expert is as wide as they are",
        dense_key="intermediate_size_mlp",
    ),
    heads_divide_hidden=False,
    bias_keys={},
    peaks=(Peak(hidden=7, ffn=4), *SHARED_PEAKS[2:]),
    masks=1,
)
