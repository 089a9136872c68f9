"""InternLM 3: Llama with heads of a width of their own, and biases that a config may ask for."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA

INTERNLM3 = replace(
    LLAMA,
    model_type="internlm3",
    models="InternLM 3",
    bias_keys={},
    defaults={"head_dim": 128, "num_key_value_heads": 2},
)
