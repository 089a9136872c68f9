"""LFM2: short convolutions in most layers, grouped-query attention in the others."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import GATED_PEAKS, Mixer, Part, Peak, always

LFM2 = replace(
    LLAMA,
    model_type="lfm2",
    models="LFM2",
    final_norm="model.embedding_norm.",
    norm_module="embedding_norm",
    attention_parts=(),
    attention_output="self_attn.out_proj",
    other_mixers=(Mixer(output="conv.out_proj"),),
    unquantised=("conv.conv.weight",),
    ffn_parts=(
        Part(tensor="feed_forward.w1.weight"),
        Part(tensor="feed_forward.w3.weight"),
        Part(tensor="feed_forward.w2.weight", axis=1),
    ),
    ffn_output="feed_forward.w2",
    # Its config states another width, from which transformers computes that of the tensors.
    stated={"block_auto_adjust_ff_dim": False, "block_ff_dim": None},
    bias_keys={},
    defaults={"num_key_value_heads": 8},
    peaks=(Peak(hidden=7), *GATED_PEAKS),
    whole_attention=(always("most layers have short convolutions in the place of attention"),),
)
