"""Qwen3: Llama with a norm over each query and key head."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import GATED_PEAKS, Peak
from frugal_bonsai.model.units import ATTENTION

QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    models="Qwen3",
    defaults={"head_dim": 128},
    heads_divide_hidden=False,
    bias_keys={ATTENTION: "attention_bias"},
    peaks=(*GATED_PEAKS, Peak(hidden=1, attention=5)),
    masks=1,
)
