"""Helium: Llama with rotary embeddings on neighbouring dimensions.

o_proj has as many inputs as the model is wide, whatever the number of heads.
"""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.family_schema import GATED_PEAKS, Peak
from frugal_bonsai.model.units import FFN

HELIUM = replace(
    LLAMA,
    model_type="helium",
    models="Helium",
    head_dim_key=None,
    heads_divide_hidden=False,
    peaks=(*GATED_PEAKS, Peak(hidden=6)),
    bias_keys={FFN: "mlp_bias"},
    defaults={"num_key_value_heads": 20},
)
