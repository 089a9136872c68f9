"""A Llama whose layers have different widths, as frugal-bonsai's ``per-layer`` layout writes it.

This file lies beside the weights, so that transformers loads them with ``trust_remote_code=True``.
It adds no computation: transformers' own layers are built, each with its own sizes from the
config's ``per_layer_config``. It needs transformers 5.14 or newer and nothing else.
"""

from huggingface_hub.dataclasses import strict
from torch.nn import ModuleList
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

if not hasattr(LlamaConfig, "is_heterogeneous"):
    raise ImportError("this model's layers differ in width: install transformers 5.14 or newer")


@strict
class PrunedLlamaConfig(LlamaConfig):
    """Llama's config, checked layer by layer; pruned head counts need not divide hidden_size."""

    _auto_class = "AutoConfig"

    @property
    def layer_configs(self):
        """One config per layer, with that layer's sizes."""
        layers = range(self.num_hidden_layers)
        return [self.per_layer_config[i] if self.is_heterogeneous else self for i in layers]

    def validate_architecture(self):
        """Check that each layer's KV heads are read by equally many query heads."""
        for index, layer in enumerate(self.layer_configs):
            if layer.num_attention_heads % layer.num_key_value_heads:
                raise ValueError(
                    f"layer {index}: num_attention_heads ({layer.num_attention_heads}) is not a "
                    f"multiple of num_key_value_heads ({layer.num_key_value_heads})"
                )

    def validate_rope(self):
        """Check the rotary settings with one layer's sizes; head_dim is the same in all of them."""
        LlamaConfig.validate_rope(self.layer_configs[0])


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """Llama with every layer built from its own config."""

    config: PrunedLlamaConfig
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: PrunedLlamaConfig):
        """Build the model with layer 0's sizes, then replace the layers."""
        layer_configs = config.layer_configs
        super().__init__(layer_configs[0])
        config._attn_implementation_internal = self.config._attn_implementation_internal
        self.config = self.model.config = config
        self.model.layers = ModuleList(
            LlamaDecoderLayer(layer, index) for index, layer in enumerate(layer_configs)
        )
        for layer in self.model.layers:  # the model's config says which attention kernel runs
            layer.self_attn.config = config
        self.post_init()
