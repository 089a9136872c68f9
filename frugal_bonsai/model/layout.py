"""Which unit counts an output layout can hold.

``uniform``: the same count in every layer; head counts that the architecture's config accepts; FFN
counts in multiples of a tile. ``per-layer`` and ``padded``: any count, FFN counts in multiples of a
tile of one unless the user names one. At least one unit of each kind stays in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION, FFN, UnitGroup

UNIFORM, PER_LAYER, PADDED = "uniform", "per-layer", "padded"
LAYOUTS = (UNIFORM, PER_LAYER, PADDED)

# Largest share of the block parameters that one step of the FFN tile may take from every layer, so
# that the nearest legal size is within one point of any target.
LARGEST_TILE_STEP = 0.02
# torch's grouped products read rows in multiples of 16 bytes; an element has two at least.
EXPERT_TILE = 8


@dataclass(frozen=True, kw_only=True)
class LayoutRules:
    """The layout's constraints on unit counts.

    Attributes:
        layout: one of :data:`LAYOUTS`.
        tile: FFN counts are multiples of this.
        attention_counts: legal KV-group counts of a layer, ascending.
        as_mistral: a Llama with a head count that its config class refuses is written as the
            Mistral that computes the same.
    """

    layout: str
    tile: int
    attention_counts: tuple[int, ...]
    as_mistral: bool = False

    @property
    def uniform(self) -> bool:
        """Counts must be equal across layers."""
        return self.layout == UNIFORM

    def heads_fit(self, spec: ModelSpec, heads: int) -> bool:
        """Whether a config of equal layers can hold this number of query heads."""
        return self.as_mistral or heads_fit(spec, heads)

    def legal_counts(self, kind: str, dense: int) -> tuple[int, ...]:
        """Legal counts of a kind in a layer that has ``dense`` units, ascending, ``dense`` last."""
        if kind == ATTENTION:
            counts = tuple(c for c in self.attention_counts if c < dense)
        else:
            counts = tuple(range(self.tile, dense, self.tile))
        return (*counts, dense)

    def can_cut(self, group: UnitGroup, alive: int) -> bool:
        """Whether a group may keep fewer than so many units."""
        return group.removable and self.legal_counts(group.kind, group.count)[0] < alive


def layout_rules(
    spec: ModelSpec,
    layout: str,
    *,
    tile: int | None = None,
    default_tile: int = 64,
    as_mistral: bool = False,
) -> LayoutRules:
    """The rules of a layout for one model.

    Args:
        spec: the dense model.
        layout: one of :data:`LAYOUTS`.
        tile: FFN tile that the user asked for, 1 the finest that the layout can hold; None picks
            one: for ``uniform`` the largest power of two up to ``default_tile`` whose step takes at
            most two points of the block parameters, for the others 1.
        default_tile: the hardware's tile (128 on GPU, 64 on CPU).
        as_mistral: see :class:`LayoutRules`.

    Raises:
        OptionError: unknown layout, a tile that the FFN cannot hold, or ``as_mistral`` for what
            cannot be written so.
    """
    if layout not in LAYOUTS:
        raise OptionError(f"--layout: {layout!r} is not one of {', '.join(LAYOUTS)}")
    if tile is not None and not 1 <= tile <= spec.intermediate:
        raise OptionError(f"--tile: {tile} is outside 1..{spec.intermediate} (the FFN's channels)")
    if tile is None:
        tile = _default_tile(spec, default_tile) if layout == UNIFORM else 1
    if spec.experts and layout == UNIFORM:
        tile = _expert_tile(spec, tile)
    if as_mistral:
        _require_mistral(spec, layout)
    return LayoutRules(
        layout=layout,
        tile=tile,
        attention_counts=_attention_counts(spec, layout, free=as_mistral or layout != UNIFORM),
        as_mistral=as_mistral,
    )


def _expert_tile(spec: ModelSpec, tile: int) -> int:
    """A tile of which transformers' products over all experts can read every multiple."""
    if tile % EXPERT_TILE and tile not in (1, spec.intermediate):
        raise OptionError(
            f"--tile: {tile} is no multiple of {EXPERT_TILE}; transformers multiplies with all "
            f"experts of a layer at once, whose rows must be multiples of {EXPERT_TILE} channels"
        )
    return max(tile, min(EXPERT_TILE, spec.intermediate))


def _require_mistral(spec: ModelSpec, layout: str) -> None:
    """Refuse what is no Mistral by another name: that has the same layers, and no biases."""
    if layout == PER_LAYER:
        raise OptionError("--as-mistral: is for --layout uniform and padded; per-layer needs none")
    if spec.family.model_type != "llama":
        raise OptionError(
            f"--as-mistral: a Llama can be written as a Mistral, this is a "
            f"{spec.family.model_type}; leave it out"
        )
    for layer, tensors in enumerate(spec.layer_tensors):
        for name in tensors:
            if name.endswith(".bias"):
                raise OptionError(
                    f"--as-mistral: this Llama has biases ({spec.prefix(layer)}{name}), a Mistral "
                    "has none; leave it out"
                )


def _attention_counts(spec: ModelSpec, layout: str, *, free: bool) -> tuple[int, ...]:
    """Numbers of KV groups that a layer may keep; none where attention stays whole."""
    if spec.whole_attention is not None:
        return ()
    if layout != PER_LAYER and spec.family.head_dim_key is None:
        return ()  # transformers computes the width of a head from their number
    return tuple(
        count
        for count in range(1, spec.kv_heads + 1)
        if free or heads_fit(spec, count * spec.query_heads_per_group)
    )


def heads_fit(spec: ModelSpec, heads: int) -> bool:
    """Whether the architecture's own config class accepts this number of query heads."""
    if spec.family.head_dim_key is None:  # and their width is what is left of hidden_size
        return heads * spec.head_dim == spec.hidden
    return not spec.family.heads_divide_hidden or spec.hidden % heads == 0


def _default_tile(spec: ModelSpec, largest: int) -> int:
    one_channel = sum(g.unit_parameters for g in spec.table.groups if g.kind == FFN)
    tile = largest
    while tile > 1 and tile * one_channel > LARGEST_TILE_STEP * spec.block_parameters:
        tile //= 2
    return tile
