"""``inspect``: family, units, parameters and size, from headers alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

from frugal_bonsai.model.layout import UNIFORM, layout_rules
from frugal_bonsai.run.open import open_model


def inspect(model: str, *, assume_family: str | None = None) -> dict[str, Any]:
    """What a model is, as plain values; reads no weights.

    Args:
        model: folder, hub id or ``example``.
        assume_family: the family that an architecture without a table is like.
    """
    with open_model(model, headers_only=True, assume_family=assume_family) as opened:
        spec, checkpoint = opened.spec, opened.checkpoint
        dtypes: Counter[str] = Counter()
        for entry in checkpoint.tensors.values():
            dtypes[entry.dtype] += entry.size_bytes
        rules = layout_rules(spec, UNIFORM)
        groups = []
        for kind in spec.table.kinds:
            mine = [group for group in spec.table.groups if group.kind == kind]
            groups.append(
                {
                    "kind": kind,
                    # Of all experts of a layer together.
                    "units_per_layer": [
                        sum(group.count for group in mine if group.layer == layer)
                        for layer in range(spec.layers)
                    ],
                    "parameters_per_unit": [group.unit_parameters for group in mine],
                }
            )
        return {
            "model": model,
            "family": spec.family.title,
            "layers": spec.layers,
            "hidden": spec.hidden,
            "heads": spec.heads,
            "kv_heads": spec.kv_heads,
            "head_dim": spec.head_dim,
            "intermediate": spec.intermediate,
            "experts": spec.experts,
            "experts_chosen": spec.experts_chosen,
            "vocabulary": spec.vocabulary,
            "positions": spec.positions,
            "tied": spec.tied,
            "dtypes": dict(dtypes),
            "parameters": spec.parameters,
            "block_parameters": spec.block_parameters,
            "weight_bytes": checkpoint.weight_bytes,
            "groups": groups,
            "layouts": {
                UNIFORM: {"tile": rules.tile, "attention_counts": list(rules.attention_counts)}
            },
        }
