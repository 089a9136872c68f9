"""SmolLM3: Llama without rotary embeddings in some layers."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA

SMOLLM3 = replace(LLAMA, model_type="smollm3", models="SmolLM3", heads_divide_hidden=False, masks=1)
