"""Mistral: Llama with a sliding window, and any number of heads."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA

MISTRAL = replace(
    LLAMA, model_type="mistral", models="Mistral", heads_divide_hidden=False, bias_keys={}, masks=1
)
