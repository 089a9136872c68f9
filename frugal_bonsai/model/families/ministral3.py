"""Ministral 3: Mistral whose queries grow with their position beyond the trained length."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.mistral import MISTRAL

MINISTRAL3 = replace(
    MISTRAL,
    model_type="ministral3",
    models="Ministral 3",
    defaults={"head_dim": 128, "num_key_value_heads": 8},
)
