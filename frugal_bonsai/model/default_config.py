"""Config values that the architecture's own class in transformers accepts.

In: the :class:`ModelSpec` of a dense or a pruned model. Out: its config without the keys of the
per-layer layout, which name bundled code and the widths of single layers. Holds the config.
"""

from __future__ import annotations

from typing import Any

from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import heads_fit

_LAYOUT_KEYS = ("per_layer_config", "auto_map", "architectures")


def default_config(spec: ModelSpec) -> dict[str, Any]:
    """Return the values for ``AutoConfig.for_model``.

    The config class may refuse the head count of a per-layer model's widest layer (the bundled
    class does not). The values then state another number of KV groups: layers take their widths
    from the weights, and only the ratio of query to KV heads matters to them. That number is one
    group, or, if the class computes the width of a head from it, the number that gives this width.
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
