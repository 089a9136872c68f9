"""Config values that the architecture's own class in transformers accepts.

In: the :class:`ModelSpec` of a dense or a pruned model. Out: its config without the keys of the
per-layer layout, which name bundled code and the widths of single layers; or an error that says
which value the class refuses. Holds the config.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from frugal_bonsai.errors import WRONG_VALUES, CheckpointError
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import heads_fit

_MOST_MODULES = 10_000
_COUNT = re.compile(r"(num|n)_(\w+_)?(layers?|experts?|blocks?)|depth")
_LAYOUT_KEYS = ("per_layer_config", "auto_map", "architectures")


def require_accepted_config(spec: ModelSpec, *, source: str = "config.json") -> None:
    """Check that transformers accepts the config of a model that it knows.

    Args:
        spec: the model.
        source: file name for error texts.

    Raises:
        CheckpointError: transformers refuses a value. The text has its reason, which names the key.
    """
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.activations import ACT2FN

    if spec.family.model_type in CONFIG_MAPPING:
        with config_errors(spec.config, source):
            AutoConfig.for_model(**default_config(spec))
    key = spec.family.activation_key
    if spec.config.get(key) not in (None, *ACT2FN):
        raise CheckpointError(
            f"{source}: {key} is {spec.config[key]!r}, which is no activation function of "
            "transformers; correct the name"
        )


@contextmanager
def config_errors(config: Mapping[str, Any], source: str = "config.json") -> Iterator[None]:
    """Turn errors of transformers about a model's config into a :class:`CheckpointError`.

    Raises:
        CheckpointError: transformers raises in the block, or the config has a number of layers or
            experts that no model has: building their modules would take forever.
    """
    from huggingface_hub.errors import StrictDataclassError

    _require_counts(config, source)
    # RuntimeError is torch's, where a size is negative or overflows; UnboundLocalError that of a
    # forward whose switches contradict each other.
    try:
        yield
    except (StrictDataclassError, RuntimeError, UnboundLocalError, *WRONG_VALUES) as error:
        # A strict dataclass says which check failed, and its cause which value.
        reason = str(error.__cause__ or error).strip("'\"")
        if isinstance(error, AssertionError):  # of the embedding's module
            reason = f"pad_token_id is {config.get('pad_token_id')!r}: {reason}"
        if "rope_parameters" not in config:  # transformers 5 renames the key
            reason = reason.replace("rope_parameters", "rope_scaling")
        raise CheckpointError(
            f"{source}: transformers does not accept it: {reason}; correct the value, or copy "
            "config.json from the model's source again"
        ) from error


def _require_counts(config: Mapping[str, Any], source: str) -> None:
    """Check the numbers of layers and experts of a config and of those nested in it."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _require_counts(value, source)
        elif _COUNT.fullmatch(str(key)) and isinstance(value, int) and value > _MOST_MODULES:
            raise CheckpointError(
                f"{source}: {key} is {value}, more than the {_MOST_MODULES} that are possible; "
                "correct the value, or copy config.json from the model's source again"
            )


def default_config(spec: ModelSpec) -> dict[str, Any]:
    """Return the values for ``AutoConfig.for_model``.

    The config class may refuse the head count of a per-layer model's widest layer (the bundled
    class does not). The values then state another number of KV groups: layers take their widths
    from the weights, and only the ratio of query to KV heads matters to them. That number is one
    group, or, if the class computes the width of a head from it, the number that gives this width.
    """
    values = {key: value for key, value in spec.config.items() if key not in _LAYOUT_KEYS}
    values = dict(with_floats(values))  # a copy: transformers changes nested values
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


def with_floats(value: Any) -> Any:
    """Return a copy with the numbers that transformers writes as ``{"__float__": "Infinity"}``."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: with_floats(one) for key, one in value.items()}
    return [with_floats(one) for one in value] if isinstance(value, list) else copy.copy(value)
