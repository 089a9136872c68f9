"""Granite MoE with an FFN for all tokens after the experts, which stays whole."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.granitemoe import GRANITEMOE
from frugal_bonsai.model.family_schema import Peak

GRANITEMOESHARED = replace(
    GRANITEMOE,
    model_type="granitemoeshared",
    models="Granite MoE shared",
    peaks=(Peak(hidden=3, ffn=4), *GRANITEMOE.peaks),
)
