"""Granite: Llama with multipliers for embedding, attention, residual stream and logits."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA

GRANITE = replace(
    LLAMA,
    model_type="granite",
    models="Granite",
    heads_divide_hidden=False,
    residual_scale_key="residual_multiplier",
    logits_divisor_key="logits_scaling",
)
