"""Qwen2 and Qwen2.5: Llama with biases in the q, k and v projections."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA

QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    models="Qwen2, Qwen2.5",
    heads_divide_hidden=False,
    bias_keys={},
    masks=1,
)
