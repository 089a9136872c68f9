"""One model's description: its family's table and the numbers from its config and headers.

In: ``config.json`` as a dict and the checkpoint's tensor shapes. Out: a :class:`ModelSpec`, all
that the planner, the sweep and the rewriter need. Hugging Face's own layer class does the
forward; nothing here computes. Holds no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from frugal_bonsai.errors import CheckpointError, UnsupportedModelError
from frugal_bonsai.model.family_lookup import find_family
from frugal_bonsai.model.family_schema import ACTIVATION_COPIES, HEAD_DIM, Family
from frugal_bonsai.model.groups import (
    LayerCounts,
    Shapes,
    count_chosen,
    count_experts,
    count_kv_heads,
    count_per_layer,
    layer_groups,
    positive_number,
    shape_of,
    split_by_layer,
)
from frugal_bonsai.model.units import ATTENTION, UnitGroup, UnitTable


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model: its family and the numbers from its config and headers.

    Attributes:
        family: the table.
        config: ``config.json``, unchanged.
        layers: number of layers.
        hidden: H, width of the residual stream.
        heads: query heads a layer.
        kv_heads: KV heads a layer.
        head_dim: width of one head.
        intermediate: I, FFN channels a layer (the widest layer's, when they differ); of one expert
            where there are experts.
        experts: experts a layer (of the layer that has most); 0 where there are none.
        experts_chosen: experts that a token is sent to; 0 where there are none.
        vocabulary: V, rows of the token embedding.
        positions: longest window in tokens.
        tied: the head is the token embedding.
        whole_attention: why no unit of attention can be removed; None if they can.
        table: the units.
        layer_tensors: for each layer, the names of its tensors inside the layer -> shape.
        other_tensors: names of all tensors outside the layers -> shape.
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
    vocabulary: int
    positions: int
    tied: bool
    whole_attention: str | None = None
    table: UnitTable
    layer_tensors: tuple[Mapping[str, tuple[int, ...]], ...]
    other_tensors: Mapping[str, tuple[int, ...]]

    @property
    def query_heads_per_group(self) -> int:
        """Query heads that read one KV head."""
        return self.heads // self.kv_heads

    @property
    def norm_tensors(self) -> tuple[str, ...]:
        """Names of the final norm's tensors."""
        prefix = f"{self.family.base_module}.{self.family.norm_module}."
        return tuple(name for name in self.other_tensors if name.startswith(prefix))

    @property
    def block_parameters(self) -> int:
        """Parameters inside the layers (norms and biases included): what sparsity is a share of."""
        return sum(_size(s) for tensors in self.layer_tensors for s in tensors.values())

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        return self.block_parameters + sum(_size(s) for s in self.other_tensors.values())

    @property
    def residual_scale(self) -> float:
        """What a sublayer's output is multiplied by before it is added to the residual stream."""
        key = self.family.residual_scale_key
        return 1.0 if key is None else float(self.config.get(key) or 1.0)

    @property
    def activation_copies(self) -> int:
        """Copies of the channels that a composed activation function holds; see the table."""
        name = self.config.get(self.family.activation_key) or self.family.activation
        return ACTIVATION_COPIES.get(str(name), 0)

    @property
    def logits_divisor(self) -> float:
        """What logits are divided by."""
        key = self.family.logits_divisor_key
        return 1.0 if key is None else float(self.config.get(key) or 1.0)

    @property
    def logits_softcap(self) -> float | None:
        """Bound that logits approach by a tanh; None leaves them."""
        key = self.family.logits_softcap_key
        value = None if key is None else self.config.get(key, self.family.defaults.get(key))
        return None if value is None else float(value)

    @property
    def head_tensor(self) -> str:
        """Name of the tensor that the head multiplies with."""
        return self.family.embedding if self.tied else self.family.head

    def prefix(self, layer: int) -> str:
        """Prefix of a layer's tensors in the checkpoint."""
        return self.family.layer_prefix.format(layer=layer)


def _size(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def describe_model(
    config: Mapping[str, Any],
    shapes: Shapes,
    *,
    source: str = "config.json",
    assume: str | None = None,
) -> ModelSpec:
    """Build the :class:`ModelSpec` of a model from its config and tensor shapes alone.

    Args:
        config: ``config.json``.
        shapes: tensor name -> shape, from the headers.
        source: file name for error texts.
        assume: see :func:`find_family`.

    Raises:
        UnsupportedModelError: unknown ``model_type``.
        CheckpointError: a tensor is missing or has another shape than the config says.
    """
    family = find_family(config, source=source, assume=assume)
    for condition in family.refused:
        if condition.holds(config):
            raise UnsupportedModelError(
                f"{source}: {condition.key} is {config.get(condition.key)!r}: such a "
                f"{family.model_type} is not supported, {condition.reason}"
            )
    layers = positive_number(config, family, family.layers_key, source)
    hidden = positive_number(config, family, family.hidden_key, source)
    heads = positive_number(config, family, family.heads_key, source)
    kv_heads = count_kv_heads(config, family, heads, source)
    head_dim = hidden // heads
    head_dim = positive_number(
        config, family, family.head_dim_key or HEAD_DIM, source, default=head_dim
    )
    if heads % kv_heads:
        raise CheckpointError(
            f"{source}: {family.heads_key} {heads} is not a multiple of {family.kv_heads_key} "
            f"{kv_heads}"
        )
    whole = next((c.reason for c in family.whole_attention if c.holds(config)), None)
    per_layer = count_per_layer(config, family, layers, source)
    layer_tensors, used = split_by_layer(family, shapes, layers)
    query = heads // kv_heads * head_dim
    widths = {"query": query, "head": head_dim, "group": query + 2 * head_dim, "one": 1}
    groups: list[UnitGroup] = []
    experts = count_experts(config, family, layers, source)
    for layer in range(layers):
        shape = LayerCounts(*per_layer[layer], experts[layer] if experts else 0)
        groups += layer_groups(family, layer, shape, widths, hidden, shapes, source)
    if whole is not None:
        groups = [replace(g, removable=g.kind != ATTENTION) for g in groups]
    embedding_shape = shape_of(shapes, family.embedding, source)
    asked = config.get("tie_word_embeddings")
    tied = bool(asked) or family.head not in shapes
    if tied and asked is False:
        raise CheckpointError(
            f"{source}: tie_word_embeddings is false but the checkpoint has no {family.head}"
        )
    others = {
        name: tuple(shape)
        for name, shape in shapes.items()
        if name not in used and not (tied and name == family.head)
    }
    return ModelSpec(
        family=family,
        config=dict(config),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=max(ffn for _, ffn in per_layer),
        experts=max(experts, default=0),
        experts_chosen=0
        if family.experts is None
        else count_chosen(config, family, experts, source),
        vocabulary=embedding_shape[0],
        positions=positive_number(config, family, family.positions_key, source, default=2048),
        tied=tied,
        whole_attention=whole,
        table=UnitTable(tuple(groups)),
        layer_tensors=layer_tensors,
        other_tensors=others,
    )
