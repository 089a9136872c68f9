"""Qwen2 and Qwen2.5: Llama with biases at q, k and v."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.llama import LLAMA

QWEN2 = replace(LLAMA, model_type="qwen2", heads_divide_hidden=False, bias_keys={}, masks=1)
