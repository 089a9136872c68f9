"""Gemma 1: scaled embedding, norms with one added, a gelu gate."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.units import ATTENTION

GEMMA = replace(
    LLAMA,
    model_type="gemma",
    models="Gemma 1",
    heads_divide_hidden=False,
    bias_keys={ATTENTION: "attention_bias"},
    defaults={"head_dim": 256, "num_key_value_heads": 16},
    norm_offset=1.0,
    activation="gelu_pytorch_tanh",
)
