"""Hugging Face's model without weights, and its layers replaced by recording proxies.

In: a model's description. Out: transformers' own model on the meta device, with projections and
experts as modules whose weights can be streamed; or its layers, and proxies in their place that
record what the model calls them with. Holds buffers, no weights.

Shape suffixes: B windows of a micro-batch, S tokens of a window, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn

from frugal_bonsai.model.default_config import config_errors, default_config
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.stream.experts import split_experts


class LayerProxy(nn.Module):
    """Takes a layer's place and records the arguments of its call.

    Attributes:
        hidden_BSH: hidden state of the last call.
        kwargs: other arguments of the last call, by name.
    """

    def __init__(self, layer: nn.Module, *, returns_tuple: bool) -> None:
        super().__init__()
        # Some models read attributes of a layer before they call it, such as attention_type.
        self._layer = [layer]
        self._signature = inspect.signature(layer.forward)
        self._returns_tuple = returns_tuple
        self.hidden_BSH: torch.Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_BSH: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Record the arguments and return the hidden state unchanged."""
        # Arguments are replayed by name; the first one is the hidden state.
        named = dict(self._signature.bind_partial(hidden_BSH, *args).arguments)
        named.pop(next(iter(named)))
        self.hidden_BSH, self.kwargs = hidden_BSH, {**named, **kwargs}
        return (hidden_BSH, None) if self._returns_tuple else hidden_BSH


def record_layers(
    model: nn.Module, spec: ModelSpec
) -> tuple[nn.Module, list[nn.Module], list[LayerProxy]]:
    """Replace a model's layers by recording proxies.

    Args:
        model: Hugging Face's causal language model, which is changed.
        spec: its description.

    Returns:
        The model without its head, its layers, and their proxies.
    """
    base = model.get_submodule(spec.family.base_module)
    layers = list(cast(Iterable[nn.Module], base.get_submodule(spec.family.layers_module)))
    proxies = [LayerProxy(layer, returns_tuple=spec.family.returns_tuple) for layer in layers]
    parent, _, name = spec.family.layers_module.rpartition(".")
    setattr(base.get_submodule(parent), name, nn.ModuleList(proxies))
    return base, layers, proxies


def build_empty_model(spec: ModelSpec) -> nn.Module:
    """Build Hugging Face's model of this config on the meta device, with real buffers.

    Transposed projections become ``torch.nn.Linear``, because weights are streamed as ``[out,
    in]``. So do projections of a subclass of it (Falcon's): they compute the same without
    ``torch.nn.functional.linear``, the only product that stored weights support.

    Raises:
        CheckpointError: transformers does not accept the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with config_errors(spec.config):
        config = AutoConfig.for_model(**default_config(spec))
        # Initial values, which nothing reads, would take most of the time.
        with init_empty_weights(include_buffers=False), no_init_weights():
            # transformers chooses the attention: sdpa, where the architecture has it.
            model = AutoModelForCausalLM.from_config(config)
    for name in {name.removesuffix(".weight") for name in spec.family.transposed}:
        for layer in range(spec.layers):
            path = spec.prefix(layer) + name
            inner, outer = model.get_parameter(f"{path}.weight").shape
            model.set_submodule(path, nn.Linear(inner, outer, device="meta"))
    rule = spec.family.experts
    router = None if rule is None else "." + rule.router.removesuffix(".weight")
    for path, module in list(model.named_modules()):
        if router is not None and path.endswith(router):
            continue  # it does more than multiply, and is not quantised
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            sides, bias = (module.in_features, module.out_features), module.bias is not None
            model.set_submodule(path, nn.Linear(*sides, bias=bias, device="meta"))
    with config_errors(spec.config):  # the config may name other layers with experts
        split_experts(model, spec)
    return cast(nn.Module, model.eval())
