"""Granite MoE: Granite with experts in tensors of all experts of a layer."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.expert_schema import STACKS, Experts, Stack
from frugal_bonsai.model.families.granite import GRANITE
from frugal_bonsai.model.families.mixtral import EXPERT_OUTPUT, EXPERT_PARTS, EXPERT_PEAKS
from frugal_bonsai.model.units import ATTENTION

_MODULE = "block_sparse_moe"


def _inside(name: str) -> str:
    return name.replace("mlp", _MODULE, 1)


GRANITEMOE = replace(
    GRANITE,
    model_type="granitemoe",
    models="Granite 3 MoE",
    stored_parts={f"{_MODULE}.router.": f"{_MODULE}.router.layer."},
    ffn_parts=tuple(replace(part, tensor=_inside(part.tensor)) for part in EXPERT_PARTS),
    bias_keys={ATTENTION: "attention_bias"},
    ffn_output=_inside(EXPERT_OUTPUT),
    experts=Experts(
        module=f"{_MODULE}.experts",
        router=f"{_MODULE}.router.weight",
        chosen_default=2,
        stacks=tuple(
            Stack(tensor=f"{_MODULE}.{name}.weight", parts=tuple(map(_inside, stack.parts)))
            for name, stack in zip(("input_linear", "output_linear"), STACKS, strict=True)
        ),
    ),
    peaks=EXPERT_PEAKS,
)
