"""Seed-OSS: Llama with biases in q, k and v, and any number of heads."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.units import FFN

SEED_OSS = replace(
    LLAMA,
    model_type="seed_oss",
    models="Seed-OSS",
    heads_divide_hidden=False,
    bias_keys={FFN: "mlp_bias"},
    defaults={"head_dim": 128, "num_key_value_heads": 8},
)
