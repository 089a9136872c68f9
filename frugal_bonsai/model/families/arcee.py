"""Arcee (AFM): Llama whose FFN has no gate and a squared ReLU."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import Part

UNGATED_PARTS = (
    Part(tensor="mlp.up_proj.weight"),
    Part(tensor="mlp.up_proj.bias", required=False),
    Part(tensor="mlp.down_proj.weight", axis=1),
)

ARCEE = replace(
    LLAMA, model_type="arcee", models="Arcee (AFM)", ffn_parts=UNGATED_PARTS, activation="relu2"
)
