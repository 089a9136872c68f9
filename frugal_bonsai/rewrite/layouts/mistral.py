"""Write a Llama as a Mistral, whose config class accepts any number of heads.

LlamaConfig requires that hidden_size is a multiple of the number of heads; MistralConfig does not.
transformers' MistralModel without a sliding window computes the same as LlamaModel without biases,
and their tensors have the same names. In: the source's spec and the new config. Out: the config to
write. Holds the config.
"""

from __future__ import annotations

from typing import Any

from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.default_config import default_config
from frugal_bonsai.model.family import ModelSpec

# Keys of both config classes that change the result. If the source omits one, LlamaConfig's default
# is stated, because MistralConfig's may differ.
_SHARED_KEYS = (
    "vocab_size",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
)


def as_mistral(spec: ModelSpec, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the Mistral that computes the same as this Llama.

    Args:
        spec: the Llama.
        config: the pruned Llama's config, with an explicit head_dim.

    Raises:
        OptionError: the config asks for biases.
    """
    from transformers import AutoConfig

    for key in ("attention_bias", "mlp_bias"):
        if config.pop(key, False):
            raise OptionError(f"--as-mistral: {key} is true, and a Mistral has no biases")
    config.pop("pretraining_tp", None)
    llama = AutoConfig.for_model(**default_config(spec))
    defaults = {key: getattr(llama, key) for key in _SHARED_KEYS}
    if not {"rope_theta", "rope_parameters"} & config.keys():
        defaults["rope_parameters"] = llama.rope_parameters
    return {
        **defaults,
        **config,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
    }
