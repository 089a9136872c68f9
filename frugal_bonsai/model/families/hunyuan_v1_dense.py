"""Hunyuan v1, dense: Llama with a norm over each query and key head after their rotation."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import GATED_PEAKS, Peak
from frugal_bonsai.model.units import ATTENTION

HUNYUAN_V1_DENSE = replace(
    LLAMA,
    model_type="hunyuan_v1_dense",
    models="Hunyuan v1, dense",
    heads_divide_hidden=False,
    bias_keys={ATTENTION: "attention_bias"},
    peaks=(*GATED_PEAKS, Peak(hidden=1, attention=5, key=2)),
)
