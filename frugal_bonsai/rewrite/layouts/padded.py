"""Layout ``padded``: each layer keeps its own units, padded with zeros to the widest layer.

In: a model, its mask and a folder. Out: the source's ``config.json`` with the widest layer's sizes.
The output needs no custom code and loads wherever the architecture loads; it saves only what no
layer needs. The zeros do not change the result, because the output projection's columns of a zero
unit are zero (a zero KV group attends evenly to zero values, a zero channel is activation(0) x 0).
Holds the config.
"""

from __future__ import annotations

from pathlib import Path

from frugal_bonsai.checkpoint.commit import write_json
from frugal_bonsai.checkpoint.folder import CONFIG_FILE
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import EXPERT_TILE, PADDED, LayoutRules
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask
from frugal_bonsai.rewrite.layouts.widths import count_widths, equal_layers_config, require_units


def padded_counts(spec: ModelSpec, mask: KeepMask, rules: LayoutRules) -> dict[str, int] | None:
    """Return kind -> number of units with which each layer is stored; None for other layouts.

    The number is the widest layer's; for attention, the next number that the architecture's config
    accepts.

    Raises:
        OptionError: the config accepts no number that is large enough.
    """
    if rules.layout != PADDED:
        return None
    groups, kinds = mask.table.groups, mask.table.kinds
    widest = {kind: max(mask.kept(g) for g in groups if g.kind == kind) for kind in kinds}
    if spec.experts:
        widest[FFN] = min(-(-widest[FFN] // EXPERT_TILE) * EXPERT_TILE, spec.intermediate)
    if spec.whole_attention is not None:
        return widest
    per_group, kept = spec.query_heads_per_group, widest[ATTENTION]
    for count in range(kept, max(kept, spec.hidden // per_group) + 1):
        if rules.heads_fit(spec, count * per_group):
            return widest | {ATTENTION: count}
    raise OptionError(
        f"padded layout: a layer keeps {kept * per_group} query heads, and "
        f"{spec.family.model_type} accepts no number from there on ({spec.family.hidden_key} "
        f"{spec.hidden} must be a multiple of it); take --layout per-layer, or --as-mistral"
    )


def write_config(spec: ModelSpec, mask: KeepMask, rules: LayoutRules, folder: Path) -> None:
    """Write ``config.json``.

    Raises:
        OptionError: the mask is another model's, leaves a layer without a unit of some kind, or
            keeps different numbers of experts in the layers.
        OutputError: the file cannot be written.
    """
    require_units(spec, mask)
    counts = padded_counts(spec, mask, rules)
    assert counts is not None
    numbers = mask.experts()
    experts = {numbers[layer] for layer in mask.layers_with(FFN) if numbers} or {0}
    if len(experts) > 1:
        raise OptionError(
            f"padded layout: layers keep {min(experts)} to {max(experts)} experts, and zeros "
            "cannot replace a removed one, because the router would send tokens there; keep the "
            "same number in every layer, or take --layout per-layer"
        )
    widths = count_widths(spec, counts, *experts)
    write_json(folder / CONFIG_FILE, spec.output_config(equal_layers_config(spec, widths)))
