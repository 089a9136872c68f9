"""Models whose layers differ in width, as frugal-bonsai's ``per-layer`` layout writes them.

transformers loads this file from the folder of the weights with ``trust_remote_code=True``. For
every architecture of transformers, for example Llama, it has the classes ``PrunedLlamaConfig`` and
``PrunedLlamaForCausalLM``, which are made when they are first used. The model consists of
transformers' own layers, each with its sizes from the config's ``per_layer_config``; no computation
is added. The file needs transformers 5.14 or newer and nothing else.
"""

import copy
import inspect

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
    """Make the class whose name is ``Pruned`` + a config or model class of transformers."""
    base = getattr(transformers, name.removeprefix(PREFIX), None) if PREFIX in name else None
    if isinstance(base, type) and issubclass(base, PreTrainedConfig):
        made = strict(_config_class(base))
    elif isinstance(base, type) and issubclass(base, PreTrainedModel):
        made = _model_class(base)
        # transformers looks up the renaming of tensors by the name of the class.
        renames = get_checkpoint_conversion_mapping(base.__name__)
        renames = renames or get_checkpoint_conversion_mapping(base.config_class.model_type)
        if renames:
            register_checkpoint_conversion_mapping(name, renames, overwrite=True)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made.__name__ = made.__qualname__ = name
    globals()[name] = made  # the same class at every access
    return made


def _config_class(base):
    """Return the architecture's config class with checks for each layer.

    The number of heads need not divide hidden_size.
    """

    class PrunedConfig(base):
        _auto_class = "AutoConfig"

        @property
        def layer_configs(self):
            """One config per layer, with that layer's sizes."""
            # Copies: on its own config the model states that it computes all experts at once.
            own = self.per_layer_config if self.is_heterogeneous else None
            layers = range(self.num_hidden_layers)
            return [copy.copy(self) if own is None else own[i] for i in layers]

        def validate_architecture(self):
            """Check that each layer's query heads divide evenly among its KV heads."""
            for index, layer in enumerate(self.layer_configs):
                heads = getattr(layer, "num_attention_heads", 1)
                kv_heads = getattr(layer, "num_key_value_heads", None) or heads
                if heads % kv_heads:
                    raise ValueError(
                        f"layer {index}: num_attention_heads ({heads}) is not a multiple of "
                        f"num_key_value_heads ({kv_heads})"
                    )

        def validate_rope(self):
            """Check the rotary settings with layer 0's sizes: all heads have the same width."""
            base.validate_rope(self.layer_configs[0])

    return PrunedConfig


def _model_class(base):
    """Return the architecture's model class with each layer built from its own config."""

    class PrunedModel(base):
        config_class = globals().get(PREFIX + base.config_class.__name__) or __getattr__(
            PREFIX + base.config_class.__name__
        )
        _auto_class = "AutoModelForCausalLM"

        def __init__(self, config):
            """Build the model with layer 0's sizes, then replace the layers."""
            super().__init__(_with_own_sizes(_dense_heads(config.layer_configs[0]), config))
            config._attn_implementation_internal = self.config._attn_implementation_internal
            # The model and its base model. Rotary embeddings keep layer 0's config for its sizes.
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
            own = [type(old)(built[at], at, **_kind(old)) for at, old in enumerate(layers)]
            for at, layer in enumerate(own):
                kept = layer_configs[at].num_attention_heads
                _shrink_heads(layer, kept, built[at].num_attention_heads)
                for module in layer.modules():
                    if "config" in module.__dict__:
                        module.config = _LayerConfig(layer_configs[at], config)
            self.set_submodule(path, ModuleList(own))
            self.post_init()

    return PrunedModel


def _kind(layer):
    """Return the kind of a layer as an argument of its class, where the class takes one."""
    takes = "layer_type" in inspect.signature(type(layer).__init__).parameters
    return {"layer_type": layer.block_type} if takes else {}


def _dense_heads(config):
    """Return the config with the dense model's heads if the architecture computes their width."""
    head_dim = getattr(config, "pruned_head_dim", None)
    if head_dim is None:
        return config
    dense, kept = copy.copy(config), config.num_attention_heads
    dense.num_attention_heads = config.hidden_size // head_dim
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None):
            setattr(dense, name, getattr(config, name) * dense.num_attention_heads // kept)
    return dense


def _with_own_sizes(first, config):
    """Return layer 0's config with the heads of each layer if the architecture's differ in width.

    Rotary embeddings are made from it.
    """
    layers = config.layer_configs
    # Falcon's config computes a width, which is no value of it.
    if len({vars(layer).get("head_dim") for layer in layers}) > 1:
        keys = ("head_dim", "num_key_value_heads")
        first.per_layer_config = {
            at: {key: getattr(layer, key) for key in keys} for at, layer in enumerate(layers)
        }
    return first


def _shrink_heads(layer, kept, dense):
    """Reduce an attention module from ``dense`` to ``kept`` heads."""
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
    """Reduce the inputs of an output projection, or the outputs of any other projection."""
    transposed = isinstance(projection, Conv1D)  # its weight is [in, out]
    shape = list(projection.weight.shape)
    shape[output != transposed] = shape[output != transposed] * kept // dense
    projection.weight = Parameter(projection.weight.new_empty(shape))
    if not output and projection.bias is not None:
        size = len(projection.bias) * kept // dense
        projection.bias = Parameter(projection.bias.new_empty(size))
    names = ("nx", "nf") if transposed else ("in_features", "out_features")
    setattr(projection, names[not output], shape[output != transposed])


class _LayerConfig:
    """One layer's config. The attention implementation is read from the model's config."""

    def __init__(self, own, whole):
        self.__dict__.update(own=own, whole=whole)

    def __getattr__(self, name):
        if name in ("own", "whole"):  # during copying, before they are set
            raise AttributeError(name)
        return getattr(self.whole if "_implementation" in name else self.own, name)
