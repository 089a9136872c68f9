"""The widths of the layers that a mask leaves, and the config keys that all layouts share.

In: a :class:`ModelSpec` and a :class:`KeepMask`. Out: config keys as dicts. Writes no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import heads_fit
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask, iterate_layers
from frugal_bonsai.rewrite.layouts.bundled import find_bundled
from frugal_bonsai.rewrite.layouts.mistral import as_mistral


def layer_widths(spec: ModelSpec, mask: KeepMask) -> list[dict[str, int]]:
    """Return the config keys of each kept layer's widths: heads, FFN channels and experts.

    Raises:
        OptionError: the mask is another model's, leaves a layer without a unit of some kind, or
            leaves the experts of a layer with different widths.
    """
    require_units(spec, mask)
    dropped, experts = mask.dropped_layers(), mask.experts()
    widths = []
    for layer, groups in iterate_layers(spec.table):
        if layer in dropped:
            continue
        kept = {(g.kind, mask.kept(g)): g for g in groups if g.expert is None or mask.kept(g)}
        counts = {kind: count for kind, count in kept}
        if len(counts) < len(kept):
            first, second = [g for (kind, _), g in kept.items() if kind == FFN][:2]
            raise OptionError(
                f"{first.name} keeps {mask.kept(first)} units, {second.name} keeps "
                f"{mask.kept(second)}: transformers holds the experts of a layer in one tensor, so "
                "they must be equally wide; keep the same number in all experts of a layer, or "
                "take --layout padded"
            )
        widths.append(count_widths(spec, counts, experts[layer] if experts else 0))
    # A layer without experts has no widths of them: those of another layer do no harm.
    every = {key: width for layer in widths for key, width in layer.items()}
    widths = [every | layer for layer in widths]
    return widths


def count_widths(spec: ModelSpec, counts: Mapping[str, int], experts: int = 0) -> dict[str, int]:
    """Return the config keys of a layer's widths.

    Args:
        spec: the dense model.
        counts: kind -> number of units.
        experts: number of experts. A token is sent to as many experts as before, or to all of them
            if they are fewer.
    """
    family = spec.family
    widths = {family.ffn_key: counts[FFN]} if FFN in counts else {}
    if spec.whole_attention is None:
        widths[family.kv_heads_key] = counts[ATTENTION]
        # The query heads last: some families have one key for both.
        widths[family.heads_key] = counts[ATTENTION] * spec.query_heads_per_group
    if family.experts is None or not experts:
        return widths
    own = [key for key in family.experts.count_keys if spec.config.get(key) is not None]
    widths |= dict.fromkeys(own, experts)
    return widths | {family.experts.chosen_key: min(spec.experts_chosen, experts)}


def equal_layers_config(spec: ModelSpec, widths: Mapping[str, int]) -> dict[str, Any]:
    """Return the config of a model with equal layers.

    If a Llama's config class refuses the number of heads, the config is a Mistral's. The layout
    rules have checked before that this is allowed.
    """
    config = {**shared_config(spec), **widths}
    if heads_fit(spec, widths.get(spec.family.heads_key, spec.heads)):
        return config
    return as_mistral(spec, config)


def require_units(spec: ModelSpec, mask: KeepMask) -> None:
    """Check that the mask fits the model and that every kept layer keeps a unit of each kind.

    Raises:
        OptionError: the mask does not. The text names the layer and the kind.
    """
    if mask.table != spec.table:
        raise OptionError(
            f"keep mask: belongs to another model ({mask.table.units} units, this one has "
            f"{spec.table.units}); make the mask from this model's own unit table"
        )
    dropped = mask.dropped_layers()
    if len(dropped) == spec.layers:
        raise OptionError("keep mask: drops every layer; keep at least one")
    if dropped and spec.whole_layers is not None:
        raise OptionError(
            f"keep mask: drops layer {dropped[0]}, but a {spec.family.model_type} keeps its "
            f"layers, because {spec.whole_layers}; keep at least one unit of each kind there"
        )
    experts = mask.experts()
    for layer in mask.layers_with(FFN) if experts else ():
        _require_experts(spec, mask, layer, experts[layer])
    for group in spec.table.groups:
        if group.layer in dropped or mask.kept(group):
            continue
        if group.expert is None or not experts[group.layer]:
            raise OptionError(
                f"keep mask: layer {group.layer} keeps none of its {group.count} {group.kind} "
                "units; keep at least one unit of each kind, or none of the whole layer"
            )


def _require_experts(spec: ModelSpec, mask: KeepMask, layer: int, kept: int) -> None:
    """Check that a layer keeps experts enough for its router, and as many in each group."""
    least, groups = spec.least_experts, spec.expert_groups
    if 0 < kept < least:
        raise OptionError(
            f"keep mask: layer {layer} keeps {kept} experts, but the router of a "
            f"{spec.family.model_type} needs {least}; keep more"
        )
    count = sum(group.expert is not None for group in spec.table.of_layer(layer))
    gone = [0] * groups
    for expert in mask.dropped_experts(layer):
        gone[expert * groups // count] += 1
    if len(set(gone)) > 1:
        raise OptionError(
            f"keep mask: layer {layer} drops {min(gone)} to {max(gone)} experts of each of its "
            f"{groups} groups, which must be equal; drop the same number of each group"
        )


def shared_config(spec: ModelSpec) -> dict[str, Any]:
    """Return the source's config without references to bundled or custom code.

    ``head_dim`` is stated, because its default (hidden_size / num_attention_heads) changes with the
    number of heads; a config that cannot state it keeps its heads. A tied head is stated, because
    the source may show it only by the missing tensor. ``auto_map`` is removed, because code files
    are neither run nor copied.
    """
    config = dict(spec.config)
    config.pop("per_layer_config", None)
    config.pop("auto_map", None)
    if spec.family.head_dim_key is not None:
        config[spec.family.head_dim_key] = spec.head_dim
    if spec.tied:
        config["tie_word_embeddings"] = True
    further = spec.family.further_layers_key
    if further is not None and further in config:
        config[further] = 0
    bundled = find_bundled(spec.family.model_type)
    if config.get("architectures") == [bundled.model_class]:
        config["architectures"] = [bundled.standard_class]
    return config
