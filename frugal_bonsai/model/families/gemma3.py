"""Gemma 3, text: Gemma 2 with a norm over each query and key head, without soft-capping."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.gemma2 import GEMMA2
from frugal_bonsai.model.family_schema import GATED_PEAKS, Peak

GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    models="Gemma 3, text",
    defaults={"head_dim": 256},
    peaks=(*GATED_PEAKS, Peak(hidden=6), Peak(hidden=1, attention=5, key=2)),
)
