"""Architectures that no table can describe today, and why.

In: nothing. Out: ``config.model_type`` -> reason, as the end of an error text and for the docs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_HEAD_BIAS = "its head has a bias"

UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "mistral4": "transformers has no language model of it alone (AutoModelForCausalLM)",
        "phi": _HEAD_BIAS,
        "phimoe": _HEAD_BIAS,
        "gptj": _HEAD_BIAS,
        "falcon_h1": "its layers have attention and a state space side by side",
        "internlm3": (
            "transformers builds a Llama of its config: write llama as model_type into a copy, "
            "state head_dim, and call qkv_bias attention_bias and bias mlp_bias"
        ),
        "jamba": "its layers alternate between experts and an FFN; no one has written its table",
        "jetmoe": "its attention is a mixture of experts, too",
        "zamba": "its layers share one block of attention",
        "zamba2": "its layers share one block of attention",
        "kimi_linear": "its two kinds of attention have projections of the same name",
        "bailing_hybrid": "its two kinds of attention have projections of the same name",
        "glm_moe_dsa": "a layer attends to the tokens that the layer before it has chosen",
        "deepseek_v32": "an index chooses the tokens that it attends to, which was not tested",
        "minimax": "its layers scale the residual stream, too",
        "gemma3n_text": "its layers read embeddings of their own and several residual streams",
        "nemotron_h": "its layers have attention, a state space or an FFN alone, not two of them",
        "olmo": "its norms have no weights, and the last one cannot be scaled",
    }
)
