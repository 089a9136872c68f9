"""Nemotron (Minitron): LayerNorms with one added, squared ReLU, partly rotated heads."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.arcee import ARCEE
from frugal_bonsai.model.family_schema import Peak

NEMOTRON = replace(
    ARCEE,
    model_type="nemotron",
    models="Nemotron, Minitron",
    heads_divide_hidden=False,
    norm_offset=1.0,
    # Rotary embeddings apply to a half of each head.
    peaks=(
        Peak(hidden=2, ffn=3),
        Peak(hidden=1, attention=3, key=2),
        Peak(hidden=1, attention=2.5, key=3.5),
    ),
)
