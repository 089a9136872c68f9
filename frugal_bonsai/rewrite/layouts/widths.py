"""What a mask makes of the config: the widths of each layer, and the keys that all layouts share.

In: a :class:`ModelSpec` and a :class:`KeepMask`. Out: config keys as dicts. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import heads_fit
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask
from frugal_bonsai.rewrite.layouts.bundled import find_bundled
from frugal_bonsai.rewrite.layouts.mistral import as_mistral


def layer_widths(spec: ModelSpec, mask: KeepMask) -> list[dict[str, int]]:
    """The width keys of each kept layer's config: query heads, KV heads, FFN channels.

    Raises:
        OptionError: the mask is another model's, or leaves a layer without a unit of some kind.
    """
    require_units(spec, mask)
    counts, dropped = mask.counts(), mask.dropped_layers()
    return [
        count_widths(spec, {kind: counts[kind][layer] for kind in (ATTENTION, FFN)})
        for layer in range(spec.layers)
        if layer not in dropped
    ]


def count_widths(spec: ModelSpec, counts: Mapping[str, int]) -> dict[str, int]:
    """The width keys of a config for so many units of each kind in a layer."""
    family = spec.family
    return {
        family.heads_key: counts[ATTENTION] * spec.query_heads_per_group,
        family.kv_heads_key: counts[ATTENTION],
        family.ffn_key: counts[FFN],
    }


def equal_layers_config(spec: ModelSpec, widths: Mapping[str, int]) -> dict[str, Any]:
    """The config of a model whose layers are alike; a Mistral's where Llama's refuses the heads.

    Whether it may be one is the layout rules' to say, before.
    """
    config = {**plain_config(spec), **widths}
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
    for group in spec.table.groups:
        if group.layer not in dropped and not mask.kept(group):
            raise OptionError(
                f"keep mask: layer {group.layer} keeps none of its {group.count} {group.kind} "
                "units; keep at least one unit of each kind, or none of the whole layer"
            )


def plain_config(spec: ModelSpec) -> dict[str, Any]:
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
        config["architectures"] = [bundled.plain_class]
    return config
