"""GLM-4-9B of 2024: gate and up in one projection, rotary embeddings on a half of each head."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.families.phi3 import PHI3
from frugal_bonsai.model.family_schema import Peak

GLM = replace(
    LLAMA,
    model_type="glm",
    models="GLM-4 (2024)",
    ffn_parts=PHI3.ffn_parts,
    heads_divide_hidden=False,
    bias_keys={},
    peaks=(
        Peak(hidden=2, ffn=4),
        Peak(hidden=5),
        Peak(hidden=1, attention=3, key=2),
        Peak(hidden=1, attention=2, key=3.5),
    ),
    defaults={"head_dim": 128, "num_key_value_heads": 2},
)
