"""What a config and the headers say of each layer: counts, tensors, the groups of units.

In: ``config.json``, a family's table and the checkpoint's tensor shapes. Out: numbers and
:class:`UnitGroup`, checked against the shapes. Reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.model.family_schema import Experts, Family
from frugal_bonsai.model.units import ATTENTION, FFN, UnitGroup, UnitSlice

Shapes = Mapping[str, tuple[int, ...]]


def positive_number(
    config: Mapping[str, Any], family: Family, key: str, source: str, *, default: int | None = None
) -> int:
    """A config's number, or what transformers takes where it has none."""
    value = config.get(key)
    if value is None:
        value = family.defaults.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{source}: {key} is {value!r}, expected a positive whole number")
    return value


def count_kv_heads(config: Mapping[str, Any], family: Family, heads: int, source: str) -> int:
    """KV heads of a layer."""
    if family.one_kv_head and all(condition.holds(config) for condition in family.one_kv_head):
        return 1
    return positive_number(config, family, family.kv_heads_key, source, default=heads)


def count_per_layer(
    config: Mapping[str, Any], family: Family, layers: int, source: str
) -> list[tuple[int, int]]:
    """(KV heads, FFN channels) of each layer; ``per_layer_config`` overrides the global numbers."""
    overrides = _overrides(config)
    heads = positive_number(config, family, family.heads_key, source)
    default = None
    if family.ffn_times_hidden is not None:
        default = family.ffn_times_hidden * positive_number(
            config, family, family.hidden_key, source
        )
    counts = []
    for layer in range(layers):
        here = {**config, **overrides.get(layer, {})}
        counts.append(
            (
                count_kv_heads(here, family, heads, source),
                positive_number(here, family, family.ffn_key, source, default=default),
            )
        )
    return counts


def _overrides(config: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """What ``per_layer_config`` says of each layer."""
    # transformers writes the keys with leading zeros ("07") when it saves such a config again.
    return {int(key): value for key, value in (config.get("per_layer_config") or {}).items()}


def count_experts(config: Mapping[str, Any], family: Family, layers: int, source: str) -> list[int]:
    """Experts of each layer; empty for a family without."""
    if family.experts is None:
        return []
    keys, overrides = family.experts.count_keys, _overrides(config)
    counts = []
    for layer in range(layers):
        own = overrides.get(layer, {})
        here = own if any(key in own for key in keys) else config
        key = next((key for key in keys if here.get(key) is not None), keys[0])
        counts.append(positive_number(here, family, key, source))
    return counts


def count_chosen(config: Mapping[str, Any], family: Family, experts: list[int], source: str) -> int:
    """How many experts a token is sent to."""
    assert family.experts is not None
    rule = family.experts
    chosen = positive_number(config, family, rule.chosen_key, source, default=rule.chosen_default)
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
    shape = shape_of(shapes, name, source)
    if shape != (experts, hidden):
        raise CheckpointError(
            f"{source}: tensor {name} has shape {list(shape)}, expected {[experts, hidden]} from "
            "the config"
        )
    return name


def split_by_layer(
    family: Family, shapes: Shapes, layers: int
) -> tuple[tuple[Mapping[str, tuple[int, ...]], ...], set[str]]:
    """Each layer's tensors by their names inside it, and the full names of all of them."""
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


def shape_of(shapes: Shapes, name: str, source: str) -> tuple[int, ...]:
    """Of a tensor that the architecture needs."""
    if name not in shapes:
        raise CheckpointError(
            f"{source}: the checkpoint has no tensor {name!r}, which this architecture needs"
        )
    return tuple(shapes[name])


@dataclass(frozen=True)
class LayerCounts:
    """Units of one layer: KV groups, FFN channels (of each expert), experts."""

    kv_heads: int
    ffn: int
    experts: int


def layer_groups(
    family: Family,
    layer: int,
    counts: LayerCounts,
    widths: Mapping[str, int],
    hidden: int,
    shapes: Shapes,
    source: str,
) -> list[UnitGroup]:
    """A layer's groups: attention, then the FFN or its experts."""
    groups = [_group(family, ATTENTION, layer, counts.kv_heads, widths, hidden, shapes, source)]
    if family.experts is None:
        groups.append(_group(family, FFN, layer, counts.ffn, widths, hidden, shapes, source))
        return groups
    router = _router(family, family.experts, layer, counts.experts, hidden, shapes, source)
    for expert in range(counts.experts):
        group = _group(family, FFN, layer, counts.ffn, widths, hidden, shapes, source, expert)
        row = UnitSlice(tensor=router, axis=0, width=1, start=expert, joint=True)
        groups.append(replace(group, slices=(*group.slices, row), joint_parameters=hidden))
    return groups


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
        shape = shape_of(shapes, name, source)
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
