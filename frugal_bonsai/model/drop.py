"""Renumber the layers and experts that remain when others are dropped.

In: a :class:`ModelSpec` and a :class:`KeepMask`. Out: the config of the smaller model, and the new
names of its tensors. Holds names, no weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from frugal_bonsai.model.default_config import default_config
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import KeepMask

# Config keys of transformers that hold one entry per layer.
_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")
# Config keys of transformers for the indices of some layers.
_OF_ATTENTION = "attn_layer_indices"  # from which the config class computes layer_types
_LAYER_INDICES = ("moe_layers", _OF_ATTENTION)
# Config keys for the number of layers without experts, which are the first.
_FIRST_DENSE = ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
# Config key for the last layer with experts; -1 for the last of all.
_LAST_ROUTED = "moe_layer_end_index"


def dropped_expert_tensors(spec: ModelSpec, mask: KeepMask, layer: int) -> set[str]:
    """Return the full names of the tensors of a layer's experts that keep no channel."""
    gone = set(mask.dropped_experts(layer))
    return {name for name, expert in _expert_tensors(spec, layer).items() if expert in gone}


def _expert_tensors(spec: ModelSpec, layer: int) -> dict[str, int]:
    """Return full name of each tensor of a layer's experts -> index of the expert."""
    rule = spec.family.experts
    if rule is None:
        return {}
    names = [name for name in spec.layer_tensors[layer] if name.startswith(f"{rule.module}.")]
    start, at = spec.prefix(layer), rule.module.count(".") + 1
    return {start + name: int(name.split(".")[at]) for name in names}


def with_kept_layers(spec: ModelSpec, mask: KeepMask) -> ModelSpec:
    """Return the model with the config of its kept layers, or itself if none is dropped."""
    dropped = mask.dropped_layers()
    if not dropped:
        return spec
    config = {**spec.config, spec.family.layers_key: spec.layers - len(dropped)}
    for key, values in _layer_lists(spec).items():
        if len(values) != spec.layers or (key == "layer_types" and _OF_ATTENTION in spec.config):
            continue
        config[key] = [value for at, value in enumerate(values) if at not in dropped]
    kept = [layer for layer in range(spec.layers) if layer not in dropped]
    for key, layers in _layer_lists(spec, _LAYER_INDICES).items():
        config[key] = [kept.index(layer) for layer in layers if layer in kept]
    for key in _FIRST_DENSE:
        dense = spec.config.get(key)
        if isinstance(dense, int):
            config[key] = dense - sum(layer < dense for layer in dropped)
    last = spec.config.get(_LAST_ROUTED)
    if isinstance(last, int) and last >= 0:
        config[_LAST_ROUTED] = last - sum(layer <= last for layer in dropped)
    if "attention_types" in config:  # GPT-Neo computes its list from pairs ([kinds], repeats)
        config["attention_types"] = [[[kind], 1] for kind in config["attention_layers"]]
    return replace(spec, config=config)


def _layer_lists(spec: ModelSpec, keys: Sequence[str] = _LAYER_LISTS) -> dict[str, list[Any]]:
    """Return the lists of the config under some keys: of one entry per layer, by default.

    If the config has no list, some architectures compute it from the layers' numbers, for example
    a sliding window in every other layer. Dropping layers changes these numbers, so the list is
    stated.
    """
    from transformers import AutoConfig

    full = AutoConfig.for_model(**default_config(spec))
    lists = {key: spec.config.get(key) or getattr(full, key, None) for key in keys}
    return {key: values for key, values in lists.items() if isinstance(values, list)}


def removed_parameters(spec: ModelSpec, mask: KeepMask) -> int:
    """Return the parameters of the removed units and of everything else in dropped layers."""
    removed = mask.removed_parameters()
    for layer in mask.dropped_layers():
        removed += sum(math.prod(shape) for shape in spec.layer_tensors[layer].values())
        groups = spec.table.of_layer(layer)
        removed -= sum(g.count * g.unit_parameters + g.joint_parameters for g in groups)
    return removed


def new_names(spec: ModelSpec, mask: KeepMask, names: list[str]) -> dict[str, str]:
    """Return name in the source -> name in the output of each kept tensor, in the same order."""
    dropped = mask.dropped_layers()
    kept = [layer for layer in range(spec.layers) if layer not in dropped]
    renamed: dict[str, str] = {}
    removed = {name for layer in kept for name in dropped_expert_tensors(spec, mask, layer)}
    experts = _renumbered_experts(spec, mask)
    for name in names:
        layer = _layer_of(spec, name)
        if layer is None:
            renamed[name] = name
        elif layer not in dropped and name not in removed:
            prefix = spec.prefix(kept.index(layer))
            renamed[name] = prefix + experts.get(name, name).removeprefix(spec.prefix(layer))
    return renamed


def _renumbered_experts(spec: ModelSpec, mask: KeepMask) -> dict[str, str]:
    """Return tensor of a kept expert -> its name after the dropped experts before it are gone."""
    rule, names = spec.family.experts, dict[str, str]()
    if rule is None:
        return names
    for layer in range(spec.layers):
        gone, module = mask.dropped_experts(layer), f"{spec.prefix(layer)}{rule.module}."
        for name, expert in _expert_tensors(spec, layer).items():
            at = expert - sum(other < expert for other in gone)
            names[name] = f"{module}{at}.{name.removeprefix(f'{module}{expert}.')}"
    return names


def _layer_of(spec: ModelSpec, name: str) -> int | None:
    """Return the index of a tensor's layer; None outside the layers."""
    if name in spec.other_tensors or name == spec.family.head:
        return None
    return next((at for at in range(spec.layers) if name.startswith(spec.prefix(at))), None)
