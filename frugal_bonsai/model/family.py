"""The description of one model: its family's table and the numbers from its config and headers.

In: ``config.json`` as a dict and the checkpoint's tensor shapes. Out: a :class:`ModelSpec`, from
which the planner, the sweep and the rewriter work. Hugging Face's own layer class runs the forward
pass; nothing here computes. Holds names and shapes, no weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from frugal_bonsai.errors import CheckpointError, UnsupportedModelError
from frugal_bonsai.model.config_reader import ConfigReader
from frugal_bonsai.model.family_lookup import find_family
from frugal_bonsai.model.family_schema import ACTIVATION_COPIES, Family
from frugal_bonsai.model.groups import GroupBuilder, Shapes, split_by_layer
from frugal_bonsai.model.multimodal import Multimodal
from frugal_bonsai.model.units import ATTENTION, FFN, UnitTable


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model: its family and the numbers from its config and headers.

    Attributes:
        family: the family's table.
        config: ``config.json``, unchanged.
        layers: number of layers.
        hidden: H, width of the residual stream.
        heads: query heads a layer.
        kv_heads: KV heads a layer.
        head_dim: width of one head.
        intermediate: I, FFN channels of the widest layer, or of one of its experts.
        experts: experts of the layer that has most; 0 for a model without experts.
        experts_chosen: experts that process one token; 0 for a model without experts.
        dense_channels: channels of an FFN that stays whole, beside the experts or in layers without
            them; 0 if there is none.
        vocabulary: V, rows of the token embedding.
        positions: longest window in tokens.
        tied: the output head shares the token embedding's weight.
        whole_attention: reason why no attention unit can be removed; None if they can be.
        table: the units.
        layer_tensors: for each layer, name inside the layer -> shape.
        other_tensors: full name -> shape of all tensors outside the layers.
        multimodal: the whole whose text model this is, if its other parts are carried along.
    """

    family: Family
    config: Mapping[str, Any]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    experts: int = 0
    experts_chosen: int = 0
    dense_channels: int = 0
    vocabulary: int
    positions: int
    tied: bool
    whole_attention: str | None = None
    table: UnitTable
    layer_tensors: tuple[Shapes, ...]
    other_tensors: Shapes
    multimodal: Multimodal | None = None

    @property
    def query_heads_per_group(self) -> int:
        """Query heads that read one KV head."""
        return self.heads // self.kv_heads

    @property
    def whole_layers(self) -> str | None:
        """Reason why no layer can be dropped; None if they can be."""
        return next((c.reason for c in self.family.whole_layers if c.holds(self.config)), None)

    @property
    def expert_groups(self) -> int:
        """Number of groups of equally many experts among which the router chooses first."""
        rule = self.family.experts
        return 1 if rule is None else self._stated(rule.groups_key)

    @property
    def least_experts(self) -> int:
        """Number of experts of a layer that the router needs."""
        rule, groups = self.family.experts, self.expert_groups
        if rule is None or groups == 1:
            return 1 if rule is None else rule.least
        own = math.ceil(self.experts_chosen / self._stated(rule.chosen_groups_key))
        return groups * max(rule.least, own)

    def _stated(self, key: str) -> int:
        """Return a number of the config, or the one that transformers takes in its place, or 1.

        Raises:
            CheckpointError: it is no positive whole number.
        """
        value = self.config.get(key) or self.family.defaults.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"config.json: {key} is {value!r}, expected a positive whole number"
            )
        return value

    @property
    def norm_tensors(self) -> tuple[str, ...]:
        """Names of the final norm's tensors."""
        prefix = f"{self.family.base_module}.{self.family.norm_module}."
        return tuple(name for name in self.other_tensors if name.startswith(prefix))

    @property
    def matrices(self) -> dict[str, tuple[int, ...]]:
        """Full name and shape of every matrix inside the layers."""
        return {
            self.prefix(layer) + name: shape
            for layer, tensors in enumerate(self.layer_tensors)
            for name, shape in tensors.items()
            if len(shape) == 2
        }

    @property
    def ffn_inputs(self) -> int:
        """Number of projections into an FFN: 2 where it is gated, else 1."""
        channel = next(group for group in self.table.groups if group.kind == FFN)
        return channel.unit_parameters // self.hidden - 1

    @property
    def block_parameters(self) -> int:
        """Parameters inside the layers, with norms, biases, and the few buffers that are stored.

        Sparsity is a share of them.
        """
        return sum(math.prod(shape) for layer in self.layer_tensors for shape in layer.values())

    @property
    def parameters(self) -> int:
        """All parameters and stored buffers, a tied head counted once."""
        return self.block_parameters + sum(map(math.prod, self.other_tensors.values()))

    def output_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return ``config.json`` of an output: the whole's, if its other parts are carried along.

        Args:
            config: the config of the pruned text model.
        """
        return config if self.multimodal is None else self.multimodal.whole_config(config)

    @property
    def residual_scale(self) -> float:
        """Factor of a sublayer's output before it is added to the residual stream."""
        key = self.family.residual_scale_key
        return 1.0 if key is None else float(self.config.get(key) or 1.0)

    @property
    def activation_copies(self) -> int:
        """Copies of the FFN channels that the activation function holds while it computes."""
        name = self.config.get(self.family.activation_key) or self.family.activation
        return ACTIVATION_COPIES.get(str(name), 0)

    @property
    def logits_divisor(self) -> float:
        """Number by which the logits are divided."""
        divisor, scale = self.family.logits_divisor_key, self.family.logits_scale_key
        if scale is not None:
            return 1 / float(self.config.get(scale) or self.family.defaults[scale])
        return 1.0 if divisor is None else float(self.config.get(divisor) or 1.0)

    @property
    def logits_softcap(self) -> float | None:
        """Bound c of the logits, c * tanh(logits / c); None for logits without a bound."""
        key = self.family.logits_softcap_key
        value = None if key is None else self.config.get(key, self.family.defaults.get(key))
        return None if value is None else float(value)

    @property
    def head_tensor(self) -> str:
        """Name of the output head's weight."""
        return self.family.embedding if self.tied else self.family.head

    def prefix(self, layer: int) -> str:
        """Return the prefix of a layer's tensor names."""
        return self.family.layer_prefix.format(layer=layer)


