"""ERNIE 4.5: Llama with one key for the biases of all projections."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import Peak

ERNIE4_5 = replace(
    LLAMA,
    model_type="ernie4_5",
    models="ERNIE 4.5",
    heads_divide_hidden=False,
    bias_keys={},
    # Heads are rotated in fp32.
    peaks=(
        Peak(hidden=2, ffn=3),
        Peak(hidden=1, attention=7, key=2),
        Peak(hidden=1, attention=3, key=8),
    ),
    defaults={"head_dim": 128, "num_key_value_heads": 2},
)
