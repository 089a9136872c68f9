"""Cohere 2, Command R7B and A: Cohere with sliding windows, no rotation without one."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.cohere import COHERE

COHERE2 = replace(
    COHERE, model_type="cohere2", models="Cohere 2, Command A", masks=1, whole_attention=()
)
