"""Models whose layers have different widths, as frugal-bonsai's ``per-layer`` layout writes them.

This file lies beside the weights, so that transformers loads them with ``trust_remote_code=True``.
It adds no computation: for every architecture of transformers, say Llama, it has the classes
``PrunedLlamaConfig`` and ``PrunedLlamaForCausalLM``, made when they are asked for. The second one
builds transformers' own layers, each with its own sizes from the config's ``per_layer_config``. It
needs transformers 5.14 or newer and nothing else.
"""

import copy

import transformers
from huggingface_hub.dataclasses import strict
from torch.nn import Linear, ModuleList, Parameter
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.pytorch_utils import Conv1D

if not hasattr(PreTrainedConfig, "is_heterogeneous"):
    raise ImportError("this model's layers differ in width: install transformers 5.14 or newer")

PREFIX = "Pruned"
# Output projections of attention modules, and the attributes that count heads in them.
OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")
COUNTS = ("num_heads", "num_key_value_heads", "num_kv_heads", "split_size")


def __getattr__(name):
    """Make ``Pruned`` + the name of one of transformers' config or model classes."""
    base = getattr(transformers, name.removeprefix(PREFIX), None) if PREFIX in name else None
    if isinstance(base, type) and issubclass(base, PreTrainedConfig):
        made = strict(_config_class(base))
    elif isinstance(base, type) and issubclass(base, PreTrainedModel):
        made = _model_class(base)
        # Where transformers renames tensors as it reads them, it does so by the class's name.
        renames = get_checkpoint_conversion_mapping(base.__name__)
        renames = renames or get_checkpoint_conversion_mapping(base.config_class.model_type)
        if renames:
            register_checkpoint_conversion_mapping(name, renames, overwrite=True)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made.__name__ = made.__qualname__ = name
    globals()[name] = made  # one class a name, however often it is asked for
    return made


def _config_class(base):
    """The architecture's config, checked layer by layer; heads need not divide hidden_size."""

    class PrunedConfig(base):
        _auto_class = "AutoConfig"

        @property
        def layer_configs(self):
            """One config per layer, with that layer's sizes."""
            layers = range(self.num_hidden_layers)
            return [self.per_layer_config[i] if self.is_heterogeneous else self for i in layers]

        def validate_architecture(self):
            """Check that each layer's KV heads are read by equally many query heads."""
            for index, layer in enumerate(self.layer_configs):
                heads = getattr(layer, "num_attention_heads", 1)
                kv_heads = getattr(layer, "num_key_value_heads", None) or heads
                if heads % kv_heads:
                    raise ValueError(
                        f"layer {index}: num_attention_heads ({heads}) is not a multiple of "
                        f"num_key_value_heads ({kv_heads})"
                    )

        def validate_rope(self):
            """Check the rotary settings with one layer's sizes; heads are equally wide in all."""
            base.validate_rope(self.layer_configs[0])

    return PrunedConfig


def _model_class(base):
    """The architecture's model with every layer built from its own config."""

    class PrunedModel(base):
        config_class = globals().get(PREFIX + base.config_class.__name__) or __getattr__(
            PREFIX + base.config_class.__name__
        )
        _auto_class = "AutoModelForCausalLM"

        def __init__(self, config):
            """Build the model with layer 0's sizes, then replace the layers."""
            super().__init__(_dense_heads(config.layer_configs[0]))
            config._attn_implementation_internal = self.config._attn_implementation_internal
            # Itself and the base model; rotary embeddings read sizes, and keep layer 0's.
            for module in self.modules():
                if isinstance(module, PreTrainedModel):
                    module.config = config
            layer_configs = config.layer_configs
            path, layers = next(
                (path, module)
                for path, module in self.named_modules()
                if isinstance(module, ModuleList) and len(module) == len(layer_configs)
            )
            built = [_dense_heads(layer_config) for layer_config in layer_configs]
            own = [type(old)(built[at], at) for at, old in enumerate(layers)]
            for at, layer in enumerate(own):
                kept = layer_configs[at].num_attention_heads
                _shrink_heads(layer, kept, built[at].num_attention_heads)
                for module in layer.modules():
                    if "config" in module.__dict__:
                        module.config = _LayerConfig(layer_configs[at], config)
            self.set_submodule(path, ModuleList(own))
            self.post_init()

    return PrunedModel


def _dense_heads(config):
    """The config with as many heads as hidden_size has room for, where their width is computed."""
    head_dim = getattr(config, "pruned_head_dim", None)
    if head_dim is None:
        return config
    dense, kept = copy.copy(config), config.num_attention_heads
    dense.num_attention_heads = config.hidden_size // head_dim
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None):
            setattr(dense, name, getattr(config, name) * dense.num_attention_heads // kept)
    return dense


def _shrink_heads(layer, kept, dense):
    """Leave ``kept`` of an attention module's ``dense`` heads."""
    if kept == dense:
        return
    for attention in layer.modules():
        if not (hasattr(attention, "head_dim") or hasattr(attention, "head_size")):
            continue
        for name in COUNTS:
            if isinstance(getattr(attention, name, None), int):
                setattr(attention, name, getattr(attention, name) * kept // dense)
        for name, projection in attention.named_children():
            if isinstance(projection, (Linear, Conv1D)):
                _shrink_projection(projection, kept, dense, output=name in OUTPUTS)


def _shrink_projection(projection, kept, dense, *, output):
    """Leave a share of the inputs of an output projection, of the outputs of another."""
    turned = isinstance(projection, Conv1D)  # its weight is [in, out]
    shape = list(projection.weight.shape)
    shape[output != turned] = shape[output != turned] * kept // dense
    projection.weight = Parameter(projection.weight.new_empty(shape))
    if not output and projection.bias is not None:
        size = len(projection.bias) * kept // dense
        projection.bias = Parameter(projection.bias.new_empty(size))
    names = ("nx", "nf") if turned else ("in_features", "out_features")
    setattr(projection, names[not output], shape[output != turned])


class _LayerConfig:
    """One layer's config, of which the model's says which attention kernel runs."""

    def __init__(self, own, whole):
        self.__dict__.update(own=own, whole=whole)

    def __getattr__(self, name):
        if name in ("own", "whole"):  # while it is being copied
            raise AttributeError(name)
        return getattr(self.whole if "_implementation" in name else self.own, name)
