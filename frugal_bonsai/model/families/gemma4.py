"""Gemma 4, text: Gemma 3 with wider heads in full attention, and a factor behind each layer."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.gemma3 import GEMMA3
from frugal_bonsai.model.family_schema import Condition, always

GEMMA4 = replace(
    GEMMA3,
    model_type="gemma4_text",
    models="Gemma 4, text",
    attention_parts=(),
    bias_keys={},
    full_attention_keys={
        "head_dim": "global_head_dim",
        "num_key_value_heads": "num_global_key_value_heads",
    },
    defaults={},
    norm_offset=0.0,
    refused=(
        Condition(
            key="hidden_size_per_layer_input",
            other_than=0,
            default=256,
            reason="each of its layers reads embeddings of its own",
        ),
        Condition(
            key="num_kv_shared_layers",
            other_than=0,
            reason="its last layers read the keys and values of others",
        ),
    ),
    whole_attention=(
        always("layers of full attention have wider heads, and other numbers of them"),
    ),
    whole_layers=(always("its config class gives the last layer full attention"),),
)
