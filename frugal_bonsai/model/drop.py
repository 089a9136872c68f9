"""What dropping whole layers and experts makes of a model: fewer of them, numbered anew.

In: a :class:`ModelSpec` and a :class:`KeepMask`. Out: the config of the smaller model, and the
names that its tensors have in it. Reads and holds no weights.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from frugal_bonsai.model.default_config import plain_values
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import KeepMask

# Config keys of transformers that hold one entry a layer.
_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")


def gone_tensors(spec: ModelSpec, mask: KeepMask, layer: int) -> set[str]:
    """Full names of the tensors of a layer's experts that keep no channel."""
    return {
        piece.tensor
        for group in spec.table.of_layer(layer)
        if group.expert is not None and not mask.kept(group)
        for piece in group.slices
        if not piece.joint
    }


def with_kept_layers(spec: ModelSpec, mask: KeepMask) -> ModelSpec:
    """The model with the config of what is left of its layers; itself if none is dropped."""
    dropped = mask.dropped_layers()
    if not dropped:
        return spec
    config = {**spec.config, spec.family.layers_key: spec.layers - len(dropped)}
    for key, values in _layer_lists(spec).items():
        config[key] = [value for at, value in enumerate(values) if at not in dropped]
    if "attention_types" in config:  # GPT-Neo's lists are made from runs: (kinds, how often)
        config["attention_types"] = [[[kind], 1] for kind in config["attention_layers"]]
    return replace(spec, config=config)


def _layer_lists(spec: ModelSpec) -> dict[str, list[Any]]:
    """The config's lists with an entry a layer.

    Some architectures work them out from a layer's number where the config has none (every other
    layer with a sliding window, every fourth without rotary embeddings): that number changes.
    """
    from transformers import AutoConfig

    full = AutoConfig.for_model(**plain_values(spec))
    lists = {key: spec.config.get(key) or getattr(full, key, None) for key in _LAYER_LISTS}
    return {
        key: values
        for key, values in lists.items()
        if isinstance(values, list) and len(values) == spec.layers
    }


def removed_parameters(spec: ModelSpec, mask: KeepMask) -> int:
    """Parameters of the removed units, and of what else dropped layers have."""
    removed = mask.removed_parameters()
    for layer in mask.dropped_layers():
        removed += sum(math.prod(shape) for shape in spec.layer_tensors[layer].values())
        groups = spec.table.of_layer(layer)
        removed -= sum(g.count * g.unit_parameters + g.joint_parameters for g in groups)
    return removed


def new_names(spec: ModelSpec, mask: KeepMask, names: list[str]) -> dict[str, str]:
    """Source's name -> output's name of each tensor that stays, in the same order."""
    dropped = mask.dropped_layers()
    kept = [layer for layer in range(spec.layers) if layer not in dropped]
    renamed: dict[str, str] = {}
    gone = {name for layer in kept for name in gone_tensors(spec, mask, layer)}
    numbered = _numbered_anew(spec, mask)
    for name in names:
        layer = _layer_of(spec, name)
        if layer is None:
            renamed[name] = name
        elif layer not in dropped and name not in gone:
            prefix = spec.prefix(kept.index(layer))
            renamed[name] = prefix + numbered.get(name, name).removeprefix(spec.prefix(layer))
    return renamed


def _numbered_anew(spec: ModelSpec, mask: KeepMask) -> dict[str, str]:
    """Tensor of an expert that stays -> its name when the experts before it are counted anew."""
    rule, names = spec.family.experts, dict[str, str]()
    if rule is None:
        return names
    for layer in range(spec.layers):
        groups = [g for g in spec.table.of_layer(layer) if g.expert is not None and mask.kept(g)]
        for at, group in enumerate(groups):
            module = f"{spec.prefix(layer)}{rule.module}."
            old, new = f"{module}{group.expert}.", f"{module}{at}."
            own = [piece.tensor for piece in group.slices if not piece.joint]
            names |= {name: new + name.removeprefix(old) for name in own}
    return names


def _layer_of(spec: ModelSpec, name: str) -> int | None:
    if name in spec.other_tensors or name == spec.family.head:
        return None
    return next((at for at in range(spec.layers) if name.startswith(spec.prefix(at))), None)
