"""Read the sizes of a model from its ``config.json``.

In: the config and the family's table, which names the config's keys. Out: checked numbers, of the
whole model or of one layer. ``per_layer_config`` (written by the per-layer layout) overrides the
global keys for single layers. Opens no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.model.family_schema import HEAD_DIM, Family


class ConfigReader:
    """Read checked numbers from one config.

    Args:
        config: ``config.json``.
        family: the table that names its keys.
        source: file name for error texts.

    Every method raises a :class:`CheckpointError` if a number is missing or not a positive whole
    number.
    """

    def __init__(self, config: Mapping[str, Any], family: Family, source: str) -> None:
        self.config, self.family, self.source = config, family, source
        # transformers writes these keys with leading zeros ("07") when it saves such a config.
        overrides = config.get("per_layer_config") or {}
        self._overrides = {int(key): value for key, value in overrides.items()}

    def number(self, key: str, *, default: int | None = None, layer: int | None = None) -> int:
        """Return the number under a key.

        Args:
            key: key of the config.
            default: value that transformers takes if neither config nor family has one.
            layer: index of a layer, for the number that holds there.
        """
        value = self._of_layer(layer).get(key)
        if value is None:
            value = self.family.defaults.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{self.source}: {key} is {value!r}, expected a positive whole number"
            )
        return value

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.number(self.family.layers_key)

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.number(self.family.hidden_key)

    @property
    def heads(self) -> int:
        """Query heads a layer, by the global keys."""
        return self.number(self.family.heads_key)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.number(self.family.head_dim_key or HEAD_DIM, default=self.hidden // self.heads)

    def kv_heads(self, layer: int | None = None) -> int:
        """Return the number of KV heads, of a layer or by the global keys."""
        family, config = self.family, self._of_layer(layer)
        if family.one_kv_head and all(condition.holds(config) for condition in family.one_kv_head):
            return 1
        return self.number(family.kv_heads_key, default=self.heads, layer=layer)

    def query_heads_per_group(self) -> int:
        """Return the number of query heads that read one KV head.

        Raises:
            CheckpointError: the query heads do not divide evenly among the KV heads.
        """
        heads, kv_heads = self.heads, self.kv_heads()
        if heads % kv_heads:
            raise CheckpointError(
                f"{self.source}: {self.family.heads_key} {heads} is not a multiple of "
                f"{self.family.kv_heads_key} {kv_heads}"
            )
        return heads // kv_heads

    def ffn_channels(self, layer: int) -> int:
        """Return the number of FFN channels of a layer, or of each of its experts."""
        times = self.family.ffn_times_hidden
        default = None if times is None else times * self.hidden
        return self.number(self.family.ffn_key, default=default, layer=layer)

    def experts(self, layer: int) -> int:
        """Return the number of experts of a layer; 0 for a family without experts."""
        if self.family.experts is None:
            return 0
        keys = self.family.experts.count_keys
        own = self._overrides.get(layer, {})
        # An override may use another name for the number than the global key.
        stated = own if any(key in own for key in keys) else self.config
        key = next((key for key in keys if stated.get(key) is not None), keys[0])
        return self.number(key, layer=layer)

    def experts_chosen(self, experts: int) -> int:
        """Return the number of experts that process one token; 0 for a family without experts.

        Args:
            experts: experts of the layer that has most.

        Raises:
            CheckpointError: the config chooses more experts than there are.
        """
        rule = self.family.experts
        if rule is None:
            return 0
        chosen = self.number(rule.chosen_key, default=rule.chosen_default)
        if chosen > experts:
            raise CheckpointError(
                f"{self.source}: {rule.chosen_key} is {chosen}, but the model has {experts} experts"
            )
        return chosen

    def dense_channels(self) -> int:
        """Return the FFN channels of layers without experts in a mixture; 0 if there are none."""
        rule = self.family.experts
        return 0 if rule is None or rule.dense_key is None else self.number(rule.dense_key)

    def _of_layer(self, layer: int | None) -> Mapping[str, Any]:
        """Return the config with the overrides of one layer."""
        own = {} if layer is None else self._overrides.get(layer)
        return {**self.config, **own} if own else self.config
