"""gpt-oss: experts with biases in tensors of all experts, a sink for each query head."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.expert_schema import Experts, Stack
from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import Part, Peak

_EXPERT = "mlp.experts.{expert}."

GPT_OSS = replace(
    LLAMA,
    model_type="gpt_oss",
    models="gpt-oss",
    attention_parts=(
        *LLAMA.attention_parts,
        Part(tensor="self_attn.sinks", width="heads"),
    ),
    # The rows of gate and up alternate.
    ffn_parts=(
        Part(tensor=f"{_EXPERT}gate_up_proj.weight", width="pair"),
        Part(tensor=f"{_EXPERT}gate_up_proj.bias", width="pair"),
        Part(tensor=f"{_EXPERT}down_proj.weight", axis=1),
    ),
    ffn_output=f"{_EXPERT}down_proj",
    experts=Experts(
        router="mlp.router.weight",
        router_bias="mlp.router.bias",
        chosen_default=4,
        stacks=tuple(
            Stack(
                tensor=f"mlp.experts.{name}{ending}",
                parts=(f"{_EXPERT}{name}.{part}",),
                transposed=part == "weight",
            )
            for name in ("gate_up_proj", "down_proj")
            for ending, part in (("", "weight"), ("_bias", "bias"))
        ),
    ),
    heads_divide_hidden=False,
    bias_keys={},
    defaults={"head_dim": 64, "num_key_value_heads": 8},
    # Attention computes its scores in the open, with the sinks beside them. The gate is composed of
    # several operations.
    peaks=(Peak(hidden=5.5, ffn=8), Peak(hidden=1, attention=3.5, scores=3)),
    masks=2,
)
