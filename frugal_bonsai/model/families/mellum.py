"""Mellum 2: Qwen3-MoE with sliding windows in most layers."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.qwen3_moe import QWEN3_MOE

MELLUM = replace(
    QWEN3_MOE,
    model_type="mellum",
    models="Mellum 2",
    masks=2,
    refused=(),
)
