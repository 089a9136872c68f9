"""Granite 4 without experts: state spaces (Mamba 2) in most layers, a fused gate."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.granite import GRANITE
from frugal_bonsai.model.family_schema import Mixer, Part, Peak, always

GRANITEMOEHYBRID = replace(
    GRANITE,
    model_type="granitemoehybrid",
    models="Granite 4",
    attention_parts=(),
    other_mixers=(Mixer(output="mamba.out_proj"),),
    ffn_parts=(
        Part(tensor="shared_mlp.input_linear.weight"),
        Part(tensor="shared_mlp.input_linear.weight", after=("one",)),
        Part(tensor="shared_mlp.output_linear.weight", axis=1),
    ),
    ffn_output="shared_mlp.output_linear",
    ffn_key="shared_intermediate_size",
    bias_keys={},
    # State spaces in torch's own operations, with heads of 64 and chunks of 256 tokens.
    peaks=(Peak(hidden=2, ffn=4), Peak(hidden=1, attention=69)),
    whole_attention=(always("most layers have state spaces in the place of attention"),),
)
