"""Ministral 8B: Mistral with full attention in some layers."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.mistral import MISTRAL

MINISTRAL = replace(
    MISTRAL,
    model_type="ministral",
    models="Ministral 8B (2024)",
    defaults={"num_key_value_heads": 8},
)
