"""StarCoder 2: biases in all projections, LayerNorms, an FFN without a gate."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import GATED_PEAKS, Part, Peak

STARCODER2 = replace(
    LLAMA,
    model_type="starcoder2",
    models="StarCoder 2",
    ffn_parts=(
        Part(tensor="mlp.c_fc.weight"),
        Part(tensor="mlp.c_fc.bias", required=False),
        Part(tensor="mlp.c_proj.weight", axis=1),
    ),
    ffn_output="mlp.c_proj",
    heads_divide_hidden=False,
    bias_keys={},
    defaults={"num_key_value_heads": 2},
    peaks=(Peak(hidden=2, ffn=2), *GATED_PEAKS[1:]),
    activation="gelu_pytorch_tanh",
)