def describe_model(
    config: Mapping[str, Any],
    shapes: Shapes,
    *,
    source: str = "config.json",
    assume: str | None = None,
) -> ModelSpec:
    """Build the :class:`ModelSpec` of a model from its config and tensor shapes.

    Args:
        config: ``config.json``.
        shapes: full tensor name -> shape, from the headers.
        source: file name for error texts.
        assume: see :func:`find_family`.

    Raises:
        UnsupportedModelError: unknown ``model_type``, or a variant of it that is not supported.
        CheckpointError: a tensor is missing, or its shape contradicts the config.
    """
    family = find_family(config, source=source, assume=assume)
    _require_supported(family, config, source)
    sizes = ConfigReader(config, family, source)
    builder, layers = GroupBuilder(sizes, shapes), range(sizes.layers)
    groups = [group for layer in layers for group in builder.layer_groups(layer)]
    whole_attention = next((c.reason for c in family.whole_attention if c.holds(config)), None)
    if whole_attention is not None:
        groups = [replace(group, removable=group.kind != ATTENTION) for group in groups]
    layer_tensors, other_tensors = split_by_layer(family, shapes, len(layers))
    tied = _is_tied(family, config, shapes, source)
    if tied:
        other_tensors = {name: s for name, s in other_tensors.items() if name != family.head}
    experts = max(sizes.experts(layer) for layer in layers)
    routed = len({group.layer for group in groups if group.kind == FFN})
    beside = family.experts is not None and family.experts.dense_beside
    spec = ModelSpec(
        family=family,
        config=dict(config),
        layers=len(layers),
        hidden=sizes.hidden,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads(),
        head_dim=sizes.head_dim,
        intermediate=max(sizes.ffn_channels(layer) for layer in layers),
        experts=experts,
        experts_chosen=sizes.experts_chosen(experts),
        dense_channels=sizes.dense_channels() if beside or routed < len(layers) else 0,
        vocabulary=builder.shape_of(family.embedding)[0],
        positions=sizes.number(family.positions_key, default=2048),
        tied=tied,
        whole_attention=whole_attention,
        table=UnitTable(tuple(groups)),
        layer_tensors=layer_tensors,
        other_tensors=other_tensors,
    )
    if spec.experts % spec.expert_groups:
        raise CheckpointError(
            f"{source}: the {spec.experts} experts of a layer do not divide into "
            f"{spec.expert_groups} groups of equally many; correct the number of groups"
        )
    return spec


def _require_supported(family: Family, config: Mapping[str, Any], source: str) -> None:
    """Refuse variants of an architecture that the family's table does not describe."""
    for condition in family.refused:
        if condition.holds(config):
            raise UnsupportedModelError(
                f"{source}: {condition.key} is {config.get(condition.key)!r}: such a "
                f"{family.model_type} is not supported, {condition.reason}"
            )


def _is_tied(family: Family, config: Mapping[str, Any], shapes: Shapes, source: str) -> bool:
    """Return whether the output head shares the token embedding's weight."""
    stated = config.get("tie_word_embeddings")
    tied = bool(stated) or family.head not in shapes
    if tied and stated is False:
        raise CheckpointError(
            f"{source}: tie_word_embeddings is false but the checkpoint has no {family.head}"
        )
    return tied
