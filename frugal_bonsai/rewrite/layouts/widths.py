"""What a mask makes of the config: the widths of each layer, and the keys that all layouts share.

In: a :class:`ModelSpec` and a :class:`KeepMask`. Out: config keys as dicts. Writes nothing.
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
    """The width keys of each kept layer's config: query heads, KV heads, FFN channels, experts.

    Raises:
        OptionError: the mask is another model's, or leaves a layer without a unit of some kind, or
            a layer's experts differ in width.
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
                f"{mask.kept(second)}: transformers holds a layer's experts in one tensor, which "
                "are equally wide; keep the same number in all experts of a layer, or take "
                "--layout padded"
            )
        widths.append(count_widths(spec, counts, experts[layer] if experts else 0))
    return widths


def count_widths(spec: ModelSpec, counts: Mapping[str, int], experts: int = 0) -> dict[str, int]:
    """The width keys of a config for so many units of each kind in a layer.

    A token is sent to as many experts as before, or to all that are left if they are fewer.
    """
    family = spec.family
    widths = {
        family.heads_key: counts[ATTENTION] * spec.query_heads_per_group,
        family.kv_heads_key: counts[ATTENTION],
        family.ffn_key: counts[FFN],
    }
    if family.experts is None:
        return widths
    own = [key for key in family.experts.count_keys if spec.config.get(key) is not None]
    widths |= dict.fromkeys(own, experts)
    return widths | {family.experts.chosen_key: min(spec.experts_chosen, experts)}


def equal_layers_config(spec: ModelSpec, widths: Mapping[str, int]) -> dict[str, Any]:
    """The config of a model whose layers are alike; a Mistral's where Llama's refuses the heads.

    Whether it may be one is the layout rules' to say, before.
    """
    config = {**shared_config(spec), **widths}
    if heads_fit(spec, widths[spec.family.heads_key]):
        return config
    return as_mistral(spec, config)


def require_units(spec: ModelSpec, mask: KeepMask) -> None:
    """Check that the mask fits the model and keeps a unit of each kind in every layer it keeps.

    Raises:
        OptionError: it does not; the text names the layer and the kind.
    """
    if mask.table != spec.table:
        raise OptionError(
            f"keep mask: belongs to another model ({mask.table.units} units, this one has "
            f"{spec.table.units}); make the mask from this model's own unit table"
        )
    dropped = mask.dropped_layers()
    if len(dropped) == spec.layers:
        raise OptionError("keep mask: drops every layer; keep at least one")
    experts = mask.experts()
    for group in spec.table.groups:
        if group.layer in dropped or mask.kept(group):
            continue
        if group.expert is None or not experts[group.layer]:
            raise OptionError(
                f"keep mask: layer {group.layer} keeps none of its {group.count} {group.kind} "
                "units; keep at least one unit of each kind, or none of the whole layer"
            )


def shared_config(spec: ModelSpec) -> dict[str, Any]:
    """The source's config without anything that speaks of bundled or custom code.

    ``head_dim`` is made explicit: the default, hidden_size / num_attention_heads, would change with
    the heads (where a config cannot state it, the heads stay). So is a tied head, which the family
    table may have seen from the tensors alone. An ``auto_map`` is dropped, because code files are
    not carried along and were not run.
    """
    config = dict(spec.config)
    config.pop("per_layer_config", None)
    config.pop("auto_map", None)
    if spec.family.head_dim_key is not None:
        config[spec.family.head_dim_key] = spec.head_dim
    if spec.tied:
        config["tie_word_embeddings"] = True
    bundled = find_bundled(spec.family.model_type)
    if config.get("architectures") == [bundled.model_class]:
        config["architectures"] = [bundled.standard_class]
    return config
