"""A model's config as transformers' own class of its architecture accepts it.

In: a :class:`ModelSpec`, of a pruned model too. Out: config values without what names bundled code
or other widths layer by layer. Holds the config.
"""

from __future__ import annotations

from typing import Any

from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import heads_fit

_LAYOUT_KEYS = ("per_layer_config", "auto_map", "architectures")


def plain_values(spec: ModelSpec) -> dict[str, Any]:
    """Values for ``AutoConfig.for_model``.

    A per-layer model's widest layer may have a number of heads that the config class refuses (the
    bundled model's does not). Then one KV group stands for them: layers take their widths from the
    weights, and of the numbers of heads only the ratio matters to them. Where the class computes a
    head's width from their number, as many stand for them as make it that width.
    """
    values = {key: value for key, value in spec.config.items() if key not in _LAYOUT_KEYS}
    if heads_fit(spec, spec.heads):
        return values
    family, groups = spec.family, 1
    if family.head_dim_key is None:
        groups = spec.hidden // spec.head_dim // spec.query_heads_per_group
    else:
        values[family.head_dim_key] = spec.head_dim
    # The query heads last: some families have one key for both.
    values[family.kv_heads_key] = groups
    values[family.heads_key] = groups * spec.query_heads_per_group
    return values
