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
from frugal_bonsai.model.find import find_family
from frugal_bonsai.model.table import ACTIVATION_COPIES, HEAD_DIM, Experts, Family
from frugal_bonsai.model.units import ATTENTION, FFN, UnitGroup, UnitSlice, UnitTable

Shapes = Mapping[str, tuple[int, ...]]


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
    layers = _positive(config, family, family.layers_key, source)
    hidden = _positive(config, family, family.hidden_key, source)
    heads = _positive(config, family, family.heads_key, source)
    kv_heads = _kv_heads(config, family, heads, source)
    head_dim = hidden // heads
    head_dim = _positive(config, family, family.head_dim_key or HEAD_DIM, source, default=head_dim)
    if heads % kv_heads:
        raise CheckpointError(
            f"{source}: {family.heads_key} {heads} is not a multiple of {family.kv_heads_key} "
            f"{kv_heads}"
        )
    whole = next((c.reason for c in family.whole_attention if c.holds(config)), None)
    per_layer = _per_layer(config, family, layers, source)
    layer_tensors, used = _split_by_layer(family, shapes, layers)
    query = heads // kv_heads * head_dim
    widths = {"query": query, "head": head_dim, "group": query + 2 * head_dim, "one": 1}
    groups: list[UnitGroup] = []
    experts = _experts(config, family, layers, source)
    for layer in range(layers):
        kv_here, ffn_here = per_layer[layer]
        groups.append(_group(family, ATTENTION, layer, kv_here, widths, hidden, shapes, source))
        if family.experts is None:
            groups.append(_group(family, FFN, layer, ffn_here, widths, hidden, shapes, source))
            continue
        router = _router(family, family.experts, layer, experts[layer], hidden, shapes, source)
        for expert in range(experts[layer]):
            group = _group(family, FFN, layer, ffn_here, widths, hidden, shapes, source, expert)
            row = UnitSlice(tensor=router, axis=0, width=1, start=expert, joint=True)
            groups.append(replace(group, slices=(*group.slices, row), joint_parameters=hidden))
    if whole is not None:
        groups = [replace(g, removable=g.kind != ATTENTION) for g in groups]
    embedding_shape = _shape(shapes, family.embedding, source)
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
        experts_chosen=0 if family.experts is None else _chosen(config, family, experts, source),
        vocabulary=embedding_shape[0],
        positions=_positive(config, family, family.positions_key, source, default=2048),
        tied=tied,
        whole_attention=whole,
        table=UnitTable(tuple(groups)),
        layer_tensors=layer_tensors,
        other_tensors=others,
    )


def _positive(
    config: Mapping[str, Any], family: Family, key: str, source: str, *, default: int | None = None
) -> int:
    value = config.get(key)
    if value is None:
        value = family.defaults.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{source}: {key} is {value!r}, expected a positive whole number")
    return value


def _kv_heads(config: Mapping[str, Any], family: Family, heads: int, source: str) -> int:
    if family.one_kv_head and all(condition.holds(config) for condition in family.one_kv_head):
        return 1
    return _positive(config, family, family.kv_heads_key, source, default=heads)


def _per_layer(
    config: Mapping[str, Any], family: Family, layers: int, source: str
) -> list[tuple[int, int]]:
    """(KV heads, FFN channels) of each layer; ``per_layer_config`` overrides the global numbers."""
    overrides = _overrides(config)
    heads = _positive(config, family, family.heads_key, source)
    default = None
    if family.ffn_times_hidden is not None:
        default = family.ffn_times_hidden * _positive(config, family, family.hidden_key, source)
    counts = []
    for layer in range(layers):
        here = {**config, **overrides.get(layer, {})}
        counts.append(
            (
                _kv_heads(here, family, heads, source),
                _positive(here, family, family.ffn_key, source, default=default),
            )
        )
    return counts


