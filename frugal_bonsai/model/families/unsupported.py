"""Architectures that no table can describe today, and why.

In: nothing. Out: ``config.model_type`` -> reason, as the end of an error text and for the docs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "mistral4": "transformers has no language model of it alone (AutoModelForCausalLM)",
        "phimoe": "its router is a linear layer that chooses experts by itself",
        "nemotron_h": "its layers have attention, a state space or an FFN alone, not two of them",
        "olmo": "its norms have no weights, and the last one cannot be scaled",
    }
)