def _overrides(config: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """What ``per_layer_config`` says of each layer."""
    # transformers writes the keys with leading zeros ("07") when it saves such a config again.
    return {int(key): value for key, value in (config.get("per_layer_config") or {}).items()}


def _experts(config: Mapping[str, Any], family: Family, layers: int, source: str) -> list[int]:
    """Experts of each layer; empty for a family without."""
    if family.experts is None:
        return []
    keys, overrides = family.experts.count_keys, _overrides(config)
    counts = []
    for layer in range(layers):
        own = overrides.get(layer, {})
        here = own if any(key in own for key in keys) else config
        key = next((key for key in keys if here.get(key) is not None), keys[0])
        counts.append(_positive(here, family, key, source))
    return counts


def _chosen(config: Mapping[str, Any], family: Family, experts: list[int], source: str) -> int:
    assert family.experts is not None
    rule = family.experts
    chosen = _positive(config, family, rule.chosen_key, source, default=rule.chosen_default)
    if chosen > max(experts):
        raise CheckpointError(
            f"{source}: {rule.chosen_key} is {chosen}, but the model has {max(experts)} experts"
        )
    return chosen


def _router(
    family: Family,
    rule: Experts,
    layer: int,
    experts: int,
    hidden: int,
    shapes: Shapes,
    source: str,
) -> str:
    """Full name of a layer's router, which has a row an expert."""
    name = family.layer_prefix.format(layer=layer) + rule.router
    shape = _shape(shapes, name, source)
    if shape != (experts, hidden):
        raise CheckpointError(
            f"{source}: tensor {name} has shape {list(shape)}, expected {[experts, hidden]} from "
            "the config"
        )
    return name


def _split_by_layer(
    family: Family, shapes: Shapes, layers: int
) -> tuple[tuple[Mapping[str, tuple[int, ...]], ...], set[str]]:
    by_layer: list[dict[str, tuple[int, ...]]] = []
    used: set[str] = set()
    for layer in range(layers):
        prefix = family.layer_prefix.format(layer=layer)
        mine = {
            name.removeprefix(prefix): tuple(shape)
            for name, shape in shapes.items()
            if name.startswith(prefix) and not name.endswith(family.unread)
        }
        by_layer.append(mine)
        used.update(name for name in shapes if name.startswith(prefix))
    return tuple(by_layer), used


def _shape(shapes: Shapes, name: str, source: str) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(
            f"{source}: the checkpoint has no tensor {name!r}, which this architecture needs"
        )
    return tuple(shapes[name])


def _group(
    family: Family,
    kind: str,
    layer: int,
    count: int,
    widths: Mapping[str, int],
    hidden: int,
    shapes: Shapes,
    source: str,
    expert: int | None = None,
) -> UnitGroup:
    """The units of one kind in one layer; the shapes of their tensors must be the config's."""
    attention = kind == ATTENTION
    parts = family.attention_parts if attention else family.ffn_parts
    output = (family.attention_output if attention else family.ffn_output).format(expert=expert)
    prefix = family.layer_prefix.format(layer=layer)
    slices, parameters, extents = [], 0, dict[str, int]()
    for part in parts:
        name = prefix + part.tensor.format(expert=expert)
        if name not in shapes and not part.required:
            continue
        shape = _shape(shapes, name, source)
        width = widths[part.width]
        start = count * sum(widths[before] for before in part.after)
        slices.append(UnitSlice(tensor=name, axis=part.axis, width=width, start=start))
        parameters += width * (1 if len(shape) == 1 else hidden)
        extents[name] = max(extents.get(name, 0), start + count * width)
    for piece in slices:
        extent, shape = extents[piece.tensor], tuple(shapes[piece.tensor])
        expected = (extent,) if len(shape) == 1 else (extent, hidden)
        if piece.axis == 1:
            expected = (hidden, extent)
        if shape != expected:
            raise CheckpointError(
                f"{source}: tensor {piece.tensor} has shape {list(shape)}, expected "
                f"{list(expected)} from the config"
            )
    out_name = f"{prefix}{output}.weight"
    columns = next(s.width for s in slices if s.tensor == out_name)
    return UnitGroup(
        layer=layer,
        kind=kind,
        count=count,
        unit_parameters=parameters,
        slices=tuple(slices),
        output=output,
        output_weight=out_name,
        columns_per_unit=columns,
        expert=expert,
    )
